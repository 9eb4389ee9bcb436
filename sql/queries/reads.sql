-- What operators ask. Times are arguments, so that a read can be repeated. `status = 'ok'` leaves out revoked devices by
-- index; alias and status follow devices by trigger. Who is online goes by heard_at, what is known goes by last_ts.

-- name: fleet
-- $1, $2 who is offline (below), $3 unity cutoff (now - 24 h).
SELECT (SELECT count(*) FROM devices WHERE revoked_at IS NULL) AS devices,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND (heard_at >= $1 OR heard_at <@ $2::text::tstzmultirange)) AS online,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
          AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange) AS offline,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND unity_running = false AND heard_at >= $3) AS unity_down,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND unity_running = false AND heard_at >= $3
          AND (heard_at >= $1 OR heard_at <@ $2::text::tstzmultirange)) AS unity_down_online,
       (SELECT count(*) FROM device_last_status WHERE status = 'inactive') AS inactive,
       (SELECT count(*) FROM devices d WHERE revoked_at IS NULL
          AND NOT EXISTS (SELECT FROM device_last_status s WHERE s.device_no = d.device_no)) AS never_seen;

-- name: devices
-- $1: the last device_id of the page before ('' to start), $2: how many. Revoked ones are listed and say so.
SELECT d.device_id, d.name, d.alias, s.last_ts, s.heard_at, s.received_at, s.battery_pct, s.plugged, s.temp_c,
       s.network_type, s.ssid, s.ip, s.signal_dbm, s.uptime_s, s.ram_used_mb, s.unity_pkg_version, s.unity_running, s.agent_version,
       s.clock_wrong, CASE WHEN d.revoked_at IS NULL THEN coalesce(s.status, 'never_seen') ELSE 'revoked' END AS status
FROM devices d LEFT JOIN device_last_status s USING (device_no)
WHERE d.device_id > $1
ORDER BY d.device_id
LIMIT $2;

-- name: device
-- $1 device_id.
SELECT d.device_id, d.name, d.alias, d.model, d.manufacturer, d.android_version, d.sdk_int, d.patch_level, d.build_id,
       d.created_at, d.revoked_at, s.last_ts, s.heard_at, s.received_at, s.battery_pct, s.plugged, s.temp_c,
       s.network_type, s.ssid, s.ip, s.signal_dbm, s.uptime_s, s.ram_used_mb, s.unity_pkg_version, s.unity_running,
       s.agent_version, s.clock_wrong,
       CASE WHEN d.revoked_at IS NULL THEN coalesce(s.status, 'never_seen') ELSE 'revoked' END AS status
FROM devices d LEFT JOIN device_last_status s USING (device_no)
WHERE d.device_id = $1;

-- name: offline_all
-- $1 last heard before, $2 but not within (a tstzmultirange as text: nexhb/presence.py says which times count), $3 how
-- many at most. In the order of the index: who takes all of them sorts them in half the time of PostgreSQL, which copies
-- every row to do so. The slot (five minutes) is what the index holds: it changes with every fifth heartbeat only, so
-- that the others stay HOT.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, agent_version
FROM device_last_status
WHERE status = 'ok'
  AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
  AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange
ORDER BY heard_slot
LIMIT $3;

-- name: offline
-- $1, $2 as above, $3 how many of them: the longest silent, first, from behind the one that was last heard at $4 with the
-- device_id $5. One slot after another is sorted, and no more of them
-- than it takes. total counts the others too, in the same moment.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, agent_version,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
          AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange) AS total
FROM device_last_status
WHERE status = 'ok'
  AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
  AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange
  AND heard_slot >= floor(extract(epoch FROM $4::timestamptz) / 300)::int
  AND (heard_at, device_id COLLATE "C") > ($4::timestamptz, $5::text)
ORDER BY heard_slot, heard_at, device_id COLLATE "C"
LIMIT $3;

-- name: unity_down_all
-- $1 heard since (now - 24 h), $2 how many at most; in the order of the index, as above.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, unity_pkg_version, agent_version
FROM device_last_status
WHERE unity_running = false AND status = 'ok' AND heard_at >= $1
ORDER BY device_no
LIMIT $2;

-- name: unity_down
-- $1 heard since, $2 how many of them: the newest, first, from behind the one that was last heard at $3 with the device_id
-- $4; total as above.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, unity_pkg_version, agent_version,
       (SELECT count(*) FROM device_last_status
        WHERE unity_running = false AND status = 'ok' AND heard_at >= $1) AS total
FROM device_last_status
WHERE unity_running = false AND status = 'ok' AND heard_at >= $1
  AND (heard_at, device_id COLLATE "C") < ($3::timestamptz, $4::text)
ORDER BY heard_at DESC, device_id COLLATE "C" DESC
LIMIT $2;

-- name: troubles
-- $1 device_id. What it was last refused for, and whether two kiosks share its token.
SELECT r.refused_at, r.status, r.reason, r.field, s.since, s.last_at, s.evidence::text AS evidence
FROM devices d LEFT JOIN device_refusals r USING (device_no) LEFT JOIN shared_tokens s USING (device_no)
WHERE d.device_id = $1;

-- name: device_no
-- $1 device_id.
SELECT device_no FROM devices WHERE device_id = $1;

-- name: history
-- $1 device_no, $2 from (included), $3 to (excluded), $4 how many, $5 buckets below this one; newest first. The times choose
-- the partitions; the buckets (seconds since 2020-01-01, up to an hour long) choose the rows in each one's key, in the order
-- wanted, and are what a page goes on from.
SELECT h.ts, h.received_at, h.clock_wrong, h.battery_pct, h.plugged, h.temp_c,
       nullif(l.network_type, '') AS network_type, nullif(l.ssid, '') AS ssid, h.ip, h.signal_dbm, h.uptime_s,
       h.ram_used_mb, nullif(l.unity_pkg_version, '') AS unity_pkg_version, h.unity_running,
       nullif(l.agent_version, '') AS agent_version, h.bucket
FROM device_heartbeats h LEFT JOIN heartbeat_labels l USING (label_no)
WHERE h.device_no = $1
  AND h.ts >= $2 AND h.ts < $3
  AND h.bucket > floor(extract(epoch FROM $2::timestamptz))::bigint - 1577836800 - 3600
  AND h.bucket <= floor(extract(epoch FROM $3::timestamptz))::bigint - 1577836800
  AND h.bucket < $5::bigint
ORDER BY h.bucket DESC
LIMIT $4;
