-- The daily partitions. Which tables are partitions is read from PostgreSQL's catalog, because a table's name does not
-- prove that it is a partition.

-- name: attached
-- Every partition of device_heartbeats with its bounds, from PostgreSQL's catalog.
SELECT c.relname AS name,
       pg_get_expr(c.relpartbound, c.oid) AS bounds,
       i.inhdetachpending AS detach_pending,
       EXISTS (SELECT FROM pg_constraint s
               WHERE s.conrelid = c.oid AND s.contype = 'c' AND s.conname LIKE '%\_sealed') AS sealed
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'device_heartbeats'::regclass
ORDER BY c.relname;

-- name: follow_tablespace
-- Until the end of the transaction, create new tables and indexes in the parent's tablespace. Without this, CREATE
-- TABLE (LIKE …) and CREATE INDEX would use the session's default_tablespace.
SELECT set_config('default_tablespace', coalesce(
    (SELECT t.spcname FROM pg_class c JOIN pg_tablespace t ON t.oid = c.reltablespace
     WHERE c.oid = 'device_heartbeats'::regclass), ''), true);

-- name: register
-- $1 name, $2 range_start, $3 range_end. An existing row is corrected.
INSERT INTO hb_partitions (partition_name, range_start, range_end) VALUES ($1, $2, $3)
ON CONFLICT (partition_name) DO UPDATE
SET range_start = excluded.range_start, range_end = excluded.range_end, state = 'active', dropped_at = NULL,
    counted_at = NULL, frozen_at = NULL, reason = NULL, failed_at = NULL;

-- name: recorded
-- What hb_partitions records of each partition, newest first, and whether its table exists and is attached.
SELECT p.partition_name, p.range_start, p.range_end, p.state, p.reason, p.row_count,
       coalesce(pg_total_relation_size(to_regclass(quote_ident(p.partition_name))), p.bytes_size) AS bytes_size,
       to_regclass(quote_ident(p.partition_name)) IS NOT NULL AS present,
       EXISTS (SELECT FROM pg_inherits
               WHERE inhparent = 'device_heartbeats'::regclass
                 AND inhrelid = to_regclass(quote_ident(p.partition_name))) AS attached,
       p.checksum_sha256, p.archive_url, p.archive_bytes, p.created_at, p.counted_at, p.frozen_at, p.archived_at,
       p.verified_at, p.failed_at, p.drilled_at, p.restored_at, p.dropped_at
FROM hb_partitions p
ORDER BY p.range_start DESC;

-- name: reason_not_to_create
-- $1 range_start, $2 range_end of a day that has no attached partition. Returns why the day must not get a partition;
-- no row if it may. A table that is detached, or about to be, will be archived. A restored day that somebody dropped is
-- still in its archive.
SELECT CASE WHEN state <> 'active' THEN state
            WHEN to_regclass(quote_ident(partition_name)) IS NOT NULL THEN 'detached'
            ELSE 'dropped' END AS reason
FROM hb_partitions
WHERE range_start < $2 AND range_end > $1
  AND (state <> 'active' OR archive_url IS NOT NULL OR to_regclass(quote_ident(partition_name)) IS NOT NULL)
ORDER BY range_start
LIMIT 1;

-- name: late
-- The number of late heartbeats, by day (UTC).
SELECT (ts AT TIME ZONE 'UTC')::date AS day, count(*) AS rows FROM late_heartbeats GROUP BY 1;

-- name: archived
-- $1 name, $2 row_count, $3 archive_bytes, $4 checksum_sha256, $5 archive_url, $6 now. Records that the archive was
-- stored and verified.
UPDATE hb_partitions
SET state = 'archived', row_count = $2, archive_bytes = $3, checksum_sha256 = $4, archive_url = $5,
    archived_at = $6, verified_at = $6, counted_at = $6, reason = NULL, failed_at = NULL
WHERE partition_name = $1;

-- name: archive_failed
-- $1 name, $2 reason, $3 now. Records the failure; the table is kept.
UPDATE hb_partitions SET state = 'archive_failed', reason = $2, failed_at = $3 WHERE partition_name = $1;

-- name: state_for_drop
-- $1 name. The row stays locked until the table is dropped.
SELECT state, row_count FROM hb_partitions WHERE partition_name = $1 FOR UPDATE;

-- name: dropped
-- $1 name, $2 now, $3 the table's size before the drop.
UPDATE hb_partitions SET state = 'dropped', dropped_at = $2, bytes_size = $3 WHERE partition_name = $1;

-- name: counted
-- $1 name, $2 row_count, $3 now.
UPDATE hb_partitions
SET row_count = $2, counted_at = $3, bytes_size = pg_total_relation_size(to_regclass(quote_ident(partition_name)))
WHERE partition_name = $1;

-- name: frozen
-- $1 name, $2 now.
UPDATE hb_partitions SET frozen_at = $2 WHERE partition_name = $1;

-- name: is_attached
-- $1 name.
SELECT EXISTS (SELECT FROM pg_inherits
               WHERE inhparent = 'device_heartbeats'::regclass AND inhrelid = to_regclass(quote_ident($1)));

-- name: is_sealed
-- $1 name.
SELECT EXISTS (SELECT FROM pg_constraint
               WHERE conrelid = to_regclass(quote_ident($1)) AND contype = 'c' AND conname LIKE '%\_sealed');

-- name: size
-- $1 name.
SELECT pg_total_relation_size(to_regclass(quote_ident($1)));

-- name: correct_ledger
-- $1 day, $2 the number of rows that were counted as written but are duplicates.
INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated) VALUES ($1, 0, -$2::bigint, $2)
ON CONFLICT (day, slot) DO UPDATE SET
    written = l.written + excluded.written, deduplicated = l.deduplicated + excluded.deduplicated;

-- name: fold_ledger
-- Merges the rows of each day before $1. One row per day is enough once no more heartbeats are accepted for that day.
WITH folded AS (DELETE FROM ingest_ledger WHERE day < $1 AND slot <> 0 RETURNING day, written, deduplicated)
INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
SELECT day, 0, sum(written), sum(deduplicated) FROM folded GROUP BY day
ON CONFLICT (day, slot) DO UPDATE SET
    written = l.written + excluded.written, deduplicated = l.deduplicated + excluded.deduplicated;
