-- The checks of `nexhb doctor`, one query for each.

-- name: ahead
-- $1 tolerance. Devices whose heard_at is later than now by more than $1: the daemon's clock was ahead when heard_at
-- was stored, and may be right again. Uses the index of the offline query.
SELECT count(*) AS devices, min(device_id) AS device_id, max(heard_at) AS heard_at FROM device_last_status
WHERE status = 'ok' AND heard_slot >= floor(extract(epoch FROM clock_timestamp() + $1::interval) / 300)::int
  AND heard_at > clock_timestamp() + $1::interval;

-- name: failed_days
-- Days that could not be archived, with the reason.
SELECT partition_name, reason, failed_at FROM hb_partitions WHERE state = 'archive_failed' ORDER BY range_start;

-- name: late
-- Late heartbeats that still wait for the nightly run, and since when.
SELECT count(*) AS rows, min(received_at) AS since FROM late_heartbeats;

-- name: last_good
-- $1 job, $2 the latest start that counts: a later one was recorded by a clock that was ahead. Returns `good`: when the
-- last completed run started; `reason`: the reason of the job's last run; and `schema_made`: when the schema was created.
SELECT (SELECT max(started_at) FROM job_runs WHERE job = $1 AND status = 'completed' AND started_at <= $2) AS good,
       (SELECT reason FROM job_runs WHERE job = $1 AND status IN ('completed', 'failed')
        ORDER BY run_no DESC LIMIT 1) AS reason,
       (SELECT min(applied_at) FROM schema_migrations) AS schema_made;

-- name: drills
-- $1 latest time. The number of archives, and when one was last restored as a drill.
SELECT count(*) AS archives, max(drilled_at) FILTER (WHERE drilled_at <= $1) AS drilled_at
FROM (SELECT drilled_at FROM hb_partitions WHERE archive_url IS NOT NULL
      UNION ALL SELECT drilled_at FROM archive_supplements) a;

-- name: drift
-- The counts of the last reconciliation.
SELECT (counts ->> 'checked')::bigint AS checked, (counts ->> 'wrong')::bigint AS wrong
FROM job_runs WHERE job = 'reconcile' AND status = 'completed'
ORDER BY run_no DESC LIMIT 1;

-- name: lock_holders
-- $1 the lowest of nexhb's lock numbers, $2 the highest. The sessions that hold such a lock, and how long their query
-- has run.
SELECT ((l.classid::bigint << 32) + l.objid::bigint) AS lock, a.pid, a.application_name, a.state,
       coalesce(extract(epoch FROM clock_timestamp() - coalesce(a.query_start, a.backend_start)), 0)::bigint AS seconds
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
  AND (l.classid::bigint << 32) + l.objid::bigint BETWEEN $1 AND $2
ORDER BY seconds DESC;

-- name: holding_up
-- $1 seconds. Sessions other than nexhb's whose transaction is older than $1, and which either block a session of nexhb
-- or hold a lock that blocks the writers of every heartbeat. The second condition is needed because a writer waits for
-- only 3 s at a time, so at a given moment it may not be waiting. A role without pg_read_all_stats sees nulls for the
-- sessions of other users.
SELECT b.pid, b.application_name, b.state,
       coalesce(extract(epoch FROM clock_timestamp() - b.xact_start), 0)::bigint AS seconds
FROM pg_stat_activity b
WHERE b.datname = current_database() AND coalesce(b.backend_type, 'client backend') = 'client backend'
  AND coalesce(b.application_name, '') NOT LIKE 'nexhb%'
  AND (b.xact_start IS NULL OR b.xact_start < clock_timestamp() - make_interval(secs => $1))
  AND (EXISTS (SELECT FROM pg_stat_activity a
               WHERE a.datname = b.datname AND a.application_name LIKE 'nexhb%'
                 AND b.pid = ANY (pg_blocking_pids(a.pid)))
       OR EXISTS (SELECT FROM pg_locks l
                  WHERE l.pid = b.pid AND l.granted
                    AND (l.relation = 'device_last_status'::regclass
                         AND l.mode NOT IN ('AccessShareLock', 'ShareUpdateExclusiveLock')
                         OR l.relation = 'device_heartbeats'::regclass
                         AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))))
ORDER BY seconds DESC;

-- name: prepared
-- $1 seconds. Prepared transactions (PREPARE TRANSACTION) that are older than $1 and hold locks on tables of nexhb.
-- They belong to no session, and survive a restart.
SELECT DISTINCT x.gid, extract(epoch FROM clock_timestamp() - x.prepared)::bigint AS seconds
FROM pg_prepared_xacts x
JOIN pg_locks own ON own.pid IS NULL AND own.locktype = 'transactionid' AND own.transactionid = x.transaction
JOIN pg_locks l ON l.pid IS NULL AND l.virtualtransaction = own.virtualtransaction
JOIN pg_class c ON c.oid = l.relation
WHERE x.database = current_database() AND x.prepared < clock_timestamp() - make_interval(secs => $1)
  AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'devices'::regclass)
ORDER BY seconds DESC;

-- name: hot
-- How many updates of device_last_status touched no index (heap-only tuples).
SELECT n_tup_upd AS updates, n_tup_hot_upd AS hot FROM pg_stat_user_tables WHERE relname = 'device_last_status';

-- name: day_bytes
-- $1 the start of today. The size in bytes of the largest of the last seven complete days.
SELECT max(pg_total_relation_size(to_regclass(quote_ident(partition_name)))) FROM hb_partitions
WHERE range_end <= $1 AND range_end > $1 - interval '7 days' AND to_regclass(quote_ident(partition_name)) IS NOT NULL;

-- name: turned_off
-- When perf_diff turned the fast reads off, if the flag was not changed since.
SELECT changed_at FROM (
    SELECT changed_at, changed_by FROM feature_flag_changes
    WHERE flag = 'read_from_last_status'
    ORDER BY change_no DESC
    LIMIT 1
) last
WHERE changed_by = 'perf_diff';

-- name: shared_tokens
-- $1 earliest time. Devices whose token two kiosks have used since then, the latest first.
SELECT d.device_id, s.last_at FROM shared_tokens s JOIN devices d USING (device_no)
WHERE s.last_at >= $1 AND d.revoked_at IS NULL
ORDER BY s.last_at DESC;

-- name: rows
-- $1 a table's quoted name. Its approximate number of rows; null if there is no such table.
SELECT greatest(reltuples, 0)::float8 FROM pg_class WHERE oid = to_regclass($1);

-- name: failing_messages
-- $1: messages that were due before this time count as failing, $2: messages that were given up since count.
SELECT route, count(*) FILTER (WHERE given_up_at IS NULL) AS waiting,
       count(*) FILTER (WHERE given_up_at IS NOT NULL) AS given_up, min(created_at) AS since,
       (array_agg(last_error ORDER BY notification_no DESC) FILTER (WHERE last_error IS NOT NULL))[1] AS error
FROM notifications
WHERE delivered_at IS NULL AND created_at < $1 AND (given_up_at IS NULL OR given_up_at > $2)
GROUP BY route ORDER BY route;

-- name: opening_hours
-- $1 now. The hours of sites, and of silences that have not ended.
SELECT 'site ' || site AS whose, hours, zone FROM sites WHERE hours IS NOT NULL
UNION ALL
SELECT 'silence ' || silence_id, hours, zone FROM silences WHERE hours IS NOT NULL AND (until IS NULL OR until > $1)
ORDER BY whose;
