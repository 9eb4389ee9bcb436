-- The transaction of a batch, on the writer's own connection. The rows themselves are written by binary COPY directly
-- into the day's partition: from 1,000 rows on, that is twice as fast as INSERT … unnest.

-- name: keep_late
-- $1 reason. Inserts the staged heartbeats, whose day no longer has a partition; returns the keys of the new rows.
INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, {{measured: $column}}, reason)
SELECT ts, received_at, device_no, bucket, label_no, clock_wrong, {{measured: $column}}, $1
FROM hb_stage ORDER BY device_no, bucket
ON CONFLICT DO NOTHING
RETURNING device_no, bucket;

-- name: upsert_last_status
-- $1 day[], $2 written[], $3 deduplicated[]: what to add to the ledger, in the same transaction.
-- $4 battery_pct, $5 interval: which changes the watcher wants to know of (below).
-- $6 device_no[], $7 device_id[], $8 last_ts[], $9 received_at[], $10 clock_wrong[], $11 heard_at[], $12 sections[]: the
-- statuses.
-- $13 said_facts[]: the digest of the device facts that the heartbeat states (null: it states none).
-- $14 and so on: one array for each column of the content.
-- The arrays from $6 on are sorted by device_no, and contain each device once.
--
-- heard_at never decreases, with one exception: if the stored heard_at is more than a minute after this receipt, it was
-- written by a wrong clock (no batch waits as long), and is replaced. Content is replaced only as newer_content
-- decides. A section that the heartbeat has (battery 1, network 2, memory 4, system 8, app_versions 16) replaces all of
-- its columns, nulls included. A column whose section is absent, or that belongs to no section, is replaced only if the
-- heartbeat has a value for it. A revoked device stays revoked.
--
-- `changes` says in which respect this heartbeat changed the status, as the sum of: 1 Unity started or stopped; 2 the
-- battery's charge changed while it is at most $4; 4 the clock became wrong or right; 8 a version changed; 16 the uptime
-- fell, which means that the device was restarted; 32 the device had been silent for longer than $5; 64 this is its
-- first status. The watcher reads such changes from device_changes, so that it need not compare a million statuses.
--
-- Returns `written`: the number of statuses written; `facts_changed`: the devices whose stated facts are not in
-- `devices` yet; and `xid`: the id of this transaction.
WITH ledger AS (
    INSERT INTO ingest_ledger AS l (day, slot, written, deduplicated)
    SELECT day, pg_backend_pid(), written, deduplicated
    FROM unnest($1::date[], $2::bigint[], $3::bigint[]) AS d (day, written, deduplicated)
    ON CONFLICT (day, slot) DO UPDATE SET
        written = l.written + excluded.written, deduplicated = l.deduplicated + excluded.deduplicated
),
written AS (
    INSERT INTO device_last_status AS s (
        device_no, device_id, last_ts, received_at, clock_wrong, heard_at, sections, said_facts, {{content: $column}},
        changes)
    SELECT *, 64 FROM unnest(
        $6::int[], $7::text[], $8::timestamptz[], $9::timestamptz[], $10::bool[], $11::timestamptz[], $12::smallint[],
        $13::int[], {{content: $14…::$type[]}})
    ON CONFLICT (device_no) DO UPDATE SET
        heard_at = CASE WHEN s.heard_at - excluded.heard_at > interval '1 minute' THEN excluded.heard_at
                        ELSE greatest(s.heard_at, excluded.heard_at) END,
        status = CASE s.status WHEN 'revoked' THEN 'revoked' ELSE 'ok' END,
        (last_ts, received_at, clock_wrong, sections, said_facts, {{content: $column}}, changes) = (
            SELECT CASE WHEN newer THEN excluded.last_ts ELSE s.last_ts END,
                   CASE WHEN newer THEN excluded.received_at ELSE s.received_at END,
                   CASE WHEN newer THEN excluded.clock_wrong ELSE s.clock_wrong END,
                   CASE WHEN newer THEN excluded.sections ELSE s.sections END,
                   CASE WHEN newer AND excluded.said_facts IS NOT NULL
                        THEN excluded.said_facts ELSE s.said_facts END,
                   {{content: CASE WHEN newer AND (has & $section <> 0 OR excluded.$column IS NOT NULL)
                        THEN excluded.$column ELSE s.$column END}},
                   CASE WHEN newer AND excluded.unity_running IS DISTINCT FROM s.unity_running
                             AND (has & 16 <> 0 OR excluded.unity_running IS NOT NULL) THEN 1 ELSE 0 END
                   + CASE WHEN newer AND excluded.battery_pct IS DISTINCT FROM s.battery_pct
                               AND least(excluded.battery_pct, s.battery_pct) <= $4 THEN 2 ELSE 0 END
                   + CASE WHEN newer AND excluded.clock_wrong <> s.clock_wrong THEN 4 ELSE 0 END
                   + CASE WHEN newer AND (excluded.agent_version <> s.agent_version
                                          OR excluded.unity_pkg_version <> s.unity_pkg_version) THEN 8 ELSE 0 END
                   + CASE WHEN newer AND excluded.uptime_s < s.uptime_s THEN 16 ELSE 0 END
                   + CASE WHEN excluded.heard_at - s.heard_at > $5 THEN 32 ELSE 0 END
            FROM (SELECT newer_content(s.last_ts, s.received_at, s.uptime_s, s.clock_wrong, excluded.last_ts,
                                       excluded.received_at, excluded.uptime_s, excluded.clock_wrong) AS newer,
                         excluded.sections AS has
                  OFFSET 0) decided)
    RETURNING device_no, said_facts IS DISTINCT FROM kept_facts AS facts_changed, changes, heard_at, last_ts, received_at,
              clock_wrong, uptime_s, battery_pct, plugged, unity_running, agent_version, unity_pkg_version
),
noted AS (
    INSERT INTO device_changes (device_no, changes, heard_at, ts, received_at, clock_wrong, uptime_s, battery_pct,
                                plugged, unity_running, agent_version, unity_pkg_version)
    SELECT device_no, changes, heard_at, last_ts, received_at, clock_wrong, uptime_s, battery_pct,
           plugged, unity_running, agent_version, unity_pkg_version
    FROM written WHERE changes <> 0
)
SELECT count(*) AS written, array_agg(device_no) FILTER (WHERE facts_changed) AS facts_changed,
       pg_current_xact_id()::text AS xid
