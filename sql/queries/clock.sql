-- The clock of the daemon.

-- name: clock
-- The database's time, which the daemon uses.
SELECT clock_timestamp();
