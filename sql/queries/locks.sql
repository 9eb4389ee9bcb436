-- name: try_lock
-- $1: the lock's number, out of nexhb's own space.
SELECT pg_try_advisory_lock($1);

-- name: wait_lock
-- $1: the lock's number. Bounded by lock_timeout.
SELECT pg_advisory_lock($1);

-- name: unlock
SELECT pg_advisory_unlock($1);

-- name: transaction_lock
-- $1: the lock's number; released with the transaction.
SELECT pg_advisory_xact_lock($1);
