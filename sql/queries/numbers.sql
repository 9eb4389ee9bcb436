-- Numbers of devices and of labels: rows of the history name them, and no number may be given twice. Those of other
-- tables are keys, and a row that gets one that is taken is refused.

-- name: dangling
-- How many rows of a table name a device or a label that is not there. `$table` may be a query in brackets.
SELECT count(*) FILTER (WHERE d.device_no IS NULL) AS devices,
       count(*) FILTER (WHERE l.label_no IS NULL) AS labels
FROM $table h
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no)
WHERE d.device_no IS NULL OR l.label_no IS NULL;

-- name: dangling_late
-- $1 from (included), $2 to (excluded). The same of late heartbeats.
SELECT count(*) FILTER (WHERE d.device_no IS NULL) AS devices,
       count(*) FILTER (WHERE l.label_no IS NULL) AS labels
FROM late_heartbeats h
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no)
WHERE (d.device_no IS NULL OR l.label_no IS NULL) AND h.ts >= $1 AND h.ts < $2;

-- name: dangling_statuses
-- Last statuses of a device that is not there.
SELECT count(*) FROM device_last_status s WHERE NOT EXISTS (SELECT FROM devices d WHERE d.device_no = s.device_no);

-- name: sequences
-- The sequences, the number that each has given last, and the largest that is in use. That of the history comes from
-- each day's key; of its labels there is no index.
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
) s;

-- name: raise
-- $1 sequence, $2 the largest number in use.
SELECT setval($1::text::regclass, $2::bigint);

-- name: briefly
-- For the reading of the sequences: somebody may hold a lock on a table for hours.
SET LOCAL lock_timeout = '2s';
