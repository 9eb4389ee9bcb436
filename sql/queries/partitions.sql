-- The days, read from the catalog: names prove nothing.

-- name: attached
-- Every partition of device_heartbeats with its bounds, as the catalog has them.
SELECT c.relname AS name,
       pg_get_expr(c.relpartbound, c.oid) AS bounds,
       i.inhdetachpending AS detach_pending
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'device_heartbeats'::regclass
ORDER BY c.relname;

-- name: record
-- $1 name, $2 range_start, $3 range_end. A row left by a run that was cut short is made true again.
INSERT INTO hb_partitions (partition_name, range_start, range_end) VALUES ($1, $2, $3)
ON CONFLICT (partition_name) DO UPDATE SET state = 'active', dropped_at = NULL;

-- name: known
-- What is written of each partition, newest first.
SELECT p.partition_name, p.range_start, p.range_end, p.state, p.row_count,
       coalesce(pg_total_relation_size(to_regclass(p.partition_name)), p.bytes_size) AS bytes_size,
       to_regclass(p.partition_name) IS NOT NULL AS present,
       p.checksum_sha256, p.archive_url, p.created_at, p.archived_at, p.dropped_at
FROM hb_partitions p
ORDER BY p.range_start DESC;
