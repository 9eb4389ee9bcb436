-- name: try_lock
-- $1: the lock's number, from nexhb's own range.
SELECT pg_try_advisory_lock($1);

-- name: wait_lock
-- $1: the lock's number. lock_timeout limits the wait.
SELECT pg_advisory_lock($1);

-- name: unlock
SELECT pg_advisory_unlock($1);

-- name: transaction_lock
-- $1: the lock's number; released with the transaction.
SELECT pg_advisory_xact_lock($1);

-- name: holds_lock
-- $1: the lock's number. Whether this connection holds it. pg_locks shows the bigint as two halves.
SELECT EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted AND objsubid = 1
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (classid::bigint << 32) + objid::bigint = $1);

-- name: blocking_transactions
-- Transactions that are old enough to be the reason why a lock on a table was not acquired. A prepared transaction
-- (PREPARE TRANSACTION) has no session; gid is its name.
SELECT pid, application_name, state, gid, extract(epoch FROM clock_timestamp() - since)::int AS seconds
FROM (
    SELECT pid, application_name, state, NULL AS gid, xact_start AS since FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
    UNION ALL
    SELECT NULL, NULL, 'prepared', gid, prepared FROM pg_prepared_xacts WHERE database = current_database()
) transactions
WHERE since < clock_timestamp() - interval '1 second'
ORDER BY seconds DESC
LIMIT 3;
