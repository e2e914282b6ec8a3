DROP VIEW {schema}.user_credits_now;
DROP TRIGGER audit_new_hold ON {schema}.users;
DROP TRIGGER audit_hold ON {schema}.users;
DROP TRIGGER keep_granted_windows ON {schema}.users;
DROP TRIGGER keep_to_grid ON {schema}.users;
DROP TRIGGER grant_new_user ON {schema}.users;
DROP TRIGGER prepare_new_user ON {schema}.users;
DROP TRIGGER IF EXISTS refresh_on_spend ON {schema}.users;
DROP FUNCTION {schema}.refresh_on_spend, {schema}.audit_hold, {schema}.keep_to_grid, {schema}.first_boundary,
    {schema}.granted_until, {schema}.grant_new_user, {schema}.prepare_new_user, {schema}.refresh_due,
    {schema}.refresh_credits_if_due, {schema}.refresh_user, {schema}.grant_window;
DROP TYPE {schema}.granted;
