-- The one transaction of a batch. All of it runs on the writer's own connection.
-- The rows themselves go in by binary COPY straight into the day's partition: from 1,000 rows on twice as fast as INSERT … unnest.

-- name: keep_late
-- $1 reason. Staged heartbeats whose day has no partition any more; what was new, by key.
INSERT INTO late_heartbeats
SELECT *, $1 FROM hb_stage ORDER BY device_no, bucket
ON CONFLICT DO NOTHING
RETURNING device_no, bucket;

-- name: upsert_last_status
-- $1..$20: one array a column, sorted by device_no, each device once: $18 heard_at, $19 sections, $20 the digest of what
-- the heartbeat says of the device itself (null: nothing). $21 day[], $22 written[], $23 deduplicated[]: the ledger, in
-- the same transaction.
--
-- Whoever is heard is there: heard_at grows with every heartbeat, unless it lies ahead of this receipt by more than a
-- batch may have waited; then a clock was wrong. Content replaces content by newer_content alone. A section that the
-- heartbeat has (battery 1, network 2, memory 4, system 8, app_versions 16) replaces all of its columns; what it does
-- not say stays. A revoked device stays revoked.
--
-- Answers how many rows were written, the devices of which devices does not hold yet what they say of themselves, and
-- this transaction's id.
WITH ledger AS (
    INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
    SELECT day, pg_backend_pid(), written, deduplicated
    FROM unnest($21::date[], $22::bigint[], $23::bigint[]) AS d (day, written, deduplicated)
    ON CONFLICT (day, slot) DO UPDATE SET
        written = l.written + excluded.written, deduplicated = l.deduplicated + excluded.deduplicated
),
written AS (
    INSERT INTO device_last_status AS s (
        device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip,
        signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, clock_wrong, heard_at,
        sections, said_facts)
    SELECT * FROM unnest(
        $1::int[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::smallint[], $6::bool[], $7::real[],
        $8::text[], $9::text[], $10::inet[], $11::smallint[], $12::int[], $13::int[], $14::text[], $15::bool[],
        $16::text[], $17::bool[], $18::timestamptz[], $19::smallint[], $20::int[])
    ON CONFLICT (device_no) DO UPDATE SET
        heard_at = CASE WHEN s.heard_at - excluded.heard_at > interval '1 minute' THEN excluded.heard_at
                        ELSE greatest(s.heard_at, excluded.heard_at) END,
        status = CASE s.status WHEN 'revoked' THEN 'revoked' ELSE 'ok' END,
        (last_ts, received_at, clock_wrong, sections,
         battery_pct, plugged, temp_c,
         network_type, ssid, ip, signal_dbm,
         ram_used_mb, uptime_s,
         unity_pkg_version, unity_running,
         agent_version, said_facts) = (
            SELECT CASE WHEN newer THEN excluded.last_ts ELSE s.last_ts END,
                   CASE WHEN newer THEN excluded.received_at ELSE s.received_at END,
                   CASE WHEN newer THEN excluded.clock_wrong ELSE s.clock_wrong END,
                   CASE WHEN newer THEN excluded.sections ELSE s.sections END,
                   CASE WHEN newer AND has & 1 <> 0 THEN excluded.battery_pct ELSE s.battery_pct END,
                   CASE WHEN newer AND has & 1 <> 0 THEN excluded.plugged ELSE s.plugged END,
                   CASE WHEN newer AND has & 1 <> 0 THEN excluded.temp_c ELSE s.temp_c END,
                   CASE WHEN newer AND has & 2 <> 0 THEN excluded.network_type ELSE s.network_type END,
                   CASE WHEN newer AND has & 2 <> 0 THEN excluded.ssid ELSE s.ssid END,
                   CASE WHEN newer AND has & 2 <> 0 THEN excluded.ip ELSE s.ip END,
                   CASE WHEN newer AND (has & 2 <> 0 OR excluded.signal_dbm IS NOT NULL)
                        THEN excluded.signal_dbm ELSE s.signal_dbm END,
                   CASE WHEN newer AND has & 4 <> 0 THEN excluded.ram_used_mb ELSE s.ram_used_mb END,
                   CASE WHEN newer AND has & 8 <> 0 THEN excluded.uptime_s ELSE s.uptime_s END,
                   CASE WHEN newer AND has & 16 <> 0 THEN excluded.unity_pkg_version ELSE s.unity_pkg_version END,
                   CASE WHEN newer AND (has & 16 <> 0 OR excluded.unity_running IS NOT NULL)
                        THEN excluded.unity_running ELSE s.unity_running END,
                   CASE WHEN newer AND excluded.agent_version IS NOT NULL
                        THEN excluded.agent_version ELSE s.agent_version END,
                   CASE WHEN newer AND excluded.said_facts IS NOT NULL
                        THEN excluded.said_facts ELSE s.said_facts END
            FROM (SELECT newer_content(s.last_ts, s.received_at, s.uptime_s, s.clock_wrong, excluded.last_ts,
                                       excluded.received_at, excluded.uptime_s, excluded.clock_wrong) AS newer,
                         excluded.sections AS has
                  OFFSET 0) decided)
    RETURNING device_no, said_facts IS DISTINCT FROM kept_facts AS facts_changed
)
SELECT count(*) AS written, array_agg(device_no) FILTER (WHERE facts_changed) AS facts_changed,
       pg_current_xact_id()::text AS xid
FROM written;

-- name: correct_ledger
-- $1 day[], $2 written[], $3 deduplicated[]: what to add to this transaction's own rows of the ledger, where rows that
-- were taken for new were there already.
UPDATE ingest_ledger l SET written = l.written + d.written, deduplicated = l.deduplicated + d.deduplicated
FROM unnest($1::date[], $2::bigint[], $3::bigint[]) AS d (day, written, deduplicated)
WHERE l.day = d.day AND l.slot = pg_backend_pid();

-- name: update_facts
-- $1 device_no[], $2 ts[], $3 alias[], $4 android_version[], $5 sdk_int[], $6 patch_level[], $7 build_id[],
-- $8 model[], $9 manufacturer[]. Of heartbeats whose content upsert_last_status took in this same transaction: they are
-- newer than what devices holds. What a heartbeat does not say stays.
WITH changed AS (
    UPDATE devices d SET
        facts_ts = f.ts,
        alias = coalesce(f.alias, d.alias),
        android_version = coalesce(f.android_version, d.android_version),
        sdk_int = coalesce(f.sdk_int, d.sdk_int),
        patch_level = coalesce(f.patch_level, d.patch_level),
        build_id = coalesce(f.build_id, d.build_id),
        model = coalesce(f.model, d.model),
        manufacturer = coalesce(f.manufacturer, d.manufacturer)
    FROM unnest($1::int[], $2::timestamptz[], $3::text[], $4::text[], $5::int[], $6::text[], $7::text[], $8::text[],
                $9::text[])
        AS f (device_no, ts, alias, android_version, sdk_int, patch_level, build_id, model, manufacturer)
    WHERE d.device_no = f.device_no
      AND (coalesce(f.alias, d.alias), coalesce(f.android_version, d.android_version), coalesce(f.sdk_int, d.sdk_int),
           coalesce(f.patch_level, d.patch_level), coalesce(f.build_id, d.build_id), coalesce(f.model, d.model),
           coalesce(f.manufacturer, d.manufacturer))
          IS DISTINCT FROM
          (d.alias, d.android_version, d.sdk_int, d.patch_level, d.build_id, d.model, d.manufacturer)
)
UPDATE device_last_status SET kept_facts = said_facts WHERE device_no = ANY($1);

-- name: locked_by
-- Who keeps writers off the tables of every heartbeat, or waits to: then they queue behind. Of another user's session a
-- role without pg_read_all_stats sees no name.
SELECT l.relation::regclass::text AS relation,
       CASE WHEN l.pid IS NULL THEN 'a prepared transaction (see pg_prepared_xacts)'
            ELSE format('pid %s (%s)', l.pid, coalesce(nullif(a.application_name, ''), 'unnamed')) END AS holder
FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'relation' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.relation IN ('device_last_status'::regclass, 'ingest_ledger'::regclass,
                     to_regclass('device_heartbeats_' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD')))
  AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
ORDER BY l.granted DESC
LIMIT 1;

-- name: xact_status
-- $1: the id that upsert_last_status answered. committed · aborted · in progress · null (too old to know). An error
-- (22023) where PostgreSQL has not given out such an id: it crashed, and had nothing of that transaction on disk.
SELECT pg_xact_status($1::text::xid8);

-- name: is_stored
-- $1 device_no, $2 bucket, $3 ts, $4 received_at. Whether this very arrival of a heartbeat is a row, and no other's.
SELECT EXISTS (SELECT FROM device_heartbeats WHERE device_no = $1 AND bucket = $2 AND ts = $3 AND received_at = $4)
    OR EXISTS (SELECT FROM late_heartbeats WHERE device_no = $1 AND bucket = $2 AND ts = $3 AND received_at = $4);
