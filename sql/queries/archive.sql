-- Archiving and restoring days. `$table` stands for a table's quoted name, because a statement's parameters cannot name
-- a table. A plain row has the columns of heartbeat_history. A packed row is the same heartbeat as an archive stores
-- it: columns that follow from others are left out, or stored as values that hardly change (docs/archive.md has the
-- sizes).

-- name: session
-- The settings that affect how values are printed, so that the same rows give the same bytes on every server. work_mem
-- is the memory for one sort.
SET datestyle = 'ISO, YMD';
SET extra_float_digits = 1;
SET timezone = 'UTC';
SET work_mem = '64MB';
SET jit = off;

-- name: spelled_out
-- The plain rows of a table: with the device and the labels spelled out. LEFT JOIN, so that a row whose device or label
-- is missing is not lost.
SELECT d.device_id, h.ts, h.received_at, h.clock_wrong,
       {{content: h.$column | nullif(l.$column, '') AS $column}}, h.device_no, h.bucket
FROM $table h
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no);

-- name: packed
-- The stream of an archive: the plain `$rows` (a table, or a query in parentheses), packed, in key order. Columns that
-- rarely change from row to row come first, then the columns that change. received_at, uptime_s and bucket are empty if
-- they follow from ts and received_after_us, up_since or $bucket_seconds. They are stored if one of the times is
-- outside the years that a bucket can represent (or infinite), so that no row is lost to an error of arithmetic.
-- `$added`: the columns that formats after the second one have added.
SELECT device_id, device_no, agent_version, unity_pkg_version, network_type, ssid, ip, clock_wrong, plugged,
       CASE WHEN follows THEN date_trunc('second', ts) - uptime_s * interval '1 second' END AS up_since,
       CASE WHEN NOT follows THEN received_at END AS received_at,
       CASE WHEN NOT follows THEN uptime_s END AS uptime_s,
       CASE WHEN follows
            THEN nullif(bucket, (floor(date_part('epoch', ts))::bigint - 1577836800) / $bucket_seconds * $bucket_seconds)
            ELSE bucket END AS bucket,
       battery_pct, ts,
       CASE WHEN follows THEN (date_part('epoch', received_at - ts) * 1000000)::bigint END AS received_after_us,
       ram_used_mb, temp_c, signal_dbm, unity_running$added
FROM (SELECT *, least(ts, received_at) >= timestamptz '2020-01-01 00:00:00+00'
                AND greatest(ts, received_at) < timestamptz '2088-01-01 00:00:00+00' AS follows
      FROM $rows r) p
ORDER BY p.device_no, p.bucket;

-- name: span
SELECT min(ts) AS min_ts, max(ts) AS max_ts FROM $table;

-- name: make_plain
-- A table with the plain columns.
CREATE TABLE $table (
    device_id         text,
    ts                timestamptz NOT NULL,
    received_at       timestamptz NOT NULL,
    clock_wrong       boolean NOT NULL,
    {{content: $column $type}},
    device_no         integer NOT NULL,
    bucket            integer NOT NULL
);

-- name: make_packed
-- The table into which an archive's stream is loaded before it is unpacked.
CREATE TEMP TABLE nexhb_packed (
    device_id         text,
    device_no         integer NOT NULL,
    bucket            integer,
    ts                timestamptz NOT NULL,
    received_at       timestamptz,
    received_after_us bigint,
    clock_wrong       boolean NOT NULL,
    up_since          timestamptz,
    {{content: $column $type}}
);

-- name: unpack
-- The reverse of `packed`: insert the rows of `$packed` into the plain table `$plain`.
INSERT INTO $plain (device_id, ts, received_at, clock_wrong, battery_pct, plugged, temp_c, network_type, ssid, ip,
                    signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, device_no,
                    bucket$added)
SELECT device_id, ts, coalesce(received_at, ts + received_after_us * interval '1 microsecond'), clock_wrong,
       battery_pct, plugged, temp_c, network_type, ssid, ip, signal_dbm,
       coalesce(uptime_s, date_part('epoch', date_trunc('second', ts) - up_since)::integer), ram_used_mb,
       unity_pkg_version, unity_running, agent_version, device_no,
       coalesce(bucket, (floor(date_part('epoch', ts))::bigint - 1577836800) / $bucket_seconds * $bucket_seconds)$added
