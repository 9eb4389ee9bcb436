-- Reads for operators. Times are arguments, so that a read can be repeated. `status = 'ok'` leaves out revoked devices,
-- and is the condition of both indexes; triggers keep alias and status equal to those in devices. heard_at decides
-- whether a device is online, last_ts is the time of its last status.

-- name: fleet
-- $1, $2: the condition for offline, as in offline_all; $3: the earliest heard_at of a device that counts as Unity down
-- (now - 24 h); $4: the earliest heard_at of a device that counts as online, whatever the blackouts were. A device last
-- heard before $4 that is not offline is `unknown`. `unity_down_online` counts all devices that are not offline.
SELECT (SELECT count(*) FROM devices WHERE revoked_at IS NULL) AS devices,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND heard_at >= $4) AS online,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
          AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange) AS offline,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND heard_slot <= floor(extract(epoch FROM $4::timestamptz) / 300)::int
          AND heard_at < $4 AND (heard_at >= $1 OR heard_at <@ $2::text::tstzmultirange)) AS unknown,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND unity_running = false AND heard_at >= $3) AS unity_down,
       (SELECT count(*) FROM device_last_status
        WHERE status = 'ok' AND unity_running = false AND heard_at >= $3
          AND (heard_at >= $1 OR heard_at <@ $2::text::tstzmultirange)) AS unity_down_online,
       (SELECT count(*) FROM device_last_status WHERE status = 'inactive') AS inactive,
       (SELECT count(*) FROM devices d WHERE revoked_at IS NULL
          AND NOT EXISTS (SELECT FROM device_last_status s WHERE s.device_no = d.device_no)) AS never_seen;

-- name: offline_by_cause
-- $1 the earliest last heartbeat: devices that have been silent for longer are inactive. One row for each cause of the
-- outages that have not ended.
SELECT o.cause, count(*) AS devices
FROM device_outages o JOIN devices d USING (device_no)
WHERE o.until IS NULL AND o.since >= $1 AND d.revoked_at IS NULL
GROUP BY o.cause;

-- name: device_page
-- $1: the last device_id of the previous page ('' to start), $2: the limit. Revoked devices are listed, too.
SELECT device_no, device_id, name, alias, site, tags, revoked_at IS NOT NULL AS revoked
FROM devices
WHERE device_id > $1
ORDER BY device_id
LIMIT $2;

-- name: device_page_among
-- As device_page; $3, $4: the sites and the tag, as in `numbers`.
SELECT device_no, device_id, name, alias, site, tags, revoked_at IS NOT NULL AS revoked
FROM devices
WHERE device_id > $1 AND ($3::text[] IS NULL OR site = ANY($3)) AND ($4::text IS NULL OR $4 = ANY(tags))
ORDER BY device_id
LIMIT $2;

-- name: statuses
-- $1 device_no[].
SELECT device_no, last_ts, heard_at, received_at, {{content: s.$column}}, clock_wrong, status
FROM device_last_status s
WHERE device_no = ANY($1::int[]);

-- name: device
-- $1 device_id.
SELECT d.device_id, d.name, d.alias, d.site, d.tags, d.model, d.manufacturer, d.android_version, d.sdk_int,
       d.patch_level, d.build_id, d.created_at, d.revoked_at, s.last_ts, s.heard_at, s.received_at, {{content: s.$column}}, s.clock_wrong,
       CASE WHEN d.revoked_at IS NULL THEN coalesce(s.status, 'never_seen') ELSE 'revoked' END AS status
FROM devices d LEFT JOIN device_last_status s USING (device_no)
WHERE d.device_id = $1;

-- name: offline_all
-- Devices that were last seen before $1, but not within $2 (a tstzmultirange as text, from nexhb/devices/presence.py);
-- $3: the limit. The rows are in the order of the index: the caller sorts a complete list in half the time that
-- PostgreSQL needs, which copies every row for the sort. The index is on heard_slot (five minutes) and not on heard_at,
-- because the slot changes only with every fifth heartbeat, so that the other updates stay HOT.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, agent_version, device_no
FROM device_last_status
WHERE status = 'ok'
  AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
  AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange
ORDER BY heard_slot
LIMIT $3;

-- name: offline
-- $1, $2: as in offline_all; $3: the limit. The longest silence first; the page starts after the device that was last
-- seen at $4 and has the device_id $5. The rows are sorted slot by slot, and only as many slots are read as the page
-- needs. `total` counts the devices of all pages, in the same snapshot.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, agent_version, device_no,
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

