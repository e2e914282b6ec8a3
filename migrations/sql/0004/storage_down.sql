-- How the tables that every refresh writes are stored and vacuumed.

SELECT 1;
