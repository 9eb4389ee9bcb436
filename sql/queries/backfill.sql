-- What a backfill says of device_last_status; its work is reconcile.sql's `heal`.

-- name: devices
SELECT count(*) FROM devices;

-- name: fleet
-- $1: active since. What stands in device_last_status now.
SELECT count(*) AS devices, count(*) FILTER (WHERE last_ts >= $1) AS active, min(last_ts) AS oldest, max(last_ts) AS newest
FROM device_last_status;
