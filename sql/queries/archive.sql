-- A day on its way out and back. `$table` stands for a table's quoted name out of the catalog: a statement's parameters
-- cannot name one. Plain is a heartbeat as people read it (heartbeat_history); packed is the same as an archive has it:
-- what follows from other columns is left out or written as what hardly changes (docs/archive.md has the bytes).

-- name: session
-- What the text of a value depends on, so that the same rows are the same bytes on every server; memory for one sort.
SET datestyle = 'ISO, YMD';
SET extra_float_digits = 1;
SET timezone = 'UTC';
SET work_mem = '64MB';
SET jit = off;

-- name: spelled_out
-- A table's rows, plain: every column, device and label spelled out. LEFT: a row whose device or label is missing is a
-- row all the same.
SELECT d.device_id, h.ts, h.received_at, h.clock_wrong, h.battery_pct, h.plugged, h.temp_c,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, h.ip, h.signal_dbm, h.uptime_s,
       h.ram_used_mb, nullif(l.unity_pkg_version, '') AS unity_pkg_version, h.unity_running,
       nullif(l.agent_version, '') AS agent_version, h.device_no, h.bucket
FROM $table h
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no);

-- name: packed
-- The stream of an archive: plain `$rows` (a table, or a query in brackets), packed, in the order of the key. What stays
-- the same from row to row stands together, then what changes. received_at, uptime_s and bucket are empty where they
-- follow from ts and received_after_us, up_since, $bucket_seconds; spelled out where one of the times lies outside the
-- years that a bucket can count (an infinite one, too), so that no row is lost to arithmetic.
SELECT device_id, device_no, agent_version, unity_pkg_version, network_type, ssid, ip, clock_wrong, plugged,
       CASE WHEN follows THEN date_trunc('second', ts) - uptime_s * interval '1 second' END AS up_since,
       CASE WHEN NOT follows THEN received_at END AS received_at,
       CASE WHEN NOT follows THEN uptime_s END AS uptime_s,
       CASE WHEN follows
            THEN nullif(bucket, (floor(date_part('epoch', ts))::bigint - 1577836800) / $bucket_seconds * $bucket_seconds)
            ELSE bucket END AS bucket,
       battery_pct, ts,
       CASE WHEN follows THEN (date_part('epoch', received_at - ts) * 1000000)::bigint END AS received_after_us,
       ram_used_mb, temp_c, signal_dbm, unity_running
FROM (SELECT *, least(ts, received_at) >= timestamptz '2020-01-01 00:00:00+00'
                AND greatest(ts, received_at) < timestamptz '2088-01-01 00:00:00+00' AS follows
      FROM $rows r) p
ORDER BY p.device_no, p.bucket;

-- name: span
SELECT min(ts) AS min_ts, max(ts) AS max_ts FROM $table;

-- name: make_plain
-- The archive's columns as a table of its own, as people read them.
CREATE TABLE $table (
    device_id         text,
    ts                timestamptz NOT NULL,
    received_at       timestamptz NOT NULL,
    clock_wrong       boolean NOT NULL,
    battery_pct       smallint,
    plugged           boolean,
    temp_c            real,
    network_type      text,
    ssid              text,
    ip                inet,
    signal_dbm        smallint,
    uptime_s          integer,
    ram_used_mb       integer,
    unity_pkg_version text,
    unity_running     boolean,
    agent_version     text,
    device_no         integer NOT NULL,
    bucket            integer NOT NULL
);

-- name: make_packed
-- What an archive's stream is read into, before it is unpacked.
CREATE TEMP TABLE nexhb_packed (
    device_id         text,
    device_no         integer NOT NULL,
    agent_version     text,
    unity_pkg_version text,
    network_type      text,
    ssid              text,
    ip                inet,
    clock_wrong       boolean NOT NULL,
    plugged           boolean,
    up_since          timestamptz,
    received_at       timestamptz,
    uptime_s          integer,
    bucket            integer,
    battery_pct       smallint,
    ts                timestamptz NOT NULL,
    received_after_us bigint,
    ram_used_mb       integer,
    temp_c            real,
    signal_dbm        smallint,
    unity_running     boolean
);

-- name: unpack
-- The opposite of `packed`: into the plain table `$plain`, out of `$packed`.
INSERT INTO $plain (device_id, ts, received_at, clock_wrong, battery_pct, plugged, temp_c, network_type, ssid, ip,
                    signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, device_no, bucket)
