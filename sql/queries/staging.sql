-- What every way into the history shares: the writer's, and the import's.

-- name: stage_table
-- Made once a connection; a batch with a key that is already stored goes through it.
CREATE TEMP TABLE IF NOT EXISTS hb_stage (LIKE device_heartbeats) ON COMMIT DELETE ROWS;

-- name: insert_staged
-- What was new, by key. Sorted, so that two daemons take their locks in the same order.
INSERT INTO device_heartbeats
SELECT * FROM hb_stage ORDER BY device_no, bucket
ON CONFLICT DO NOTHING
RETURNING device_no, bucket;

-- name: clear_stage
TRUNCATE hb_stage;

-- name: add_labels
-- $1 agent_version[], $2 unity_pkg_version[], $3 network_type[], $4 ssid[], $5 sections[]. Sorted for the lock order.
INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid, sections)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::smallint[])
ON CONFLICT DO NOTHING;

-- name: find_labels
-- $1..$5 as in add_labels.
SELECT l.label_no, l.agent_version, l.unity_pkg_version, l.network_type, l.ssid, l.sections
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::smallint[])
    AS w (agent_version, unity_pkg_version, network_type, ssid, sections)
JOIN heartbeat_labels l USING (agent_version, unity_pkg_version, network_type, ssid, sections);
