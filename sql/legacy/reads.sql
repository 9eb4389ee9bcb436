-- The queries of the old system before it had device_last_status: a window function over the whole history picks the newest
-- heartbeat of each device. They are kept for comparison and as a fallback. They read heartbeat_history, which has
-- device_id, as the old table had.

-- name: offline
-- The devices whose newest heartbeat is from before $1.
SELECT device_id, alias, last_ts
FROM (
    SELECT h.device_id, d.alias, h.ts AS last_ts,
           row_number() OVER (PARTITION BY h.device_id ORDER BY h.ts DESC) AS nth
    FROM heartbeat_history h JOIN devices d USING (device_id)
) newest
WHERE nth = 1 AND last_ts < $1
ORDER BY last_ts;

-- name: unity_down
-- The devices whose newest heartbeat is from $1 or later, and says that Unity is not running.
SELECT device_id, alias, last_ts, unity_running
FROM (
    SELECT h.device_id, d.alias, h.ts AS last_ts, h.unity_running,
           row_number() OVER (PARTITION BY h.device_id ORDER BY h.ts DESC) AS nth
    FROM heartbeat_history h JOIN devices d USING (device_id)
) newest
WHERE nth = 1 AND unity_running = false AND last_ts >= $1
ORDER BY last_ts DESC;

-- The queries below run while read_from_last_status is off. They use the same window function, and return the columns
-- of the fast reads. They work with the numbers of devices and labels, and join the texts to the remaining rows only. A
-- device was last seen when its last heartbeat arrived. Its content is that of the newest heartbeat by newer_content:
-- the heartbeat with the latest ts, unless the device's clock was set back after that ts. These queries see neither
-- late heartbeats, which are in late_heartbeats until the nightly run, nor a second heartbeat of one bucket.
--
-- Measured with 500 devices, 7 days (5,000,000 rows), one of two shared cores and 16 MB of work_mem: offline 2.2 to 6 s,
-- unity-down 0.4 to 0.8 s, one device 0.03 to 0.1 s. The two queries above, run alternately with these, took 5.7 to 9 s
-- each. With the default 4 MB of work_mem the sort of offline takes 4.7 to 10 s.

-- name: list_offline
-- Devices that were last seen before $1, but not within $2 (a tstzmultirange as text); the longest silence first.
-- $3: end of the history (inclusive); later rows exist only if a daemon's clock was wrong.
-- $4: start of the history; a device that is silent for longer than the retention is inactive.
-- $5: the limit.
-- $6, $7: the page starts after the device that was last seen at $6 and has the device_id $7.
-- $8: only these devices (device_no[]); null for all.
-- `total` counts the devices of all pages.
SELECT * FROM (
SELECT d.device_id, d.name, d.alias, c.ts AS last_ts, h.heard_at, c.received_at, c.clock_wrong,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, c.ip, c.battery_pct, c.unity_running,
       nullif(l.agent_version, '') AS agent_version, d.device_no, count(*) OVER () AS total
FROM (
    SELECT device_no, ts, received_at, bucket, uptime_s, clock_wrong,
           row_number() OVER (PARTITION BY device_no ORDER BY ts DESC) AS nth,
           max(received_at) OVER (PARTITION BY device_no) AS heard_at
    FROM device_heartbeats
    WHERE ts >= $4 AND ts <= $3 AND ($8::int[] IS NULL OR device_no = ANY($8))
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
-- Devices that were last seen at $1 or later and whose Unity is not running; the device that was seen last comes first.
-- $2: end of the history (inclusive).
-- $3: start of the history, eight days before $1, because a queue may be a week old.
-- $4: the limit.
-- $5, $6: the page starts after the device that was last seen at $5 and has the device_id $6.
-- $7: only these devices (device_no[]); null for all.
SELECT * FROM (
SELECT d.device_id, d.name, d.alias, c.ts AS last_ts, h.heard_at, c.received_at, c.clock_wrong,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, c.ip, c.battery_pct, c.unity_running,
       nullif(l.unity_pkg_version, '') AS unity_pkg_version, nullif(l.agent_version, '') AS agent_version,
       d.device_no, count(*) OVER () AS total
FROM (
    SELECT device_no, ts, received_at, bucket, uptime_s, clock_wrong,
           row_number() OVER (PARTITION BY device_no ORDER BY ts DESC) AS nth,
           max(received_at) OVER (PARTITION BY device_no) AS heard_at
    FROM device_heartbeats
    WHERE ts >= $3 AND ts <= $2 AND ($7::int[] IS NULL OR device_no = ANY($7))
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
-- $1 device_id; $2 end of the history (inclusive); $3 a device last seen before this time is inactive. A device whose whole
-- history is archived looks as if it was never seen.
SELECT d.device_id, d.name, d.alias, d.site, d.tags, d.model, d.manufacturer, d.android_version, d.sdk_int,
       d.patch_level, d.build_id, d.created_at, d.revoked_at, c.ts AS last_ts, h.heard_at, c.received_at,
       {{content: c.$column | nullif(l.$column, '') AS $column}}, c.clock_wrong,
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
