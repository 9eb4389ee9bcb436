-- The import from NexMDM: the queries on nexhb's own database. Those on NexMDM's database are in nexmdm.sql.

-- name: add_devices
-- $1 device_id[], $2 alias[], $3 android_version[], $4 sdk_int[], $5 build_id[], $6 model[], $7 manufacturer[],
-- $8 created_at[], $9 revoked_at[], $10 now. Adds devices that are not known; a known device stays as it is. The alias in
-- NexMDM is the name that people gave the device; the alias that the device itself reports comes with its first heartbeat
-- here.
INSERT INTO devices (device_id, alias, name, nexmdm_name, android_version, sdk_int, build_id, model, manufacturer,
                     created_at, revoked_at)
SELECT device_id, alias, alias, alias, android_version, sdk_int, build_id, model, manufacturer,
       coalesce(created_at, $10::timestamptz), revoked_at
FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::text[], $6::text[], $7::text[], $8::timestamptz[],
            $9::timestamptz[])
    AS n (device_id, alias, android_version, sdk_int, build_id, model, manufacturer, created_at, revoked_at)
ORDER BY device_id
ON CONFLICT (device_id) DO NOTHING
RETURNING device_id;

-- name: name_devices
-- $1 device_id[], $2 NexMDM's name[] (or null). Stores names that changed in NexMDM since the last import; the first import
-- does not overwrite a name that the device already has. Rows are locked in the order of the writer's locks.
WITH due AS MATERIALIZED (
    SELECT d.device_no, n.name FROM unnest($1::text[], $2::text[]) n (device_id, name) JOIN devices d USING (device_id)
    WHERE n.name IS NOT NULL AND d.nexmdm_name IS DISTINCT FROM n.name
    ORDER BY d.device_no
    FOR NO KEY UPDATE OF d
)
UPDATE devices d SET
    name = CASE WHEN d.nexmdm_name IS NULL THEN coalesce(d.name, due.name) ELSE due.name END,
    nexmdm_name = due.name
FROM due WHERE d.device_no = due.device_no;

-- name: numbers
-- $1 device_id[].
SELECT device_id, device_no FROM devices WHERE device_id = ANY($1::text[]);