FROM $packed;

-- name: plain_again
-- The rows of a plain table that was loaded from an archive of the first format, as they were in that archive.
-- `$columns` are the columns of the first format.
SELECT $columns FROM $table ORDER BY device_no, bucket;

-- name: restore_devices
-- Add the devices that this database does not know (any more). They get no token, so they cannot send.
INSERT INTO devices (device_id)
SELECT DISTINCT device_id FROM $table p
WHERE device_id IS NOT NULL AND NOT EXISTS (SELECT FROM devices d WHERE d.device_id = p.device_id)
ORDER BY device_id
ON CONFLICT DO NOTHING;

-- name: restore_strangers
-- Heartbeats whose device was already deleted when they were archived, and whose device number belongs to another
-- device here: add a device for them, so that they do not appear in the other device's history.
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
-- `$plain`: the plain table; `$table`: the day's table. Device numbers are those of this database, whatever numbers the
-- archive has.
INSERT INTO $table (ts, received_at, device_no, bucket, label_no, clock_wrong, {{measured: $column}})
SELECT p.ts, p.received_at, coalesce(d.device_no, p.device_no), p.bucket, l.label_no, p.clock_wrong,
       {{measured: p.$column}}
FROM $plain p
LEFT JOIN devices d ON d.device_id = coalesce(p.device_id, 'archived number ' || p.device_no)
JOIN heartbeat_labels l
  ON (l.agent_version, l.unity_pkg_version, l.network_type, l.ssid, l.sections)
   = (coalesce(p.agent_version, ''), coalesce(p.unity_pkg_version, ''), coalesce(p.network_type, ''),
      coalesce(p.ssid, ''), 31);

-- name: find
-- $1 a day's start (UTC). The day, archived or not, then its supplements.
SELECT p.partition_name, p.range_start, p.range_end, p.state, p.archive_url, p.checksum_sha256,
       0::bigint AS supplement_no
FROM hb_partitions p
WHERE p.range_start <= $1 AND p.range_end > $1
UNION ALL
SELECT p.partition_name, p.range_start, p.range_end, p.state, s.archive_url, s.checksum_sha256, s.supplement_no
FROM hb_partitions p JOIN archive_supplements s USING (partition_name)
WHERE p.range_start <= $1 AND p.range_end > $1
ORDER BY supplement_no;

-- name: current
-- The archives that count. If a day's table exists because it was restored, or because its archive was found damaged
-- before the drop, the archive is obsolete: the rows are in the table, and will be archived again.
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

-- name: between
-- $1 from, $2 to, $3 the limit. The archives of the days in this time that the database no longer has, newest day first,
-- each with its supplements.
WITH days AS (
    SELECT * FROM hb_partitions
    WHERE state IN ('archived', 'dropped') AND archive_url IS NOT NULL AND range_start < $2 AND range_end > $1
    ORDER BY range_start DESC LIMIT $3
)
SELECT partition_name, range_start, range_end, state, archive_url, checksum_sha256, 0::bigint AS supplement_no FROM days
UNION ALL
SELECT p.partition_name, p.range_start, p.range_end, p.state, s.archive_url, s.checksum_sha256, s.supplement_no
FROM days p JOIN archive_supplements s USING (partition_name)
ORDER BY range_start DESC, supplement_no;

-- name: drilled
-- $1 archive_url, $2 now.
UPDATE hb_partitions SET drilled_at = $2, verified_at = $2 WHERE archive_url = $1;

-- name: supplement_drilled
-- $1 archive_url, $2 now.
UPDATE archive_supplements SET drilled_at = $2, verified_at = $2 WHERE archive_url = $1;

