-- Comparisons of the two sources of reads: the evidence about rows that differ, and the stored comparisons.

-- name: evidence
-- $1 device_id[], $2 history to (included). What both sources contain about these devices: their last status, and the
-- newest row of their history, by newer_content. `late`: the status comes from a heartbeat that is in late_heartbeats
-- until the nightly run. `partial`: the last heartbeat leaves fields out.
SELECT d.device_id, s.last_ts AS status_ts, s.received_at AS status_received_at, s.heard_at AS status_heard_at,
       s.clock_wrong, coalesce(b.ts, h.ts) AS history_ts, coalesce(b.received_at, h.received_at) AS history_received_at,
       coalesce(b.bucket, h.bucket) AS history_bucket,
       (SELECT max(received_at) FROM device_heartbeats a WHERE a.device_no = d.device_no AND a.ts <= $2)
           AS history_heard_at,
       s.sections <> 31 OR coalesce(l.agent_version, '') = '' AS partial,
       EXISTS (SELECT FROM late_heartbeats l
               WHERE l.device_no = d.device_no AND l.ts = s.last_ts AND l.received_at = s.received_at) AS late
FROM devices d
LEFT JOIN device_last_status s USING (device_no)
LEFT JOIN LATERAL (
    SELECT ts, received_at, bucket, uptime_s, clock_wrong, label_no FROM device_heartbeats h
    WHERE h.device_no = d.device_no AND h.ts <= $2
    ORDER BY h.bucket DESC
    LIMIT 1
) h ON true
LEFT JOIN LATERAL set_back_after(d.device_no, h.ts, h.received_at, h.uptime_s, h.clock_wrong, '-infinity') b ON true
LEFT JOIN heartbeat_labels l ON l.label_no = coalesce(b.label_no, h.label_no)
WHERE d.device_id = ANY($1::text[]);

-- name: add
-- $1 query, $2 now, $3 fast_ms, $4 legacy_ms, $5 fast_rows, $6 legacy_rows, $7 rows_differ, $8 examples, $9 host.
INSERT INTO perf_diff_comparisons
    (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows, rows_differ, examples, host)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9);

-- name: mismatches
-- $1 since, $2 until. The number of comparisons, made by any daemon, in which the two sources differed. Only
-- comparisons since the fast reads were last switched on count, so that earlier mismatches do not turn the fast reads
-- off again.
SELECT count(*) FROM perf_diff_comparisons
WHERE rows_differ > 0 AND compared_at > $1 AND compared_at <= $2
  AND compared_at > coalesce((SELECT max(changed_at) FROM feature_flag_changes
                              WHERE flag = 'read_from_last_status' AND value_to = 'true' AND changed_at <= $2),
                             '-infinity');

-- name: report
-- $1 since. One row for each query: times and speed-ups as p50, p95, p99.
SELECT query, count(*) AS comparisons, count(*) FILTER (WHERE rows_differ > 0) AS mismatches,
       percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY fast_ms) AS fast_ms,
       percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY legacy_ms) AS legacy_ms,
       percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY legacy_ms / greatest(fast_ms, 0.001)) AS speed_up
FROM perf_diff_comparisons
WHERE compared_at > $1
GROUP BY query
ORDER BY query;

-- name: last_mismatches
-- $1 since, $2 the limit; the newest first.
SELECT query, compared_at, rows_differ, examples, host FROM perf_diff_comparisons
WHERE rows_differ > 0 AND compared_at > $1
ORDER BY comparison_no DESC
LIMIT $2;
