-- What is asked of NexMDM's own database, in short read-only transactions, with TimeZone UTC.
--
-- Its versions differ in their columns. A name inside LATERAL is the table's column where it has one, else that of the
-- row of nulls before it.

-- name: shape
-- What is there; whether the heartbeats can be read in the order of their time, which takes an index that begins with it.
SELECT to_regclass('devices') IS NOT NULL AS devices,
       to_regclass('device_heartbeats') IS NOT NULL AS heartbeats,
       current_database() AS database,
       clock_timestamp() AS clock,
       (SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass('device_heartbeats')) AS partitioned,
       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
               WHERE i.indrelid = to_regclass('device_heartbeats') AND a.attname = 'ts'
                 AND i.indisvalid AND i.indpred IS NULL) AS by_time,
       ARRAY(SELECT attname FROM pg_attribute
        WHERE attrelid = to_regclass('devices') AND attnum > 0 AND NOT attisdropped) AS device_columns,
       ARRAY(SELECT attname FROM pg_attribute
        WHERE attrelid = to_regclass('device_heartbeats') AND attnum > 0 AND NOT attisdropped) AS heartbeat_columns;

-- name: system
-- Which server it is, as long as it lives: a restored copy of it is the same.
SELECT system_identifier::text FROM pg_control_system();

-- name: standing
-- Whether there are devices with a bcrypt hash alone (by the index of token_id), and whether this is a standby.
SELECT (SELECT EXISTS (SELECT FROM devices v WHERE token_id IS NULL) FROM (SELECT NULL::text AS token_id) missing)
           AS hashes,
       pg_is_in_recovery() AS standby, pg_last_xact_replay_timestamp() AS replayed, clock_timestamp() AS clock;

-- name: devices
-- $1 from behind this id, $2 how many, $3 token_id[]: of these (null: of all), $4 true: only those with a bcrypt hash alone.
SELECT x.*
FROM (SELECT NULL::text AS token_hash, NULL::text AS token_id, NULL::timestamptz AS token_revoked_at,
             NULL::text AS model, NULL::text AS manufacturer, NULL::text AS android_version, NULL::integer AS sdk_int,
             NULL::text AS build_id, NULL::timestamptz AS created_at) missing
CROSS JOIN LATERAL (
    SELECT id::text AS id, alias::text AS alias, token_hash::text AS token_hash, token_id::text AS token_id,
           token_revoked_at::timestamptz AS token_revoked_at, model::text AS model, manufacturer::text AS manufacturer,
           android_version::text AS android_version, sdk_int::bigint AS sdk_int, build_id::text AS build_id,
           created_at::timestamptz AS created_at
    FROM devices v
    WHERE v.id > $1 AND ($3::text[] IS NULL OR token_id = ANY($3::text[])) AND (NOT $4::boolean OR token_id IS NULL)
    ORDER BY v.id LIMIT $2
) x;

-- name: count
-- $1 from (included), $2 to (excluded).
SELECT count(*) FROM device_heartbeats WHERE ts >= $1::timestamp AND ts < $2::timestamp;

-- name: outside
-- $1, $2. Whether there are rows from before the one, and from behind the other.
SELECT EXISTS (SELECT FROM device_heartbeats WHERE ts < $1::timestamp) AS older,
       EXISTS (SELECT FROM device_heartbeats WHERE ts >= $2::timestamp) AS newer;

-- name: next_by_time
-- $1 from (included), $2 to (excluded), $3 and $4: behind this ts and hb_id, $5 how many.
SELECT x.*
FROM (SELECT NULL::text AS ip, NULL::integer AS battery_pct, NULL::boolean AS plugged, NULL::integer AS temp_c,
             NULL::text AS network_type, NULL::text AS ssid, NULL::integer AS signal_dbm, NULL::integer AS uptime_s,
             NULL::integer AS ram_used_mb, NULL::text AS unity_pkg_version, NULL::boolean AS unity_running,
             NULL::text AS agent_version) missing
