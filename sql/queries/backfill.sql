-- What a backfill reports about device_last_status. The statement that fills the table is `heal` in reconcile.sql.

-- name: devices
SELECT count(*) FROM devices;

-- name: fleet
-- The present state of device_last_status. $1: a device counts as active if its last_ts is not before this time.
SELECT count(*) AS devices, count(*) FILTER (WHERE last_ts >= $1) AS active, min(last_ts) AS oldest, max(last_ts) AS newest
FROM device_last_status;