FROM written;

-- name: correct_ledger
-- $1 day[], $2 written[], $3 deduplicated[]: a correction, which is added to the ledger's rows of this connection if
-- heartbeats that were counted as written turned out to exist already.
UPDATE ingest_ledger l SET written = l.written + d.written, deduplicated = l.deduplicated + d.deduplicated
FROM unnest($1::date[], $2::bigint[], $3::bigint[]) AS d (day, written, deduplicated)
WHERE l.day = d.day AND l.slot = pg_backend_pid();

-- name: update_facts
-- $1 device_no[], $2 ts[]; $3 and so on: one array for each fact. They describe heartbeats whose content
-- upsert_last_status stored in the same transaction, so the facts are newer than those in `devices`. A fact that a
-- heartbeat does not state is kept.
WITH changed AS (
    UPDATE devices d SET facts_ts = f.ts, {{facts: $column = coalesce(f.$column, d.$column)}}
    FROM unnest($1::int[], $2::timestamptz[], {{facts: $3…::$type[]}}) AS f (device_no, ts, {{facts: $column}})
    WHERE d.device_no = f.device_no
      AND ({{facts: coalesce(f.$column, d.$column)}}) IS DISTINCT FROM ({{facts: d.$column}})
)
UPDATE device_last_status SET kept_facts = said_facts WHERE device_no = ANY($1);

-- name: locked_by
-- Returns the session that holds a lock which blocks the writers of every heartbeat, or that waits for such a lock:
-- writers queue behind a waiting lock, too. A role without pg_read_all_stats sees no application name of another user's
-- session.
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
-- $1: the id that upsert_last_status returned. Returns committed, aborted, in progress, or null (too old to know). Fails
-- with 22023 if PostgreSQL has not assigned such an id: it crashed, and nothing of that transaction was on disk.
SELECT pg_xact_status($1::text::xid8);

-- name: is_stored
-- $1 device_no, $2 bucket, $3 ts, $4 received_at. Whether the row with this key is from this arrival of the heartbeat,
-- and not from another.
SELECT EXISTS (SELECT FROM device_heartbeats WHERE device_no = $1 AND bucket = $2 AND ts = $3 AND received_at = $4)
    OR EXISTS (SELECT FROM late_heartbeats WHERE device_no = $1 AND bucket = $2 AND ts = $3 AND received_at = $4);
