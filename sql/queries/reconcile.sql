-- Repair device_last_status from the history: rows that are missing, or older than the newest heartbeat.

-- name: heal
-- $1: only devices after this device_no; $2: only devices up to this device_no (inclusive); $3: maximum number of
-- devices; $4: history from (exclusive); $5: history to (inclusive); $6: maximum number of repairs; $7: if false, only
-- count.
--
-- Returns the numbers of rows `checked`, `wrong` and `updated`, and `last_device_no`, the last device checked. If $6
-- rows are wrong, the check ends with the last of them, and later devices are not counted.
--
-- Each LATERAL with its LIMIT is one index lookup per device, whatever the planner estimates: the newest heartbeat is
-- the first entry of each partition's (device_no, bucket), read backwards. The times select the partitions. The buckets
-- (seconds since 2020-01-01, up to an hour long) avoid reading back to midnight for a device that fell silent. A later
-- bucket has a later ts as long as ingest.bucket_seconds does not change; for a day after a change, the selected row
-- may not be the newest, but is never older than the status that it replaces.
--
-- Measured on 2 cores, with the data in memory: 0.14 s for 20,000 devices with correct rows and 1,440,000 heartbeats of
-- the day; 0.55 s for 100,000 devices with correct rows and three heartbeats each; 1.1 s (all rows missing) to 1.4 s
-- (all rows too old) if the rows of all 100,000 are wrong.
--
-- Correct rows are neither written nor locked. A row whose last_ts equals the newest ts of the history counts as
-- correct: the row may be from a later heartbeat of the same bucket, which is not in the history because it is a
-- duplicate. A heartbeat that was received before the one in the status was already compared when the status was
-- written.
--
-- For a wrong row, the last 120 heartbeats are read (two hours at 60 s, 0.1 ms) to determine whether the clock was set
-- back after the newest ts, and when the device was last seen. A heartbeat that lacks a section leaves that section as
-- it is.
WITH looked AS MATERIALIZED (
    SELECT d.device_no, h, s,
           (h).ts IS NOT NULL
           AND ((s).last_ts IS NULL OR (s).heard_at < (h).received_at
                OR (h).received_at >= (s).received_at
                   AND newer_content((s).last_ts, (s).received_at, (s).uptime_s, (s).clock_wrong,
                                     (h).ts, (h).received_at, (h).uptime_s, (h).clock_wrong)) AS behind,
           d.revoked_at IS NOT NULL AND (s).status <> 'revoked' AS unrevoked
    FROM (SELECT device_no, revoked_at FROM devices WHERE device_no > $1 ORDER BY device_no LIMIT $3) d
    LEFT JOIN LATERAL (
        SELECT s FROM device_last_status s WHERE s.device_no = d.device_no LIMIT 1
    ) s ON true
    LEFT JOIN LATERAL (
        SELECT h FROM device_heartbeats h
        WHERE h.device_no = d.device_no
          AND h.ts > $4 AND h.ts <= $5
          AND h.bucket > floor(extract(epoch FROM $4::timestamptz))::bigint - 1577836800 - 3600
          AND h.bucket <= floor(extract(epoch FROM $5::timestamptz))::bigint - 1577836800
        ORDER BY h.bucket DESC
        LIMIT 1
    ) h ON true
    WHERE d.device_no <= $2
),
wrong AS MATERIALIZED (
    SELECT * FROM looked WHERE behind OR unrevoked ORDER BY device_no LIMIT $6
),
-- A transaction that revokes or readmits a device locks the device before its status. So it waits for this statement,
-- or this statement waits for it, and `revoked` is read when it can no longer change. Otherwise a device that is
-- readmitted meanwhile would stay hidden.
held AS MATERIALIZED (
    SELECT w.device_no, w.h, w.s, w.behind, d.device_id, d.revoked
    FROM wrong w CROSS JOIN LATERAL (
        SELECT device_id, revoked_at IS NOT NULL AS revoked FROM devices WHERE device_no = w.device_no FOR KEY SHARE
    ) d
    WHERE $7
),
newest AS MATERIALIZED (
    SELECT w.device_no, w.device_id, w.revoked, coalesce(r.set_back, w.h) AS h, r.heard_at
    FROM held w CROSS JOIN LATERAL (
        SELECT max((c).received_at) AS heard_at,
               (array_agg(c ORDER BY (c).received_at DESC) FILTER (
                    WHERE (c).received_at > (w.h).received_at
                      AND newer_content((w.h).ts, (w.h).received_at, (w.h).uptime_s, (w.h).clock_wrong,
                                        (c).ts, (c).received_at, (c).uptime_s, (c).clock_wrong)))[1] AS set_back
        FROM (SELECT c FROM device_heartbeats c
              WHERE c.device_no = w.device_no
                AND c.ts > $4 AND c.ts <= $5
                AND c.bucket > floor(extract(epoch FROM $4::timestamptz))::bigint - 1577836800 - 3600
                AND c.bucket <= floor(extract(epoch FROM $5::timestamptz))::bigint - 1577836800
              ORDER BY c.bucket DESC
              LIMIT 120) last
    ) r
    WHERE w.behind
),
healed AS (
    SELECT n.device_no, n.device_id, (h).ts, (h).received_at, (h).clock_wrong, n.heard_at,
           coalesce(l.sections, 31::smallint), CASE WHEN revoked THEN 'revoked' ELSE 'ok' END,
           {{content: (h).$column | nullif(l.$column, '')}}
    FROM newest n LEFT JOIN heartbeat_labels l ON l.label_no = (h).label_no
    UNION ALL
    SELECT device_no, device_id, (s).last_ts, (s).received_at, (s).clock_wrong, (s).heard_at, (s).sections, 'revoked',
           {{content: (s).$column}}
    FROM held
    WHERE NOT behind AND revoked
),
-- Rows are locked in the writer's order. A row may have been written since it was checked, so the conditions below
-- apply to its present state, and newer values are kept.
written AS (
    INSERT INTO device_last_status AS s (
        device_no, device_id, last_ts, received_at, clock_wrong, heard_at, sections, status, {{content: $column}})
    SELECT * FROM healed ORDER BY device_no
    ON CONFLICT (device_no) DO UPDATE SET
        heard_at = greatest(s.heard_at, excluded.heard_at),
        status = CASE WHEN 'revoked' IN (s.status, excluded.status) THEN 'revoked' ELSE 'ok' END,
        (last_ts, received_at, clock_wrong, sections, {{content: $column}}) = (
            SELECT CASE WHEN newer THEN excluded.last_ts ELSE s.last_ts END,
                   CASE WHEN newer THEN excluded.received_at ELSE s.received_at END,
                   CASE WHEN newer THEN excluded.clock_wrong ELSE s.clock_wrong END,
                   CASE WHEN newer THEN excluded.sections ELSE s.sections END,
                   {{content: CASE WHEN newer AND (has & $section <> 0 OR excluded.$column IS NOT NULL)
                        THEN excluded.$column ELSE s.$column END}}
            FROM (SELECT excluded.received_at >= s.received_at
                         AND newer_content(s.last_ts, s.received_at, s.uptime_s, s.clock_wrong, excluded.last_ts,
                                           excluded.received_at, excluded.uptime_s, excluded.clock_wrong) AS newer,
                         excluded.sections AS has
                  OFFSET 0) decided)
    WHERE excluded.heard_at > s.heard_at
       OR excluded.received_at >= s.received_at
          AND newer_content(s.last_ts, s.received_at, s.uptime_s, s.clock_wrong, excluded.last_ts,
                            excluded.received_at, excluded.uptime_s, excluded.clock_wrong)
       OR (excluded.last_ts = s.last_ts AND excluded.status = 'revoked' AND s.status <> 'revoked')
    RETURNING device_no, s.status, xmax = 0 AS is_first, heard_at, last_ts, received_at, clock_wrong, uptime_s,
              battery_pct, plugged, unity_running, agent_version, unity_pkg_version
),
-- The next heartbeat is compared with the repaired status, so only this statement can tell the watcher of the change: 64
-- for a first status, otherwise everything that may have changed (see upsert_last_status in writer.sql).
noted AS (
    INSERT INTO device_changes (device_no, changes, heard_at, ts, received_at, clock_wrong, uptime_s, battery_pct,
                                plugged, unity_running, agent_version, unity_pkg_version)
    SELECT device_no, CASE WHEN is_first THEN 64 ELSE 1 + 2 + 4 + 8 + 32 END, heard_at, last_ts, received_at,
           clock_wrong, uptime_s, battery_pct, plugged, unity_running, agent_version, unity_pkg_version
    FROM written WHERE status = 'ok' ORDER BY device_no
)
SELECT count(*) AS checked,
       count(*) FILTER (WHERE behind OR unrevoked) AS wrong,
       (SELECT count(*) FROM written) AS updated,
       max(device_no) AS last_device_no
FROM looked CROSS JOIN (SELECT count(*) AS found, max(device_no) AS last FROM wrong) w
WHERE w.found < $6 OR device_no <= w.last;

-- name: any_between
-- Whether there are devices after device_no $1 and up to device_no $2 (inclusive).
SELECT EXISTS (SELECT FROM devices WHERE device_no > $1 AND device_no <= $2);
