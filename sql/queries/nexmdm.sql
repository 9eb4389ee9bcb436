-- Queries on NexMDM's own database, in short read-only transactions, with TimeZone set to the time zone in which NexMDM
-- wrote its times.
--
-- NexMDM stores times in columns without a time zone. The queries compare them with timestamptz values, for which
-- PostgreSQL uses the session's TimeZone and the index; columns with a time zone work with the same queries. At the end
-- of daylight saving time, an hour occurs twice; PostgreSQL reads its times as the second pass. For rows of the first
-- pass the queries therefore subtract `length`. A row belongs to the first pass if its ts is within the time `length`
-- from `fold` (inclusive) on, and its hb_id is below `split`. AT TIME ZONE would not work: it treats CET as an
-- abbreviation without daylight saving time, while TimeZone treats it as a zone.
--
-- Versions of NexMDM differ in their columns. A name inside LATERAL refers to the table's column if the table has such
-- a column, and otherwise to the row of nulls before LATERAL.

-- name: shape
-- The tables and columns of the database. by_time: an index that begins with ts allows reading the heartbeats in that order.
SELECT to_regclass('devices') IS NOT NULL AS devices,
       to_regclass('device_heartbeats') IS NOT NULL AS heartbeats,
       current_database() AS database,
       clock_timestamp() AS clock,
       pg_is_in_recovery() AS standby,
       (SELECT atttypid = 'timestamptz'::regtype FROM pg_attribute
        WHERE attrelid = to_regclass('device_heartbeats') AND attname = 'ts') AS zoned,
       (SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass('device_heartbeats')) AS partitioned,
       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
               WHERE i.indrelid = to_regclass('device_heartbeats') AND a.attname = 'ts'
                 AND i.indisvalid AND i.indpred IS NULL) AS by_time,
       ARRAY(SELECT attname FROM pg_attribute
        WHERE attrelid = to_regclass('devices') AND attnum > 0 AND NOT attisdropped) AS device_columns,
       ARRAY(SELECT attname FROM pg_attribute
        WHERE attrelid = to_regclass('device_heartbeats') AND attnum > 0 AND NOT attisdropped) AS heartbeat_columns;

-- name: system
-- An identifier of the server, which never changes; a restored physical copy has the same identifier.
SELECT system_identifier::text FROM pg_control_system();

-- name: state
-- `hashes`: whether there are devices of which NexMDM has only a bcrypt hash (found by the index of token_id);
-- `standby`: whether this server is a standby; `replayed`: up to which time the standby has replayed commits.
SELECT (SELECT EXISTS (SELECT FROM devices v WHERE token_id IS NULL) FROM (SELECT NULL::text AS token_id) missing)
           AS hashes,
       pg_is_in_recovery() AS standby, pg_last_xact_replay_timestamp() AS replayed, clock_timestamp() AS clock;

-- name: own_zone
-- The TimeZone that this session has without setting one, and the source of the setting.
SELECT setting AS zone, source FROM pg_settings WHERE name = 'TimeZone';

-- name: zones
-- The roles that may write the heartbeats (the owner of the table, and others except superusers), each with the TimeZone of
-- its sessions in this database and the source of that setting; null: the server's own TimeZone.
SELECT r.rolname::text AS role, z.zone,
       CASE WHEN z.zone IS NULL THEN 'the server''s configuration'
            WHEN z.setrole <> 0 AND z.setdatabase <> 0 THEN 'ALTER ROLE … IN DATABASE'
            WHEN z.setrole <> 0 THEN 'ALTER ROLE'
            WHEN z.setdatabase <> 0 THEN 'ALTER DATABASE' ELSE 'ALTER ROLE ALL' END AS set_by
FROM pg_class c
CROSS JOIN LATERAL (
    SELECT w.oid, w.rolname, w.oid = c.relowner AS owns
    FROM pg_roles w
    WHERE w.oid = c.relowner
       OR w.rolcanlogin AND NOT w.rolsuper AND has_table_privilege(w.oid, c.oid, 'INSERT')
) r
LEFT JOIN LATERAL (
    SELECT split_part(i.item, '=', 2) AS zone, s.setrole, s.setdatabase
    FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) i (item)
    WHERE s.setrole IN (0, r.oid) AND lower(split_part(i.item, '=', 1)) = 'timezone'
      AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
    ORDER BY s.setrole = 0, s.setdatabase = 0
    LIMIT 1
) z ON true
WHERE c.oid = to_regclass('device_heartbeats')
ORDER BY r.owns DESC, r.rolname;

-- name: use_zone
-- $1 the name of a zone.
SELECT set_config('TimeZone', $1, false);

-- name: clock
SELECT clock_timestamp();

