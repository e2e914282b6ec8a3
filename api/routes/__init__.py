"""Routes, by whom they are for and what they do."""
