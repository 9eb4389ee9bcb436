-- What the old system asked before it had device_last_status: the newest heartbeat of each device, picked by a window
-- function over the whole history. Kept to be compared with, and to fall back on. Over heartbeat_history, so that it
-- has device_id as the old table had.

-- name: offline
-- $1 cutoff.
SELECT device_id, alias, last_ts
FROM (
    SELECT h.device_id, d.alias, h.ts AS last_ts,
           row_number() OVER (PARTITION BY h.device_id ORDER BY h.ts DESC) AS nth
    FROM heartbeat_history h JOIN devices d USING (device_id)
) newest
WHERE nth = 1 AND last_ts < $1
ORDER BY last_ts;

-- name: unity_down
-- $1 seen since.
SELECT device_id, alias, last_ts, unity_running
FROM (
    SELECT h.device_id, d.alias, h.ts AS last_ts, h.unity_running,
           row_number() OVER (PARTITION BY h.device_id ORDER BY h.ts DESC) AS nth
    FROM heartbeat_history h JOIN devices d USING (device_id)
) newest
WHERE nth = 1 AND unity_running = false AND last_ts >= $1
ORDER BY last_ts DESC;

-- What is answered while read_from_last_status is off: the same window, in the shape of the fast answers. By number and
-- not by text, the texts joined to what is left. A device is there if anything of it was received lately; what is known
-- of it is its newest heartbeat by newer_content: the one with the latest ts, unless its clock was set back after that.
-- Late heartbeats, which wait beside their day for the nightly run, are not in it, and neither is a second heartbeat of
-- one bucket.
--
-- 500 devices, 7 days (5,000,000 rows), one of two cores that others use too, 16 MB of work_mem: offline 2.2 to 6 s,
-- unity-down 0.4 to 0.8 s, one device 0.03 to 0.1 s. The two above, asked in turn with them: 5.7 to 9 s, unity-down too.
-- With the usual 4 MB of work_mem the sort of offline takes 4.7 to 10 s.

-- name: list_offline
-- $1 last heard before, $2 but not within (a tstzmultirange as text), $3 history to (included): past it lie only rows of
-- a daemon whose clock was wrong, $4 history from: who is silent for longer than the retention is inactive, $5 how many.
-- The longest silent first; total counts the others too.
-- From behind the one that was last heard at $6 with the device_id $7.
SELECT * FROM (
SELECT d.device_id, d.name, d.alias, c.ts AS last_ts, h.heard_at, c.received_at, c.clock_wrong,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, c.ip, c.battery_pct, c.unity_running,
       nullif(l.agent_version, '') AS agent_version, count(*) OVER () AS total
FROM (
    SELECT device_no, ts, received_at, bucket, uptime_s, clock_wrong,
           row_number() OVER (PARTITION BY device_no ORDER BY ts DESC) AS nth,
           max(received_at) OVER (PARTITION BY device_no) AS heard_at
    FROM device_heartbeats
    WHERE ts >= $4 AND ts <= $3
) h
JOIN devices d USING (device_no)
LEFT JOIN LATERAL (
    SELECT b.ts, b.bucket
    FROM set_back_after(h.device_no, h.ts, h.received_at, h.uptime_s, h.clock_wrong, $4) b
    WHERE h.heard_at > h.received_at
) b ON true
JOIN device_heartbeats c
  ON c.device_no = h.device_no AND c.ts = coalesce(b.ts, h.ts) AND c.bucket = coalesce(b.bucket, h.bucket)
LEFT JOIN heartbeat_labels l ON l.label_no = c.label_no
WHERE h.nth = 1 AND h.heard_at < $1 AND NOT h.heard_at <@ $2::text::tstzmultirange AND h.heard_at >= $4
  AND d.revoked_at IS NULL
) x
WHERE (x.heard_at, x.device_id COLLATE "C") > ($6::timestamptz, $7::text)
ORDER BY x.heard_at, x.device_id COLLATE "C"
LIMIT $5;

