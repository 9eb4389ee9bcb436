-- Healing device_last_status from the history: rows that are missing, or older than the device's newest heartbeat.

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
-- of the same bucket may have set it, whose own row of the history was dropped as a duplicate.
WITH looked AS MATERIALIZED (
    SELECT d.device_no, h, s,
           (h).ts IS NOT NULL AND ((s).last_ts IS NULL OR (s).last_ts < (h).ts) AS behind,
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
healed AS (
    SELECT device_no, device_id, (h).ts, (h).received_at, (h).battery_pct, (h).plugged, (h).temp_c,
           nullif(l.network_type, ''), nullif(l.ssid, ''), (h).ip, (h).signal_dbm, (h).uptime_s, (h).ram_used_mb,
           nullif(l.unity_pkg_version, ''), (h).unity_running, nullif(l.agent_version, ''), (h).clock_wrong,
           CASE WHEN revoked THEN 'revoked' ELSE 'ok' END
    FROM held LEFT JOIN heartbeat_labels l ON l.label_no = (h).label_no
    WHERE behind
    UNION ALL
    SELECT device_no, device_id, (s).last_ts, (s).received_at, (s).battery_pct, (s).plugged, (s).temp_c,
           (s).network_type, (s).ssid, (s).ip, (s).signal_dbm, (s).uptime_s, (s).ram_used_mb,
           (s).unity_pkg_version, (s).unity_running, (s).agent_version, (s).clock_wrong, 'revoked'
    FROM held
    WHERE NOT behind AND revoked
),
-- In the writer's lock order. The row may have been written since it was looked at: the conditions here are of the row
-- as it is now, and what is newer stays.
written AS (
    INSERT INTO device_last_status AS s (
        device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip,
        signal_dbm, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, clock_wrong, status)
    SELECT * FROM healed ORDER BY device_no
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
        status = CASE WHEN 'revoked' IN (s.status, excluded.status) THEN 'revoked' ELSE 'ok' END
    WHERE excluded.last_ts > s.last_ts
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
