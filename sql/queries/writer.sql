-- The one transaction of a batch. All of it runs on the writer's own connection.
-- The rows themselves go in by binary COPY straight into the day's partition: from 1,000 rows on twice as fast as INSERT … unnest.

-- name: keep_late
-- $1 reason. Staged heartbeats whose day has no partition any more; what was new, by key.
INSERT INTO late_heartbeats
SELECT *, $1 FROM hb_stage ORDER BY device_no, bucket
ON CONFLICT DO NOTHING
RETURNING device_no, bucket;

-- name: upsert_last_status
-- $1..$17: one array a column, sorted by device_no, each device once. Only newer wins: late data never moves
-- a status back, unless it lies further ahead than any device's clock may be (ingest.accept_future is a day at most):
-- then a daemon's clock was wrong, and nothing would be newer until then. A revoked device stays revoked. $18 day[], $19 written[], $20 deduplicated[]: the ledger, in the same
-- transaction. Answers how many rows were written, and this transaction's id.
WITH ledger AS (
    INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
    SELECT day, pg_backend_pid(), written, deduplicated
    FROM unnest($18::date[], $19::bigint[], $20::bigint[]) AS d (day, written, deduplicated)
    ON CONFLICT (day, slot) DO UPDATE SET
        written = l.written + excluded.written, deduplicated = l.deduplicated + excluded.deduplicated
),
written AS (
    INSERT INTO device_last_status AS s (
        device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip,
        signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, clock_wrong)
    SELECT * FROM unnest(
        $1::int[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::smallint[], $6::bool[], $7::real[],
        $8::text[], $9::text[], $10::inet[], $11::smallint[], $12::int[], $13::int[], $14::text[], $15::bool[],
        $16::text[], $17::bool[])
    ON CONFLICT (device_no) DO UPDATE SET
        last_ts = excluded.last_ts,
        received_at = excluded.received_at,
        battery_pct = excluded.battery_pct,
        plugged = excluded.plugged,
        temp_c = excluded.temp_c,
        network_type = excluded.network_type,
        ssid = excluded.ssid,
        ip = excluded.ip,
        signal_dbm = excluded.signal_dbm,
        uptime_s = excluded.uptime_s,
        ram_used_mb = excluded.ram_used_mb,
        unity_pkg_version = excluded.unity_pkg_version,
        unity_running = excluded.unity_running,
        agent_version = excluded.agent_version,
        clock_wrong = excluded.clock_wrong,
        status = CASE s.status WHEN 'revoked' THEN 'revoked' ELSE 'ok' END
    WHERE excluded.last_ts > s.last_ts OR s.last_ts > now() + interval '25 hours'
    RETURNING 1
)
SELECT count(*) AS written, pg_current_xact_id()::text AS xid FROM written;

-- name: correct_ledger
-- $1 day[], $2 written[], $3 deduplicated[]: what to add to this transaction's own rows of the ledger, where rows that
-- were taken for new were there already.
UPDATE ingest_ledger l SET written = l.written + d.written, deduplicated = l.deduplicated + d.deduplicated
FROM unnest($1::date[], $2::bigint[], $3::bigint[]) AS d (day, written, deduplicated)
WHERE l.day = d.day AND l.slot = pg_backend_pid();

-- name: update_facts
-- $1 device_no[], $2 ts[], $3 alias[], $4 android_version[], $5 sdk_int[], $6 patch_level[], $7 build_id[],
-- $8 model[], $9 manufacturer[]. What a heartbeat does not say stays; what an older one says is not believed.
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
  AND (d.facts_ts IS NULL OR d.facts_ts < f.ts)
  AND (coalesce(f.alias, d.alias), coalesce(f.android_version, d.android_version), coalesce(f.sdk_int, d.sdk_int),
       coalesce(f.patch_level, d.patch_level), coalesce(f.build_id, d.build_id), coalesce(f.model, d.model),
       coalesce(f.manufacturer, d.manufacturer))
      IS DISTINCT FROM
      (d.alias, d.android_version, d.sdk_int, d.patch_level, d.build_id, d.model, d.manufacturer);

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

-- name: write_after
-- A transaction of its own with nothing in it but a WAL record: its COMMIT waits for the synchronous standbys, if there
-- are any, and they then have all that was committed before. Every role may call it.
SELECT pg_logical_emit_message(true, 'nexhb', '');

-- name: is_stored
-- $1 device_no, $2 bucket, $3 ts, $4 received_at. Whether this very arrival of a heartbeat is a row, and no other's.
SELECT EXISTS (SELECT FROM device_heartbeats WHERE device_no = $1 AND bucket = $2 AND ts = $3 AND received_at = $4)
    OR EXISTS (SELECT FROM late_heartbeats WHERE device_no = $1 AND bucket = $2 AND ts = $3 AND received_at = $4);