CROSS JOIN LATERAL (
    SELECT hb_id::bigint AS hb_id, device_id::text AS device_id, ts::timestamptz AS ts, ip::text AS ip,
           battery_pct::bigint AS battery_pct, plugged, temp_c::double precision AS temp_c,
           network_type::text AS network_type, ssid::text AS ssid, signal_dbm::bigint AS signal_dbm,
           uptime_s::bigint AS uptime_s, ram_used_mb::bigint AS ram_used_mb,
           unity_pkg_version::text AS unity_pkg_version, unity_running, agent_version::text AS agent_version
    FROM device_heartbeats h
    WHERE h.ts >= $1::timestamp AND h.ts < $2::timestamp AND h.ts >= $3::timestamp
      AND (h.ts, h.hb_id) > ($3::timestamp, $4::bigint)
    ORDER BY h.ts, h.hb_id LIMIT $5
) x;

-- name: next_by_device
-- $1 from (included), $2 to (excluded), $3 to $5: behind this device_id, ts and hb_id, $6 how many. The order of the key
-- of its partitioned table, which has no index on ts.
SELECT x.*
FROM (SELECT NULL::text AS ip, NULL::integer AS battery_pct, NULL::boolean AS plugged, NULL::integer AS temp_c,
             NULL::text AS network_type, NULL::text AS ssid, NULL::integer AS signal_dbm, NULL::integer AS uptime_s,
             NULL::integer AS ram_used_mb, NULL::text AS unity_pkg_version, NULL::boolean AS unity_running,
             NULL::text AS agent_version) missing
CROSS JOIN LATERAL (
    SELECT hb_id::bigint AS hb_id, device_id::text AS device_id, ts::timestamptz AS ts, ip::text AS ip,
           battery_pct::bigint AS battery_pct, plugged, temp_c::double precision AS temp_c,
           network_type::text AS network_type, ssid::text AS ssid, signal_dbm::bigint AS signal_dbm,
           uptime_s::bigint AS uptime_s, ram_used_mb::bigint AS ram_used_mb,
           unity_pkg_version::text AS unity_pkg_version, unity_running, agent_version::text AS agent_version
    FROM device_heartbeats h
    WHERE h.ts >= $1::timestamp AND h.ts < $2::timestamp
      AND (h.device_id, h.ts, h.hb_id) > ($3::varchar, $4::timestamp, $5::bigint)
    ORDER BY h.device_id, h.ts, h.hb_id LIMIT $6
) x;

-- name: day
-- $1 from (included), $2 to (excluded), $3 seconds of a bucket, $4 device_id[] that nexhb took. Rows, those of other
-- devices, and how many different device and bucket there are of those that nexhb took.
SELECT coalesce(sum(b.rows), 0)::bigint AS rows,
       coalesce(sum(b.rows) FILTER (WHERE t.device_id IS NULL), 0)::bigint AS refused,
       count(*) FILTER (WHERE t.device_id IS NOT NULL) AS keys
FROM (SELECT device_id::text AS device_id, floor(extract(epoch FROM ts) / $3::int) AS bucket, count(*) AS rows
      FROM device_heartbeats WHERE ts >= $1::timestamp AND ts < $2::timestamp
      GROUP BY 1, 2) b
LEFT JOIN unnest($4::text[]) t (device_id) USING (device_id);

-- name: keys
-- $1 from (included), $2 to (excluded), $3 seconds of a bucket, $4 device_id[]. Each device and bucket (seconds since
-- 1970) once.
SELECT DISTINCT device_id::text AS device_id, (floor(extract(epoch FROM ts) / $3::int) * $3::int)::bigint AS bucket
FROM device_heartbeats
WHERE device_id = ANY($4::varchar[]) AND ts >= $1::timestamp AND ts < $2::timestamp;
