-- The numbers of labels, for the writer and the import.

-- name: add_labels
-- $1 agent_version[], $2 unity_pkg_version[], $3 network_type[], $4 ssid[], $5 sections[]. The labels are sorted, so
-- that two daemons take their locks in the same order.
INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid, sections)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::smallint[])
ON CONFLICT DO NOTHING;

-- name: find_labels
-- $1 to $5: as in add_labels.
SELECT l.label_no, l.agent_version, l.unity_pkg_version, l.network_type, l.ssid, l.sections
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::smallint[])
    AS w (agent_version, unity_pkg_version, network_type, ssid, sections)
JOIN heartbeat_labels l USING (agent_version, unity_pkg_version, network_type, ssid, sections);