-- name: offline_among
-- As `offline`, of the devices $6 (device_no[]) only. A site or a tag has few devices: their rows are read by their key.
SELECT * FROM (
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, agent_version, device_no,
       count(*) OVER () AS total
FROM device_last_status
WHERE status = 'ok' AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange AND device_no = ANY($6::int[])
) x
WHERE (heard_at, device_id COLLATE "C") > ($4::timestamptz, $5::text)
ORDER BY heard_at, device_id COLLATE "C"
LIMIT $3;

-- name: unity_down_all
-- $1 the earliest heard_at (now - 24 h), $2 the limit; in the order of the index, as in offline_all.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, unity_pkg_version, agent_version, device_no
FROM device_last_status
WHERE unity_running = false AND status = 'ok' AND heard_at >= $1
ORDER BY device_no
LIMIT $2;

-- name: unity_down
-- $1 the earliest heard_at, $2 the limit. The latest heard_at first; the page starts after the device with the heard_at
-- $3 and the device_id $4. `total` counts the devices of all pages.
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, unity_pkg_version, agent_version, device_no,
       (SELECT count(*) FROM device_last_status
        WHERE unity_running = false AND status = 'ok' AND heard_at >= $1) AS total
FROM device_last_status
WHERE unity_running = false AND status = 'ok' AND heard_at >= $1
  AND (heard_at, device_id COLLATE "C") < ($3::timestamptz, $4::text)
ORDER BY heard_at DESC, device_id COLLATE "C" DESC
LIMIT $2;

-- name: unity_down_among
-- As `unity_down`, of the devices $5 (device_no[]) only.
SELECT * FROM (
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, unity_pkg_version, agent_version, device_no,
       count(*) OVER () AS total
FROM device_last_status
WHERE unity_running = false AND status = 'ok' AND heard_at >= $1 AND device_no = ANY($5::int[])
) x
WHERE (heard_at, device_id COLLATE "C") < ($3::timestamptz, $4::text)
ORDER BY heard_at DESC, device_id COLLATE "C" DESC
LIMIT $2;

-- name: numbers
-- $1: the sites of the devices, null for all and none; $2: a tag that the devices have, null for any.
SELECT coalesce(array_agg(device_no), '{}') FROM devices
WHERE revoked_at IS NULL AND ($1::text[] IS NULL OR site = ANY($1)) AND ($2::text IS NULL OR $2 = ANY(tags));

-- name: sites_of
-- $1 device_no[]. Without a site in the whole fleet, the index on devices.site is empty, and no row is read.
SELECT device_no, site FROM devices WHERE device_no = ANY($1::int[]) AND site IS NOT NULL;

-- name: ongoing_outages
-- $1 device_no[]. Since when these devices have been silent and why, as far as the watcher has recorded it.
SELECT device_no, since, cause, incident_id
FROM device_outages
WHERE device_no = ANY($1::int[]) AND until IS NULL;

-- name: ongoing_unity_down
-- $1 device_no[]. Since when the Unity app of these devices does not run, as far as the watcher has recorded it.
SELECT s.device_no, s.unity_since AS since, m.incident_id
FROM device_state s
LEFT JOIN incident_devices m ON m.device_no = s.device_no AND m.kind = 'unity_down' AND m.left_at IS NULL
WHERE s.device_no = ANY($1::int[]) AND s.unity = 'down';

-- name: troubles
-- $1 device_id. Why a request of the device was last refused, and since when two kiosks share its token.
SELECT r.refused_at, r.status, r.reason, r.field, s.since, s.last_at, s.evidence::text AS evidence
FROM devices d LEFT JOIN device_refusals r USING (device_no) LEFT JOIN shared_tokens s USING (device_no)
WHERE d.device_id = $1;

-- name: device_no
-- $1 device_id.
SELECT device_no FROM devices WHERE device_id = $1;

-- name: history
-- $1 device_no; $2 from (inclusive), $3 to (exclusive); $4 the limit; $5: only buckets below this number. Newest first.
-- The times select the partitions. The buckets (in seconds since 2020-01-01; a bucket is up to an hour long) select the
-- rows by each partition's key, in the right order; the next page starts below the last bucket.
SELECT h.ts, h.received_at, h.clock_wrong, {{content: h.$column | nullif(l.$column, '') AS $column}}, h.bucket
FROM device_heartbeats h LEFT JOIN heartbeat_labels l USING (label_no)
WHERE h.device_no = $1
  AND h.ts >= $2 AND h.ts < $3
  AND h.bucket > floor(extract(epoch FROM $2::timestamptz))::bigint - 1577836800 - 3600
  AND h.bucket <= floor(extract(epoch FROM $3::timestamptz))::bigint - 1577836800
  AND h.bucket < $5::bigint
ORDER BY h.bucket DESC
LIMIT $4;
