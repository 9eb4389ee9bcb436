-- Numbers of devices and labels. History rows refer to them, so no number may be assigned twice. The numbers of other
-- tables are primary keys, so PostgreSQL rejects a duplicate.

-- name: dangling
-- How many rows of a table refer to a missing device or label. `$table` may be a query in parentheses.
SELECT count(*) FILTER (WHERE d.device_no IS NULL) AS devices,
       count(*) FILTER (WHERE l.label_no IS NULL) AS labels
FROM $table h
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no)
WHERE d.device_no IS NULL OR l.label_no IS NULL;

-- name: dangling_late
-- $1 from (inclusive), $2 to (exclusive). Like `dangling`, for late heartbeats.
SELECT count(*) FILTER (WHERE d.device_no IS NULL) AS devices,
       count(*) FILTER (WHERE l.label_no IS NULL) AS labels
FROM late_heartbeats h
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no)
WHERE (d.device_no IS NULL OR l.label_no IS NULL) AND h.ts >= $1 AND h.ts < $2;

-- name: dangling_statuses
-- The number of last statuses of missing devices.
SELECT count(*) FROM device_last_status s WHERE NOT EXISTS (SELECT FROM devices d WHERE d.device_no = s.device_no);

-- name: sequences
-- The sequences, the last number that each has assigned, and the largest number in use. The device numbers of the
-- history are read from the index of each day's key; its label numbers have no index and are left out.
SELECT what, sequence, coalesce(pg_sequence_last_value(sequence::regclass), 0) AS given, used
FROM (
    SELECT 'device' AS what, pg_get_serial_sequence('devices', 'device_no') AS sequence,
           greatest((SELECT max(device_no) FROM devices), (SELECT max(device_no) FROM device_last_status),
                    (SELECT max(device_no) FROM late_heartbeats), (SELECT max(device_no) FROM device_heartbeats), 0)
               AS used
    UNION ALL
    SELECT 'label', pg_get_serial_sequence('heartbeat_labels', 'label_no'),
           greatest((SELECT max(label_no) FROM heartbeat_labels), (SELECT max(label_no) FROM late_heartbeats), 0)
    UNION ALL
    SELECT 'supplement', pg_get_serial_sequence('archive_supplements', 'supplement_no'),
           coalesce((SELECT max(supplement_no) FROM archive_supplements), 0)
    UNION ALL
    SELECT 'job run', pg_get_serial_sequence('job_runs', 'run_no'), coalesce((SELECT max(run_no) FROM job_runs), 0)
    UNION ALL
    SELECT 'flag change', pg_get_serial_sequence('feature_flag_changes', 'change_no'),
           coalesce((SELECT max(change_no) FROM feature_flag_changes), 0)
    UNION ALL
    SELECT 'comparison', pg_get_serial_sequence('perf_diff_comparisons', 'comparison_no'),
           coalesce((SELECT max(comparison_no) FROM perf_diff_comparisons), 0)
    UNION ALL
    SELECT 'place', pg_get_serial_sequence('day_places', 'place_no'),
           greatest((SELECT max(place_no) FROM day_places), (SELECT max(place_no) FROM device_days), 0)
    UNION ALL
    SELECT 'change of a device', pg_get_serial_sequence('device_changes', 'change_no'),
           coalesce((SELECT max(change_no) FROM device_changes), 0)
    UNION ALL
    SELECT 'event', pg_get_serial_sequence('device_events', 'event_id'),
           coalesce((SELECT max(event_id) FROM device_events), 0)
    UNION ALL
    SELECT 'incident', pg_get_serial_sequence('incidents', 'incident_id'),
           coalesce((SELECT max(incident_id) FROM incidents), 0)
    UNION ALL
    SELECT 'outage', pg_get_serial_sequence('device_outages', 'outage_no'),
           coalesce((SELECT max(outage_no) FROM device_outages), 0)
    UNION ALL
    SELECT 'message', pg_get_serial_sequence('notifications', 'notification_no'), coalesce((SELECT max(notification_no) FROM notifications), 0)
    UNION ALL
    SELECT 'silence', pg_get_serial_sequence('silences', 'silence_id'), coalesce((SELECT max(silence_id) FROM silences), 0)
) s;

-- name: raise
-- $1 sequence, $2 the largest number in use.
SELECT setval($1::text::regclass, $2::bigint);

-- name: short_lock_timeout
-- For reading the sequences: another session may hold a lock on a table for hours.
SET LOCAL lock_timeout = '2s';