SELECT device_id, ts, coalesce(received_at, ts + received_after_us * interval '1 microsecond'), clock_wrong,
       battery_pct, plugged, temp_c, network_type, ssid, ip, signal_dbm,
       coalesce(uptime_s, date_part('epoch', date_trunc('second', ts) - up_since)::integer), ram_used_mb,
       unity_pkg_version, unity_running, agent_version, device_no,
       coalesce(bucket, (floor(date_part('epoch', ts))::bigint - 1577836800) / $bucket_seconds * $bucket_seconds)
FROM $packed;

-- name: plain_again
-- A plain table as the stream that it was made from, where that was one of the first format.
SELECT * FROM $table ORDER BY device_no, bucket;

-- name: restore_devices
-- Devices that this database does not know (any more): without a token, so none of them can send.
INSERT INTO devices (device_id)
SELECT DISTINCT device_id FROM $table p
WHERE device_id IS NOT NULL AND NOT EXISTS (SELECT FROM devices d WHERE d.device_id = p.device_id)
ORDER BY device_id
ON CONFLICT DO NOTHING;

-- name: restore_strangers
-- Heartbeats of a device that was gone when they were archived: where its number is another device's here, a device of
-- their own, so that nobody gets their history.
INSERT INTO devices (device_id)
SELECT DISTINCT 'archived number ' || device_no FROM $table p
WHERE device_id IS NULL AND EXISTS (SELECT FROM devices d WHERE d.device_no = p.device_no)
ON CONFLICT DO NOTHING;

-- name: restore_labels
INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
SELECT DISTINCT coalesce(agent_version, '') AS a, coalesce(unity_pkg_version, '') AS u, coalesce(network_type, '') AS n,
                coalesce(ssid, '') AS s
FROM $table p
WHERE NOT EXISTS (
    SELECT FROM heartbeat_labels l
    WHERE (l.agent_version, l.unity_pkg_version, l.network_type, l.ssid, l.sections)
        = (coalesce(p.agent_version, ''), coalesce(p.unity_pkg_version, ''), coalesce(p.network_type, ''),
           coalesce(p.ssid, ''), 31))
ORDER BY a, u, n, s
ON CONFLICT DO NOTHING;

-- name: restore_rows
-- $plain: the plain table; $table: the day's. A device's number is this database's own, whatever it was in the archive's.
INSERT INTO $table (ts, received_at, device_no, bucket, label_no, uptime_s, ram_used_mb, temp_c, battery_pct,
                    signal_dbm, plugged, unity_running, clock_wrong, ip)
SELECT p.ts, p.received_at, coalesce(d.device_no, p.device_no), p.bucket, l.label_no, p.uptime_s, p.ram_used_mb,
       p.temp_c, p.battery_pct, p.signal_dbm, p.plugged, p.unity_running, p.clock_wrong, p.ip
FROM $plain p
LEFT JOIN devices d ON d.device_id = coalesce(p.device_id, 'archived number ' || p.device_no)
JOIN heartbeat_labels l
  ON (l.agent_version, l.unity_pkg_version, l.network_type, l.ssid, l.sections)
   = (coalesce(p.agent_version, ''), coalesce(p.unity_pkg_version, ''), coalesce(p.network_type, ''),
      coalesce(p.ssid, ''), 31);

-- name: find
-- $1 a day's start (UTC). The day, archived or not, then the supplements of its archive.
SELECT p.partition_name, p.range_start, p.range_end, p.state, p.archive_url, p.checksum_sha256,
       0::bigint AS supplement_no
FROM hb_partitions p
WHERE p.range_start <= $1 AND p.range_end > $1
UNION ALL
SELECT p.partition_name, p.range_start, p.range_end, p.state, s.archive_url, s.checksum_sha256, s.supplement_no
FROM hb_partitions p JOIN archive_supplements s USING (partition_name)
WHERE p.range_start <= $1 AND p.range_end > $1
ORDER BY supplement_no;

-- name: every
-- Archives that count. That of a day whose table is there, restored or found rotten before its drop, is of the past: the
-- rows are in the table, and are archived anew.
WITH days AS (
    SELECT * FROM hb_partitions
    WHERE state IN ('archived', 'dropped') OR to_regclass(quote_ident(partition_name)) IS NULL
)
SELECT p.partition_name, p.range_start, p.range_end, p.state, p.archive_url, p.checksum_sha256,
       0::bigint AS supplement_no