-- name: list
-- Every archive and supplement, newest day first.
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
-- $1 name, $2 now. The day has its table again, and is not archived until it is released.
UPDATE hb_partitions
SET state = 'active', restored_at = $2, dropped_at = NULL, frozen_at = NULL, counted_at = NULL, reason = NULL,
    failed_at = NULL
WHERE partition_name = $1;

-- name: forget_supplements
-- $1 name. A restore merged the supplements' rows into the day's table, so the day's new archive contains them.
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
-- $1 range_start, $2 range_end, $3 maximum number. Oldest first, with the device_id, because an archive made by another
-- database has another number for the same device.
SELECT l.device_no, l.bucket, d.device_id
FROM late_heartbeats l LEFT JOIN devices d USING (device_no)
WHERE l.ts >= $1 AND l.ts < $2
ORDER BY l.ts, l.device_no
LIMIT $3;

-- name: late_day
-- The rows of one supplement. Heartbeats that arrive later go into the next supplement.
CREATE TEMP TABLE IF NOT EXISTS late_day (LIKE device_heartbeats);

-- name: clear_late_day
TRUNCATE late_day;

-- name: fill_late_day
-- $1 device_no[], $2 bucket[].
INSERT INTO late_day (ts, received_at, device_no, bucket, label_no, clock_wrong, {{measured: $column}})
SELECT l.ts, l.received_at, l.device_no, l.bucket, l.label_no, l.clock_wrong, {{measured: l.$column}}
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
-- $1 place, $2 maximum number (null: no limit). The archives at this place, according to the catalog; newest day first.
SELECT archive_url, checksum_sha256 FROM hb_partitions
WHERE archive_url IS NOT NULL AND starts_with(archive_url, $1)
ORDER BY range_start DESC
LIMIT $2;

-- name: supersede_day
-- $1 partition_name, $2 the manifest that counts from now on, $3 now. Supersede the day's previous archive and its
-- supplements.
INSERT INTO archive_superseded (archive_url, superseded_at)
SELECT archive_url, $3::timestamptz FROM hb_partitions WHERE partition_name = $1 AND archive_url IS NOT NULL AND archive_url <> $2
UNION
SELECT archive_url, $3::timestamptz FROM archive_supplements WHERE partition_name = $1 AND archive_url <> $2
ON CONFLICT DO NOTHING;

-- name: supersede
-- $1 archive_url, $2 now.
INSERT INTO archive_superseded (archive_url, superseded_at) VALUES ($1, $2) ON CONFLICT DO NOTHING;

-- name: not_superseded
-- $1 archive_url. Removes the mark that a later archive supersedes this one: the archive counts again.
DELETE FROM archive_superseded WHERE archive_url = $1;

-- name: urls
-- Every manifest in the catalog, including superseded ones.
SELECT archive_url, false AS superseded FROM hb_partitions WHERE archive_url IS NOT NULL
UNION ALL
SELECT archive_url, false FROM archive_supplements
UNION ALL
SELECT archive_url, true FROM archive_superseded;

-- name: overlapping
-- $1 partition_name, $2 range_start, $3 range_end. The day with this name, and the days that overlap the range.
SELECT partition_name, range_start, range_end, state, archive_url, checksum_sha256,
       to_regclass(quote_ident(partition_name)) IS NOT NULL AS present
FROM hb_partitions
WHERE partition_name = $1 OR (range_start < $3 AND range_end > $2);

-- name: adopt_day
-- $1 partition_name, $2 range_start, $3 range_end, $4 row_count, $5 archive_bytes, $6 checksum_sha256, $7 archive_url,
-- $8 when it was verified, or null. For a day that has neither an archive nor a table.
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
-- $1 partition_name, $2 archive_url, $3 checksum_sha256, $4 row_count, $5 archive_bytes, $6 now, $7 when it was
-- verified, or null.
INSERT INTO archive_supplements
    (partition_name, archive_url, checksum_sha256, row_count, archive_bytes, archived_at, verified_at)
VALUES ($1, $2, $3, $4, $5, $6, $7);

-- name: adopt_ledger
-- $1 partition_name. Complete the ledger of a database that did not receive the day's heartbeats: the audit compares
-- the archives with the ledger.
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