-- name: changes
-- $1 from, $2 to. The times at which the session's zone changes its offset from UTC, with the offsets before and after; the
-- first row is the start, not a change. For fifty years, every change has fallen on a quarter of an hour.
SELECT at, coalesce(before, after) AS before, after
FROM (SELECT t AS at, t::timestamp - (t AT TIME ZONE 'UTC') AS after,
             lag(t::timestamp - (t AT TIME ZONE 'UTC')) OVER (ORDER BY t) AS before
      FROM generate_series($1::timestamptz, $2::timestamptz, interval '15 minutes') t) x
WHERE before IS DISTINCT FROM after
ORDER BY at;

-- name: stamped
-- $1 from (included), $2 to (excluded), in local time as the column stores it. The number of rows.
SELECT count(*) FROM device_heartbeats WHERE ts >= $1::timestamp AND ts < $2::timestamp;

-- name: split
-- $1, $2: as in `stamped`, for an hour that occurs twice. Returns the hb_id with which its second pass begins: that of
-- the first row whose ts is at least five minutes before the ts of an earlier row. Smaller steps back do not count,
-- because concurrent requests, which take seconds, cause them.
SELECT min(hb_id)
FROM (SELECT hb_id, max(ts) OVER (ORDER BY hb_id) - ts AS back
      FROM device_heartbeats WHERE ts >= $1::timestamp AND ts < $2::timestamp) x
WHERE back >= interval '5 minutes';

-- name: future_rows
-- The number of rows with a ts after the source's clock, and the newest ts.
SELECT count(*) AS rows, max(ts)::timestamptz AS newest, statement_timestamp() AS clock
FROM device_heartbeats WHERE ts > statement_timestamp();

-- name: devices
-- $1: only ids after this id; $2: the limit; $3 token_id[]: only devices with one of these (null: all devices); $4: if
-- true, only devices of which NexMDM has only a bcrypt hash.
SELECT x.*
FROM (SELECT NULL::text AS token_hash, NULL::text AS token_id, NULL::timestamptz AS token_revoked_at,
             NULL::text AS model, NULL::text AS manufacturer, NULL::text AS android_version, NULL::integer AS sdk_int,
             NULL::text AS build_id, NULL::timestamptz AS created_at, NULL::timestamptz AS last_seen) missing
CROSS JOIN LATERAL (
    SELECT id::text AS id, alias::text AS alias, token_hash::text AS token_hash, token_id::text AS token_id,
           token_revoked_at::timestamptz AS token_revoked_at, model::text AS model, manufacturer::text AS manufacturer,
           android_version::text AS android_version, sdk_int::bigint AS sdk_int, build_id::text AS build_id,
           created_at::timestamptz AS created_at, last_seen::timestamptz AS last_seen
    FROM devices v
    WHERE v.id > $1 AND ($3::text[] IS NULL OR token_id = ANY($3::text[])) AND (NOT $4::boolean OR token_id IS NULL)
    ORDER BY v.id LIMIT $2
) x;

-- name: existing
-- $1 id[]. Which of these devices exist.
SELECT id::text FROM devices WHERE id = ANY($1::varchar[]);

-- name: count
-- $1 from (included), $2 to (excluded).
SELECT count(*) FROM device_heartbeats WHERE ts >= $1::timestamptz AND ts < $2::timestamptz;

-- name: older
-- $1 a time. Whether there are rows from before it.
SELECT EXISTS (SELECT FROM device_heartbeats WHERE ts < $1::timestamptz);

-- name: next_by_time
-- $1 from (included), $2 to (excluded), $3 and $4: after this ts and hb_id, $5 the limit, $6 fold, $7 length, $8 split
-- (see the head of this file). read_as is the ts from which the next query continues.
SELECT x.*
FROM (SELECT NULL::text AS ip, NULL::integer AS battery_pct, NULL::boolean AS plugged, NULL::integer AS temp_c,
             NULL::text AS network_type, NULL::text AS ssid, NULL::integer AS signal_dbm, NULL::integer AS uptime_s,
             NULL::integer AS ram_used_mb, NULL::text AS unity_pkg_version, NULL::boolean AS unity_running,
             NULL::text AS agent_version) missing
