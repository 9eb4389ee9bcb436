-- What the old system asked before it had device_last_status: the newest heartbeat of each device, picked by a window
-- function over the whole history. Kept to be compared with, and to fall back on. Over heartbeat_history, so that it
-- has device_id as the old table had.

-- name: offline
-- $1 cutoff.
SELECT device_id, alias, last_ts
FROM (
    SELECT h.device_id, d.alias, h.ts AS last_ts,
           row_number() OVER (PARTITION BY h.device_id ORDER BY h.ts DESC) AS nth
    FROM heartbeat_history h JOIN devices d USING (device_id)
) newest
WHERE nth = 1 AND last_ts < $1
ORDER BY last_ts;

-- name: unity_down
-- $1 seen since.
SELECT device_id, alias, last_ts, unity_running
FROM (
    SELECT h.device_id, d.alias, h.ts AS last_ts, h.unity_running,
           row_number() OVER (PARTITION BY h.device_id ORDER BY h.ts DESC) AS nth
    FROM heartbeat_history h JOIN devices d USING (device_id)
) newest
WHERE nth = 1 AND unity_running = false AND last_ts >= $1
ORDER BY last_ts DESC;