FROM days p WHERE p.archive_url IS NOT NULL
UNION ALL
SELECT p.partition_name, p.range_start, p.range_end, p.state, s.archive_url, s.checksum_sha256, s.supplement_no
FROM days p JOIN archive_supplements s USING (partition_name)
ORDER BY range_start, supplement_no;

-- name: drilled
-- $1 archive_url, $2 now.
UPDATE hb_partitions SET drilled_at = $2, verified_at = $2 WHERE archive_url = $1;

-- name: supplement_drilled
-- $1 archive_url, $2 now.
UPDATE archive_supplements SET drilled_at = $2, verified_at = $2 WHERE archive_url = $1;

-- name: list
-- Every archive, supplements too, newest day first.
SELECT p.range_start, p.partition_name, p.state, 0::bigint AS supplement_no, p.archive_url, p.checksum_sha256,
       p.row_count, p.archive_bytes, p.archived_at, p.verified_at, p.drilled_at, p.restored_at, p.reason, p.failed_at
FROM hb_partitions p
WHERE p.archive_url IS NOT NULL OR p.state = 'archive_failed'
UNION ALL
SELECT p.range_start, p.partition_name, p.state, s.supplement_no, s.archive_url, s.checksum_sha256, s.row_count,
       s.archive_bytes, s.archived_at, s.verified_at, NULL, NULL, NULL, NULL
FROM hb_partitions p JOIN archive_supplements s USING (partition_name)
ORDER BY range_start DESC, supplement_no;

-- name: restored
-- $1 name, $2 now. Back in the table, and not archived again until it is released.
UPDATE hb_partitions
SET state = 'active', restored_at = $2, dropped_at = NULL, frozen_at = NULL, counted_at = NULL, reason = NULL,
    failed_at = NULL
WHERE partition_name = $1;

-- name: forget_supplements
-- $1 name. A restore brought their rows into the day's table, and the archive that was made of it has them.
DELETE FROM archive_supplements WHERE partition_name = $1;

-- name: release
-- $1 a day's start (UTC).
UPDATE hb_partitions SET restored_at = NULL
WHERE range_start <= $1 AND range_end > $1 AND restored_at IS NOT NULL
RETURNING partition_name;

-- name: verified
-- $1 archive_url, $2 now.
UPDATE hb_partitions SET verified_at = $2 WHERE archive_url = $1;

-- name: supplement_verified
-- $1 archive_url, $2 now.
UPDATE archive_supplements SET verified_at = $2 WHERE archive_url = $1;

-- name: late_keys
-- $1 range_start, $2 range_end, $3 how many at most. The oldest first. An archive of another database has the device
-- under another number: it is known by its device_id.
SELECT l.device_no, l.bucket, d.device_id
FROM late_heartbeats l LEFT JOIN devices d USING (device_no)
WHERE l.ts >= $1 AND l.ts < $2
ORDER BY l.ts, l.device_no
LIMIT $3;

-- name: late_day
-- The rows of one supplement, chosen once: what comes meanwhile waits for the next.
CREATE TEMP TABLE IF NOT EXISTS late_day (LIKE device_heartbeats);

-- name: clear_late_day
TRUNCATE late_day;

-- name: fill_late_day
-- $1 device_no[], $2 bucket[].
INSERT INTO late_day
SELECT l.ts, l.received_at, l.device_no, l.bucket, l.label_no, l.uptime_s, l.ram_used_mb, l.temp_c, l.battery_pct,
       l.signal_dbm, l.plugged, l.unity_running, l.clock_wrong, l.ip
FROM late_heartbeats l JOIN unnest($1::int[], $2::int[]) AS k (device_no, bucket) USING (device_no, bucket);

-- name: add_supplement
-- $1 partition_name, $2 archive_url, $3 checksum_sha256, $4 row_count, $5 archive_bytes, $6 now.
INSERT INTO archive_supplements
    (partition_name, archive_url, checksum_sha256, row_count, archive_bytes, archived_at, verified_at)
VALUES ($1, $2, $3, $4, $5, $6, $6);

-- name: forget_late
-- $1 device_no[], $2 bucket[].
DELETE FROM late_heartbeats l USING unnest($1::int[], $2::int[]) AS k (device_no, bucket)
WHERE l.device_no = k.device_no AND l.bucket = k.bucket;

-- name: marker
-- $1 place.
SELECT marker, marked_at FROM archive_markers WHERE place = $1;