CROSS JOIN LATERAL (
    SELECT hb_id::bigint AS hb_id, device_id::text AS device_id, ts::timestamptz AS read_as,
           ts::timestamptz - CASE WHEN ts >= $6::timestamptz AND ts < $6::timestamptz + $7::interval
                                   AND hb_id < $8::bigint THEN $7::interval ELSE interval '0' END AS ts,
           ip::text AS ip,
           battery_pct::bigint AS battery_pct, plugged, temp_c::double precision AS temp_c,
           network_type::text AS network_type, ssid::text AS ssid, signal_dbm::bigint AS signal_dbm,
           uptime_s::bigint AS uptime_s, ram_used_mb::bigint AS ram_used_mb,
           unity_pkg_version::text AS unity_pkg_version, unity_running, agent_version::text AS agent_version
    FROM device_heartbeats h
    WHERE h.ts >= $1::timestamptz AND h.ts < $2::timestamptz AND h.ts >= $3::timestamptz
      AND (h.ts, h.hb_id) > ($3::timestamptz, $4::bigint)
    ORDER BY h.ts, h.hb_id LIMIT $5
) x;

-- name: next_by_device
-- $1 from (included), $2 to (excluded), $3 to $5: after this device_id, ts and hb_id, $6 the limit, $7 fold, $8 length,
-- $9 split. The rows are in the order of the key of NexMDM's partitioned table, which has no index on ts.
SELECT x.*
FROM (SELECT NULL::text AS ip, NULL::integer AS battery_pct, NULL::boolean AS plugged, NULL::integer AS temp_c,
             NULL::text AS network_type, NULL::text AS ssid, NULL::integer AS signal_dbm, NULL::integer AS uptime_s,
             NULL::integer AS ram_used_mb, NULL::text AS unity_pkg_version, NULL::boolean AS unity_running,
             NULL::text AS agent_version) missing
CROSS JOIN LATERAL (
    SELECT hb_id::bigint AS hb_id, device_id::text AS device_id, ts::timestamptz AS read_as,
           ts::timestamptz - CASE WHEN ts >= $7::timestamptz AND ts < $7::timestamptz + $8::interval
                                   AND hb_id < $9::bigint THEN $8::interval ELSE interval '0' END AS ts,
           ip::text AS ip,
           battery_pct::bigint AS battery_pct, plugged, temp_c::double precision AS temp_c,
           network_type::text AS network_type, ssid::text AS ssid, signal_dbm::bigint AS signal_dbm,
           uptime_s::bigint AS uptime_s, ram_used_mb::bigint AS ram_used_mb,
           unity_pkg_version::text AS unity_pkg_version, unity_running, agent_version::text AS agent_version
    FROM device_heartbeats h
    WHERE h.ts >= $1::timestamptz AND h.ts < $2::timestamptz
      AND (h.device_id, h.ts, h.hb_id) > ($3::varchar, $4::timestamptz, $5::bigint)
    ORDER BY h.device_id, h.ts, h.hb_id LIMIT $6
) x;

-- name: day
-- $1 from (included), $2 to (excluded), $3 seconds of a bucket, $4 device_id[] that nexhb imported, $5 fold, $6 length,
-- $7 split. Returns `rows`: the number of rows; `refused`: the number of rows of devices that are not in $4; `keys`:
-- the number of distinct pairs of device and bucket of the devices in $4; and `newest`: the newest ts.
SELECT coalesce(sum(b.rows), 0)::bigint AS rows,
       coalesce(sum(b.rows) FILTER (WHERE t.device_id IS NULL), 0)::bigint AS refused,
       count(*) FILTER (WHERE t.device_id IS NOT NULL) AS keys,
       max(b.newest) AS newest
FROM (SELECT device_id, floor(extract(epoch FROM ts) / $3::int) AS bucket, count(*) AS rows, max(ts) AS newest
      FROM (SELECT device_id::text AS device_id,
                   ts::timestamptz - CASE WHEN ts >= $5::timestamptz AND ts < $5::timestamptz + $6::interval
                                           AND hb_id < $7::bigint THEN $6::interval ELSE interval '0' END AS ts
            FROM device_heartbeats WHERE ts >= $1::timestamptz AND ts < $2::timestamptz) h
      GROUP BY 1, 2) b
LEFT JOIN unnest($4::text[]) t (device_id) USING (device_id);

-- name: keys
-- $1 from (included), $2 to (excluded), $3 seconds of a bucket, $4 device_id[], $5 fold, $6 length, $7 split. The distinct
-- pairs of device and bucket (in seconds since 1970).
SELECT DISTINCT device_id, (floor(extract(epoch FROM ts) / $3::int) * $3::int)::bigint AS bucket
FROM (SELECT device_id::text AS device_id,
             ts::timestamptz - CASE WHEN ts >= $5::timestamptz AND ts < $5::timestamptz + $6::interval
                                     AND hb_id < $7::bigint THEN $6::interval ELSE interval '0' END AS ts
      FROM device_heartbeats
      WHERE device_id = ANY($4::varchar[]) AND ts >= $1::timestamptz AND ts < $2::timestamptz) h;
