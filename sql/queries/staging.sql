-- The temporary table hb_stage, for rows whose keys may exist already. The writer and the import share it.

-- name: stage_table
-- Created once per connection, for batches with a key that already exists.
CREATE TEMP TABLE IF NOT EXISTS hb_stage (LIKE device_heartbeats) ON COMMIT DELETE ROWS;

-- name: insert_staged
-- Returns the keys of the new rows. The rows are sorted, so that two daemons take their locks in the same order.
INSERT INTO device_heartbeats
SELECT * FROM hb_stage ORDER BY device_no, bucket
ON CONFLICT DO NOTHING
RETURNING device_no, bucket;

-- name: clear_stage
TRUNCATE hb_stage;