-- name: give_tokens
-- $1 device_no[], $2 fingerprint[], $3 token_sha256[] (or null), $4 bcrypt[] (or null), $5 revoked_at[], $6 now.
--
-- A credential is imported only once, whatever happened to it since: a device that was rotated must not get its old token
-- back. A credential is recognised by its fingerprint, or by its token if an earlier version recorded that. A device that
-- was rotated in nexhb gets no credential; the statement waits for a concurrent rotation.
-- A bcrypt hash that waits for its token is replaced by the token once NexMDM has learned the token. So is a hash that
-- an operator ended, if its device has no token in nexhb. A device may hold several tokens.
-- Returns `added`: the number of tokens added; `waiting`: the number of new hashes that wait for their token;
-- `revoked`: the number of tokens revoked; and `conflicting`: the devices whose token belongs to another device.
WITH given AS MATERIALIZED (
    SELECT n.*, d.revoked_at AS device_revoked_at, t.device_no IS NOT NULL AS conflicts,
           EXISTS (SELECT FROM device_tokens o WHERE o.device_no = n.device_no) AS has_token,
           EXISTS (SELECT FROM legacy_tokens l
                   WHERE l.device_no = n.device_no
                     AND (l.fingerprint IN (n.fingerprint, n.token_sha256) OR l.token_sha256 = n.token_sha256)) AS known
    FROM unnest($1::int[], $2::bytea[], $3::bytea[], $4::text[], $5::timestamptz[])
        AS n (device_no, fingerprint, token_sha256, bcrypt, revoked_at)
    JOIN devices d ON d.device_no = n.device_no AND NOT d.rotated
    LEFT JOIN device_tokens t ON t.token_sha256 = n.token_sha256 AND t.device_no <> n.device_no
    FOR KEY SHARE OF d
),
fresh AS (
    INSERT INTO legacy_tokens (device_no, fingerprint, bcrypt, token_sha256, taken_at)
    SELECT device_no, fingerprint, bcrypt, token_sha256, $6::timestamptz FROM given WHERE NOT conflicts AND NOT known
    ORDER BY device_no
    ON CONFLICT DO NOTHING
    RETURNING device_no, fingerprint, bcrypt
),
learned AS (
    UPDATE legacy_tokens l SET bcrypt = NULL, adopted_at = $6::timestamptz, token_sha256 = g.token_sha256
    FROM given g
    WHERE NOT g.conflicts AND l.device_no = g.device_no AND l.fingerprint = g.fingerprint
      AND g.token_sha256 IS NOT NULL AND (l.bcrypt IS NOT NULL OR (l.adopted_at IS NULL AND NOT g.has_token))
    RETURNING l.device_no, l.fingerprint
),
settled AS (
    UPDATE legacy_tokens l SET token_sha256 = g.token_sha256
    FROM given g
    WHERE l.device_no = g.device_no AND l.fingerprint = g.fingerprint
      AND g.token_sha256 IS NOT NULL AND l.token_sha256 IS NULL
      AND l.bcrypt IS NULL AND (l.adopted_at IS NOT NULL OR g.has_token)
),
mended AS (
    UPDATE legacy_tokens l SET fingerprint = g.fingerprint, token_sha256 = g.token_sha256
    FROM given g
    WHERE l.device_no = g.device_no AND l.fingerprint = g.token_sha256 AND l.fingerprint <> g.fingerprint
      AND NOT EXISTS (SELECT FROM legacy_tokens o WHERE o.device_no = g.device_no AND o.fingerprint = g.fingerprint)
),
added AS (
    INSERT INTO device_tokens (token_sha256, device_no, revoked_at)
    SELECT g.token_sha256, g.device_no, coalesce(g.revoked_at, g.device_revoked_at)
    FROM given g
    JOIN (SELECT device_no, fingerprint FROM fresh UNION ALL SELECT device_no, fingerprint FROM learned) f
        USING (device_no, fingerprint)
    WHERE g.token_sha256 IS NOT NULL
    ORDER BY g.token_sha256
    ON CONFLICT DO NOTHING
    RETURNING 1
),
revoked AS (
    UPDATE device_tokens t SET revoked_at = g.revoked_at
    FROM given g
    WHERE t.token_sha256 = g.token_sha256 AND t.device_no = g.device_no AND t.revoked_at IS NULL
      AND g.revoked_at IS NOT NULL
    RETURNING 1
)
SELECT (SELECT count(*) FROM added) AS added,
       (SELECT count(*) FROM fresh WHERE bcrypt IS NOT NULL) AS waiting,
       (SELECT count(*) FROM revoked) AS revoked,
       (SELECT coalesce(array_agg(device_no), '{}') FROM given WHERE conflicts) AS conflicting;

-- name: note_devices
-- $1 source, $2 device_no[], $3 last_seen[]. Records that the source has these devices now. Returns `known`: how many
-- of these devices were already imported from the source; and `older`: for how many of them an earlier import read a
-- later last_seen. If `older` is not 0, the source is an older copy, or lags.
WITH here AS (
    SELECT * FROM unnest($2::int[], $3::timestamptz[]) AS n (device_no, last_seen)
),
noted AS (
    INSERT INTO legacy_devices AS d (source, device_no, last_seen)
    SELECT $1, device_no, last_seen FROM here ORDER BY device_no
    ON CONFLICT (source, device_no) DO UPDATE SET
        last_seen = greatest(d.last_seen, excluded.last_seen), revoked_at = NULL
    WHERE d.last_seen IS DISTINCT FROM greatest(d.last_seen, excluded.last_seen) OR d.revoked_at IS NOT NULL
)
SELECT count(*) AS known, count(*) FILTER (WHERE h.last_seen < d.last_seen) AS older
FROM here h JOIN legacy_devices d ON d.source = $1 AND d.device_no = h.device_no;

-- name: count_imported
-- $1 source. The number of devices that were imported from this source, without revoked devices.
SELECT count(*) FROM legacy_devices l JOIN devices d USING (device_no) WHERE l.source = $1 AND d.revoked_at IS NULL;

-- name: deleted
-- $1 source, $2: the device_no[] that the source has now. Returns the other devices that were imported from the source
-- and are not revoked. `done_before`: whether an import has revoked the device before; `own_token`: whether the device
-- has a token that did not come from NexMDM.
SELECT d.device_id, d.device_no, l.revoked_at IS NOT NULL AS done_before,
       EXISTS (SELECT FROM device_tokens t
               WHERE t.device_no = d.device_no AND t.revoked_at IS NULL
                 AND NOT EXISTS (SELECT FROM legacy_tokens g
                                 WHERE g.device_no = t.device_no
                                   AND t.token_sha256 IN (g.fingerprint, g.token_sha256))) AS own_token