-- name: list_unity_down
-- $1 heard since, $2 history to (included), $3 history from: eight days before $1, as a queue may be a week old, $4 how
-- many. The last heard first.
-- From behind the one that was last heard at $5 with the device_id $6.
SELECT * FROM (
SELECT d.device_id, d.name, d.alias, c.ts AS last_ts, h.heard_at, c.received_at, c.clock_wrong,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, c.ip, c.battery_pct, c.unity_running,
       nullif(l.unity_pkg_version, '') AS unity_pkg_version, nullif(l.agent_version, '') AS agent_version,
       count(*) OVER () AS total
FROM (
    SELECT device_no, ts, received_at, bucket, uptime_s, clock_wrong,
           row_number() OVER (PARTITION BY device_no ORDER BY ts DESC) AS nth,
           max(received_at) OVER (PARTITION BY device_no) AS heard_at
    FROM device_heartbeats
    WHERE ts >= $3 AND ts <= $2
) h
JOIN devices d USING (device_no)
LEFT JOIN LATERAL (
    SELECT b.ts, b.bucket
    FROM set_back_after(h.device_no, h.ts, h.received_at, h.uptime_s, h.clock_wrong, $3) b
    WHERE h.heard_at > h.received_at
) b ON true
JOIN device_heartbeats c
  ON c.device_no = h.device_no AND c.ts = coalesce(b.ts, h.ts) AND c.bucket = coalesce(b.bucket, h.bucket)
LEFT JOIN heartbeat_labels l ON l.label_no = c.label_no
WHERE h.nth = 1 AND h.heard_at >= $1 AND c.unity_running = false AND d.revoked_at IS NULL
) x
WHERE (x.heard_at, x.device_id COLLATE "C") < ($5::timestamptz, $6::text)
ORDER BY x.heard_at DESC, x.device_id COLLATE "C" DESC
LIMIT $4;

-- name: device
-- $1 device_id, $2 history to (included), $3 inactive where it was last heard before. Of one whose history is all
-- archived nothing is known here.
SELECT d.device_id, d.name, d.alias, d.model, d.manufacturer, d.android_version, d.sdk_int, d.patch_level, d.build_id,
       d.created_at, d.revoked_at, c.ts AS last_ts, h.heard_at, c.received_at, c.battery_pct, c.plugged, c.temp_c,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, c.ip, c.signal_dbm, c.uptime_s,
       c.ram_used_mb, nullif(l.unity_pkg_version, '') AS unity_pkg_version, c.unity_running,
       nullif(l.agent_version, '') AS agent_version, c.clock_wrong,
       CASE WHEN d.revoked_at IS NOT NULL THEN 'revoked' WHEN h.heard_at IS NULL THEN 'never_seen'
            WHEN h.heard_at < $3 THEN 'inactive' ELSE 'ok' END AS status
FROM devices d
LEFT JOIN (
    SELECT *, row_number() OVER (PARTITION BY device_no ORDER BY ts DESC) AS nth,
           max(received_at) OVER (PARTITION BY device_no) AS heard_at
    FROM device_heartbeats
    WHERE device_no = (SELECT device_no FROM devices WHERE device_id = $1) AND ts <= $2
) h ON h.device_no = d.device_no AND h.nth = 1
LEFT JOIN LATERAL (
    SELECT b.ts, b.bucket
    FROM set_back_after(h.device_no, h.ts, h.received_at, h.uptime_s, h.clock_wrong, '-infinity') b
    WHERE h.heard_at > h.received_at
) b ON true
LEFT JOIN device_heartbeats c
  ON c.device_no = h.device_no AND c.ts = coalesce(b.ts, h.ts) AND c.bucket = coalesce(b.bucket, h.bucket)
LEFT JOIN heartbeat_labels l ON l.label_no = c.label_no
WHERE d.device_id = $1;
