-- Reads for operators. Times are arguments, so that a read can be repeated. `status = 'ok'` leaves out revoked devices,
-- and is the condition of both indexes; triggers keep alias and status equal to those in devices. heard_at decides
-- whether a device is online, last_ts is the time of its last status.

-- name: fleet
-- $1, $2: the condition for offline, as in offline_all; $3: the earliest heard_at of a device that counts as Unity down
-- (now - 24 h); $4: the earliest heard_at of a device that counts as online, whatever the blackouts were. A device last
-- heard before $4 that is not offline is `unknown`.
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
        WHERE status = 'ok' AND unity_running = false AND heard_at >= greatest($3, $4)) AS unity_down_online,
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
-- As device_page; $3, $4, $5: the sites, the tag and the rate limit, as in `numbers`; $6: a text that device_id, name or
-- alias contain, '' for any; $7: whether they are revoked, null for both.
SELECT device_no, device_id, name, alias, site, tags, revoked_at IS NOT NULL AS revoked
FROM devices d
WHERE device_id > $1 AND ($3::text[] IS NULL OR site = ANY($3)) AND ($4::text IS NULL OR $4 = ANY(tags))
  AND ($5::timestamptz IS NULL OR EXISTS (SELECT 1 FROM device_refusals r WHERE r.device_no = d.device_no
                                          AND r.status = 429 AND r.refused_at >= $5))
  AND ($6::text = '' OR strpos(lower(device_id), lower($6)) > 0 OR strpos(lower(name), lower($6)) > 0
       OR strpos(lower(alias), lower($6)) > 0)
  AND ($7::bool IS NULL OR (revoked_at IS NOT NULL) = $7)
ORDER BY device_id
LIMIT $2;

-- name: seen
-- $1 device_no[]. Those that have a last status.
SELECT coalesce(array_agg(device_no), '{}') FROM device_last_status WHERE device_no = ANY($1::int[]);

-- name: devices_of
-- $1 device_no[].
SELECT device_no, device_id, name, alias, site, tags, revoked_at IS NOT NULL AS revoked
FROM devices WHERE device_no = ANY($1::int[]);

-- name: filtered
-- $1 status; $2 multirange[]: only devices whose heard_at is in each of them; $3: a heard_slot after which no heard_at is
-- in them; $4: whether Unity must be down; $5 device_no[], null for all; $6: a text as in device_page_among; $7: the battery
-- must be below this; $8 clock_wrong; $9, $10 versions; $11, $12: versions that the device's must be below, as int[]. $13:
-- the column to sort by, descending if it begins with `-`; the page starts after the key $14 and the device_id $15; $16
-- the limit; $17: whether to count the devices of all pages. It runs with plan_cache_mode = force_custom_plan, so that
-- the conditions for which an argument is null are left out, and the indexes serve the others: a list of silent devices
-- reads these only. Otherwise the table is read once for a page, without an index, because an index that the columns of
-- these conditions need would end the HOT updates.
WITH matching AS NOT MATERIALIZED (
    SELECT device_no, device_id,
           CASE $13::text WHEN 'heard_at' THEN (extract(epoch FROM heard_at) * 1000000)::bigint
                          WHEN '-heard_at' THEN -(extract(epoch FROM heard_at) * 1000000)::bigint
                          WHEN 'battery_pct' THEN battery_pct::bigint
                          ELSE 0 END AS key
    FROM device_last_status
    WHERE status = $1 AND heard_slot <= $3::int AND heard_at <@ ALL ($2::text[]::tstzmultirange[])
      AND (NOT $4::bool OR unity_running = false)
      AND ($5::int[] IS NULL OR device_no = ANY($5))
      AND ($6::text = '' OR strpos(lower(device_id), lower($6)) > 0 OR strpos(lower(name), lower($6)) > 0
           OR strpos(lower(alias), lower($6)) > 0)
      AND ($7::int IS NULL OR battery_pct < $7) AND ($8::bool IS NULL OR clock_wrong = $8)
      AND ($9::text IS NULL OR agent_version = $9) AND ($10::text IS NULL OR unity_pkg_version = $10)
      AND ($11::int[] IS NULL
           OR string_to_array(substring(agent_version FROM '^v?([0-9]{1,9}(?:[.][0-9]{1,9})*)'), '.')::int[] < $11)
      AND ($12::int[] IS NULL
           OR string_to_array(substring(unity_pkg_version FROM '^v?([0-9]{1,9}(?:[.][0-9]{1,9})*)'), '.')::int[] < $12)
      AND ($13::text <> 'battery_pct' OR battery_pct IS NOT NULL)
)
SELECT device_no, device_id, key, CASE WHEN $17::bool THEN (SELECT count(*) FROM matching) END AS total
FROM matching
WHERE (key, device_id COLLATE "C") > ($14::bigint, $15::text)
ORDER BY key, device_id COLLATE "C"
LIMIT $16;

-- name: plan_each
-- Until the end of the transaction, plan each statement for its arguments.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true);

-- name: offline_rows
-- $1 device_no[].
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, agent_version, device_no
FROM device_last_status WHERE device_no = ANY($1::int[]);

-- name: unity_down_rows
-- $1 device_no[].
SELECT device_id, name, alias, last_ts, heard_at, received_at, clock_wrong, network_type, ssid, ip, battery_pct,
       unity_running, unity_pkg_version, agent_version, device_no
FROM device_last_status WHERE device_no = ANY($1::int[]);

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
-- because the slot changes only with every fifth heartbeat, so the other updates stay HOT.
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
-- $1: the sites of the devices, null for all and none; $2: a tag that the devices have, null for any; $3: only devices
-- that the rate limit has refused since this time, null for all.
SELECT coalesce(array_agg(device_no), '{}') FROM devices d
WHERE revoked_at IS NULL AND ($1::text[] IS NULL OR site = ANY($1)) AND ($2::text IS NULL OR $2 = ANY(tags))
  AND ($3::timestamptz IS NULL OR EXISTS (SELECT 1 FROM device_refusals r WHERE r.device_no = d.device_no
                                          AND r.status = 429 AND r.refused_at >= $3));

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
