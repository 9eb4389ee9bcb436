-- Healing device_last_status from the history: rows that are missing, or older than what the history has.

-- name: heal
-- $1 from behind this device_no, $2 up to this one (included), $3 how many devices, $4 history from (excluded),
-- $5 history to (included), $6 at most so many repairs, $7 false: only count.
--
-- Answers checked, wrong, updated and the last device_no looked at. Where $6 repairs are found, the walk ends with the
-- last of them, and what lies behind it is not counted.
--
-- Each LATERAL with its LIMIT is one look by the key for each device, whatever the planner believes of the tables: the
-- newest heartbeat is the first entry of each partition's (device_no, bucket), read backwards. The times choose the
-- partitions; the buckets (seconds since 2020-01-01, up to an hour long) keep a device that fell silent from being
-- read back to midnight. A bucket that is later holds a later ts, as long as ingest.bucket_seconds is not changed;
-- for a day after that the row found may not be the newest, but is never older than the status that it replaces.
--
-- On 2 cores, in memory: 0.14 s for 20,000 right devices with 1,440,000 heartbeats of the day, 0.55 s for 100,000 with
-- three each; where all 100,000 are wrong, 1.1 s (rows missing) to 1.4 s (rows too old).
--
-- Nothing that is right is touched, and nothing locked: not even a row whose last_ts is equal, since a later heartbeat
-- of the same bucket may have set it, whose own row of the history was dropped as a duplicate. A heartbeat that was
-- received before the status's own was weighed when that one came.
--
-- Of what is wrong, the last 120 rows are looked through (two hours at 60 s, 0.1 ms): whether the clock was set back
-- after the newest ts, and when the device was last heard. A heartbeat that lacks a section leaves it as it stands.
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
-- Revoking and readmitting a device lock it before its status. So they wait for us, or we for them, and whether it is
-- revoked is read once it can no longer change: else a device that was readmitted meanwhile would be hidden for good.
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
    SELECT n.device_no, n.device_id, (h).ts, (h).received_at, (h).battery_pct, (h).plugged, (h).temp_c,
           nullif(l.network_type, ''), nullif(l.ssid, ''), (h).ip, (h).signal_dbm, (h).uptime_s, (h).ram_used_mb,
           nullif(l.unity_pkg_version, ''), (h).unity_running, nullif(l.agent_version, ''), (h).clock_wrong,
           n.heard_at, coalesce(l.sections, 31::smallint), CASE WHEN revoked THEN 'revoked' ELSE 'ok' END
    FROM newest n LEFT JOIN heartbeat_labels l ON l.label_no = (h).label_no
    UNION ALL
    SELECT device_no, device_id, (s).last_ts, (s).received_at, (s).battery_pct, (s).plugged, (s).temp_c,
           (s).network_type, (s).ssid, (s).ip, (s).signal_dbm, (s).uptime_s, (s).ram_used_mb,
           (s).unity_pkg_version, (s).unity_running, (s).agent_version, (s).clock_wrong,
           (s).heard_at, (s).sections, 'revoked'
    FROM held
    WHERE NOT behind AND revoked
),
-- In the writer's lock order. The row may have been written since it was looked at: the conditions here are of the row
-- as it is now, and what is newer stays.
written AS (
    INSERT INTO device_last_status AS s (
        device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip,
        signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, clock_wrong, heard_at,
        sections, status)
    SELECT * FROM healed ORDER BY device_no
    ON CONFLICT (device_no) DO UPDATE SET
        heard_at = greatest(s.heard_at, excluded.heard_at),
        status = CASE WHEN 'revoked' IN (s.status, excluded.status) THEN 'revoked' ELSE 'ok' END,
        (last_ts, received_at, clock_wrong, sections,
         battery_pct, plugged, temp_c,
         network_type, ssid, ip, signal_dbm,
         ram_used_mb, uptime_s,
         unity_pkg_version, unity_running,
         agent_version) = (
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
                        THEN excluded.agent_version ELSE s.agent_version END
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
    RETURNING 1
)
SELECT count(*) AS checked,
       count(*) FILTER (WHERE behind OR unrevoked) AS wrong,
       (SELECT count(*) FROM written) AS updated,
       max(device_no) AS last_device_no
FROM looked CROSS JOIN (SELECT count(*) AS found, max(device_no) AS last FROM wrong) w
WHERE w.found < $6 OR device_no <= w.last;

-- name: any_between
-- $1 from behind this device_no, $2 up to this one (included).
SELECT EXISTS (SELECT FROM devices WHERE device_no > $1 AND device_no <= $2);