-- name: set_marker
-- $1 place, $2 marker, $3 now.
INSERT INTO archive_markers (place, marker, marked_at) VALUES ($1, $2, $3)
ON CONFLICT (place) DO UPDATE SET marker = excluded.marker, marked_at = excluded.marked_at;

-- name: archives_at
-- $1 place, $2 how many at most (null: all). Archives that the catalog has there, the newest day first.
SELECT archive_url, checksum_sha256 FROM hb_partitions
WHERE archive_url IS NOT NULL AND starts_with(archive_url, $1)
ORDER BY range_start DESC
LIMIT $2;

-- name: supersede_day
-- $1 partition_name, $2 the manifest that counts from now on, $3 now. What was the day's archive until now, and what came
-- late for it.
INSERT INTO archive_superseded (archive_url, superseded_at)
SELECT archive_url, $3::timestamptz FROM hb_partitions WHERE partition_name = $1 AND archive_url IS NOT NULL AND archive_url <> $2
UNION
SELECT archive_url, $3::timestamptz FROM archive_supplements WHERE partition_name = $1 AND archive_url <> $2
ON CONFLICT DO NOTHING;

-- name: supersede
-- $1 archive_url, $2 now.
INSERT INTO archive_superseded (archive_url, superseded_at) VALUES ($1, $2) ON CONFLICT DO NOTHING;

-- name: not_superseded
-- $1 archive_url. It counts (again).
DELETE FROM archive_superseded WHERE archive_url = $1;

-- name: urls
-- Every manifest that the catalog has, and those that it had.
SELECT archive_url, false AS superseded FROM hb_partitions WHERE archive_url IS NOT NULL
UNION ALL
SELECT archive_url, false FROM archive_supplements
UNION ALL
SELECT archive_url, true FROM archive_superseded;

-- name: around
-- $1 partition_name, $2 range_start, $3 range_end. The day of that name, and others that overlap it.
SELECT partition_name, range_start, range_end, state, archive_url, checksum_sha256,
       to_regclass(quote_ident(partition_name)) IS NOT NULL AS present
FROM hb_partitions
WHERE partition_name = $1 OR (range_start < $3 AND range_end > $2);

-- name: adopt_day
-- $1 partition_name, $2 range_start, $3 range_end, $4 row_count, $5 archive_bytes, $6 checksum_sha256, $7 archive_url,
-- $8 when it was verified, or null. A day that has no archive and no table.
INSERT INTO hb_partitions AS p (partition_name, range_start, range_end, state, row_count, archive_bytes, checksum_sha256,
                                archive_url, verified_at)
VALUES ($1, $2, $3, 'dropped', $4, $5, $6, $7, $8)
ON CONFLICT (partition_name) DO UPDATE
SET range_start = excluded.range_start, range_end = excluded.range_end, state = 'dropped', row_count = excluded.row_count,
    archive_bytes = excluded.archive_bytes, checksum_sha256 = excluded.checksum_sha256,
    archive_url = excluded.archive_url, verified_at = excluded.verified_at, reason = NULL, failed_at = NULL,
    restored_at = NULL
WHERE p.archive_url IS NULL;

-- name: adopt_supplement
-- $1 partition_name, $2 archive_url, $3 checksum_sha256, $4 row_count, $5 archive_bytes, $6 now, $7 when it was verified,
-- or null.
INSERT INTO archive_supplements
    (partition_name, archive_url, checksum_sha256, row_count, archive_bytes, archived_at, verified_at)
VALUES ($1, $2, $3, $4, $5, $6, $7);

-- name: adopt_ledger
-- $1 partition_name. The ledger of a database that never saw the day's heartbeats: the audit holds its archives against it.
INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
SELECT (p.range_start AT TIME ZONE 'UTC')::date, 0, a.rows - coalesce(w.rows, 0), 0
FROM hb_partitions p
CROSS JOIN LATERAL (SELECT p.row_count + coalesce(sum(s.row_count), 0)::bigint AS rows
                    FROM archive_supplements s WHERE s.partition_name = p.partition_name) a
CROSS JOIN LATERAL (SELECT sum(i.written)::bigint AS rows FROM ingest_ledger i
                    WHERE i.day >= (p.range_start AT TIME ZONE 'UTC')::date
                      AND i.day < (p.range_end AT TIME ZONE 'UTC')::date) w
WHERE p.partition_name = $1 AND a.rows > coalesce(w.rows, 0)
ON CONFLICT (day, slot) DO UPDATE SET written = l.written + excluded.written;