FROM legacy_devices l
JOIN devices d USING (device_no)
LEFT JOIN unnest($2::int[]) here (device_no) USING (device_no)
WHERE l.source = $1 AND d.revoked_at IS NULL AND here.device_no IS NULL
ORDER BY d.device_id;

-- name: revoked_as_deleted
-- $1 source, $2 device_no, $3 now.
UPDATE legacy_devices SET revoked_at = $3 WHERE source = $1 AND device_no = $2;

-- name: source
-- $1 source. How earlier imports read the source's times, and `since`: the first day that they imported, null if they
-- imported none.
SELECT s.timezone, s.repeated_hour,
       (SELECT min(day) FROM legacy_days d WHERE d.source = s.source)::timestamp AT TIME ZONE 'UTC' AS since
FROM legacy_sources s WHERE s.source = $1;

-- name: note_source
-- $1 source, $2 timezone, $3 repeated_hour.
INSERT INTO legacy_sources AS s (source, timezone, repeated_hour) VALUES ($1, $2, $3)
ON CONFLICT (source) DO UPDATE SET timezone = excluded.timezone, repeated_hour = excluded.repeated_hour
WHERE (s.timezone, s.repeated_hour) IS DISTINCT FROM (excluded.timezone, excluded.repeated_hour);

-- name: days
-- $1 source. The progress of each day of the source.
SELECT day, after_device, after_ts, after_hb, written, deduplicated, source_rows, finished_at, copies FROM legacy_days
WHERE source = $1;

-- name: advance
-- $1 source, $2 day, $3 to $5 the last row read, $6 the number of new rows, $7 the day's table. Runs in the transaction of
-- the rows: stores the progress of the day, updates the ledger, and marks the day's table to be counted and frozen
-- again.
WITH day AS (
    INSERT INTO legacy_days AS d (source, day, after_device, after_ts, after_hb, written)
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (source, day) DO UPDATE SET
        after_device = excluded.after_device, after_ts = excluded.after_ts, after_hb = excluded.after_hb,
        written = d.written + excluded.written, finished_at = NULL
),
marks AS (
    UPDATE hb_partitions SET counted_at = NULL, frozen_at = NULL
    WHERE partition_name = $7 AND $6 > 0 AND (counted_at IS NOT NULL OR frozen_at IS NOT NULL)
)
INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
SELECT $2, 0, $6, 0 WHERE $6 > 0
ON CONFLICT (day, slot) DO UPDATE SET written = l.written + excluded.written;

-- name: finish
-- $1 source, $2 day, $3 rows of the day in the source, $4 deduplicated rows, $5 how many of the deduplicated rows the
-- ledger lacks, $6 now, $7 copies: how many of the deduplicated rows are heartbeats that nexhb received itself, with
-- another ts.
WITH day AS (
    UPDATE legacy_days SET source_rows = $3, deduplicated = $4, finished_at = $6, copies = $7
    WHERE source = $1 AND day = $2
)
INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
SELECT $2, 0, 0, $5::bigint WHERE $5::bigint <> 0
ON CONFLICT (day, slot) DO UPDATE SET deduplicated = l.deduplicated + excluded.deduplicated;

-- name: present
-- $1 from (included), $2 to (excluded), $3 device_no[]. The number of rows of these devices.
SELECT count(*) FROM device_heartbeats h JOIN unnest($3::int[]) d (device_no) USING (device_no)
WHERE h.ts >= $1 AND h.ts < $2;

-- name: missing
-- $1 from (included), $2 to (excluded), $3 device_no[], $4 bucket[]. Returns `missing`: how many of these keys have no
-- row; and `imported`: how many have a row that an import wrote.
SELECT count(*) FILTER (WHERE h.device_no IS NULL) AS missing,
       count(*) FILTER (WHERE h.received_at = h.ts AND NOT h.clock_wrong) AS imported
FROM unnest($3::int[], $4::int[]) k (device_no, bucket)
LEFT JOIN device_heartbeats h
    ON h.device_no = k.device_no AND h.bucket = k.bucket AND h.ts >= $1 AND h.ts < $2;

-- name: has_own
-- $1 day. Whether nexhb itself received heartbeats of this day or the day before.
SELECT EXISTS (
    SELECT FROM (SELECT day, sum(written) AS written FROM ingest_ledger WHERE day BETWEEN $1::date - 1 AND $1::date
                 GROUP BY day) l
    WHERE l.written > coalesce((SELECT sum(d.written) FROM legacy_days d WHERE d.day = l.day), 0));

-- name: count_staged
-- Without statistics the planner assumes that hb_stage is nearly empty, and drop_copies uses the index for each row: 1,800
-- rows against a day of 300 devices with 1,440 heartbeats each took 3 to 4 s; with statistics it takes 0.2 to 0.5 s (2 busy
-- cores).
ANALYZE hb_stage;

-- name: drop_copies
-- $1: the earliest ts of the staged rows; $2: the latest. Deletes the staged rows of heartbeats that nexhb itself
-- received too. A heartbeat in nexhb counts as the same as a staged row if it has all the values that NexMDM stores,
-- and was made at most 24 hours before NexMDM received it (the agent keeps a heartbeat so long) or up to five minutes
-- after (NexMDM's clock may differ). The uptime distinguishes successive heartbeats, so a heartbeat without an uptime
-- is never recognised. NexMDM truncates temperatures to whole degrees.
DELETE FROM hb_stage s
USING device_heartbeats h, heartbeat_labels l, heartbeat_labels m
WHERE h.ts BETWEEN $1::timestamptz - interval '24 hours' AND $2::timestamptz + interval '5 minutes'
  AND h.device_no = s.device_no AND h.uptime_s = s.uptime_s AND h.ram_used_mb = s.ram_used_mb
  AND h.ts BETWEEN s.ts - interval '24 hours' AND s.ts + interval '5 minutes'
  AND h.received_at <> h.ts AND NOT h.clock_wrong
  AND (h.battery_pct, h.plugged, h.ip) IS NOT DISTINCT FROM (s.battery_pct, s.plugged, s.ip)
  AND trunc(h.temp_c) IS NOT DISTINCT FROM trunc(s.temp_c)
  AND coalesce(s.signal_dbm, h.signal_dbm) IS NOT DISTINCT FROM h.signal_dbm
  AND coalesce(s.unity_running, h.unity_running) IS NOT DISTINCT FROM h.unity_running
  AND l.label_no = h.label_no AND m.label_no = s.label_no AND m.ssid IN ('', l.ssid)
  AND (l.agent_version, l.unity_pkg_version, l.network_type) = (m.agent_version, m.unity_pkg_version, m.network_type)
RETURNING s.device_no, s.bucket;

-- name: waiting
-- $1 token_sha256. Returns `hashes`: how many bcrypt hashes wait for their token (an index contains only these);
-- `newest`: since when the newest of them waits; and `known`: whether this token is known by now, because it may have
-- been adopted before the daemon was notified.
SELECT count(*) AS hashes, max(taken_at) AS newest,
       EXISTS (SELECT FROM device_tokens WHERE token_sha256 = $1) AS known
FROM legacy_tokens WHERE bcrypt IS NOT NULL;

-- name: known_tokens
-- $1 token_sha256[].
SELECT token_sha256 FROM device_tokens WHERE token_sha256 = ANY($1::bytea[]);

-- name: hashes
-- $1 device_id, or null for all.
SELECT t.device_no, t.fingerprint, t.bcrypt, d.device_id
FROM legacy_tokens t JOIN devices d USING (device_no)
WHERE t.bcrypt IS NOT NULL AND ($1::text IS NULL OR d.device_id = $1)
ORDER BY t.device_no;

-- name: adopt
-- $1 device_no, $2 fingerprint, $3 token_sha256, $4 now. Returns no row if another daemon has already adopted the
-- token, or if the device was rotated in the meantime.
WITH adopted AS (
    UPDATE legacy_tokens SET bcrypt = NULL, adopted_at = $4, token_sha256 = $3
    WHERE device_no = $1 AND fingerprint = $2 AND bcrypt IS NOT NULL
    RETURNING device_no
)
INSERT INTO device_tokens (token_sha256, device_no, revoked_at)
SELECT $3, device_no, d.revoked_at FROM adopted JOIN devices d USING (device_no)
ON CONFLICT DO NOTHING
RETURNING device_no;
