-- Runs of jobs, and the parts of the nightly run that concern neither partitions nor archives.

-- name: started
-- $1 job, $2 now, $3 host.
INSERT INTO job_runs (job, started_at, status, host) VALUES ($1, $2, 'running', $3) RETURNING run_no;

-- name: ended
-- $1 run_no, $2 when, $3 status, $4 reason, $5 counts.
UPDATE job_runs SET ended_at = $2, status = $3, reason = $4, counts = $5::jsonb
WHERE run_no = $1 AND status = 'running';

-- name: skipped
-- $1 job, $2 now, $3 reason, $4 host.
INSERT INTO job_runs (job, started_at, ended_at, status, reason, host) VALUES ($1, $2, $2, 'skipped', $3, $4);

-- name: fail_interrupted
-- $1 job, $2 now. Mark runs whose daemon was killed as failed.
UPDATE job_runs SET ended_at = $2, status = 'failed', reason = 'its daemon ended in the middle of it'
WHERE job = $1 AND status = 'running';

-- name: last_started
-- $1 job, $2 latest time. Returns when the job last started, up to $2. A skipped run does not count. A run during which
-- the daemon was killed counts only if it is the third such run within 12 hours: then the job itself is probably the
-- cause.
SELECT max(r.started_at) FROM job_runs r
WHERE r.job = $1 AND r.started_at <= $2
  AND (r.status = 'completed'
       OR r.status = 'failed' AND r.reason IS DISTINCT FROM 'its daemon ended in the middle of it'
       OR r.status <> 'skipped' AND 3 <= (
           SELECT count(*) FROM job_runs i
           WHERE i.job = r.job AND i.started_at <= r.started_at AND i.started_at > r.started_at - interval '12 hours'
             AND (i.status = 'running' OR i.reason = 'its daemon ended in the middle of it')));

-- name: last_carried_out
-- $1 latest time. Returns when the last nightly run that carried out its steps started, even if some steps failed. A
-- run that stopped before its steps, or was killed, does not show that the clock was right.
SELECT max(started_at) FROM job_runs
WHERE job = 'nightly' AND started_at <= $1
  AND (status = 'completed' OR status = 'failed' AND counts ? 'failed_steps');

-- name: heartbeat_days
-- $1 since (null: no limit), $2 until. The days (UTC) for which heartbeats were committed.
SELECT DISTINCT day FROM ingest_ledger
WHERE written > 0 AND day >= coalesce(($1::timestamptz AT TIME ZONE 'UTC')::date, '-infinity')
  AND day <= ($2::timestamptz AT TIME ZONE 'UTC')::date
ORDER BY day;

-- name: last_runs
-- $1: the maximum number of runs per job. $2 job[], $3 run_no[]: only runs of these jobs with a smaller run_no than the
-- one given for the job; all jobs if $2 is null.
SELECT job, run_no, started_at, ended_at, status, reason, counts::text AS counts, host
FROM (SELECT *, row_number() OVER (PARTITION BY job ORDER BY run_no DESC) AS place FROM job_runs j
      WHERE $2::text[] IS NULL
         OR EXISTS (SELECT 1 FROM unnest($2::text[], $3::bigint[]) AS c (job, before)
                    WHERE c.job = j.job AND j.run_no < c.before)) r
WHERE place <= $1
ORDER BY job, run_no DESC;

-- name: last_success
-- $1 until: a later time was recorded by a clock that was ahead, and does not count. For the metrics: the runs of every
-- daemon count.
SELECT job, max(ended_at) AS at FROM job_runs WHERE status = 'completed' AND ended_at <= $1 GROUP BY job
UNION ALL
SELECT 'drill', greatest((SELECT max(drilled_at) FROM hb_partitions WHERE drilled_at <= $1),
                         (SELECT max(drilled_at) FROM archive_supplements WHERE drilled_at <= $1));

-- name: states
-- For the metrics: the number of days in each state.
SELECT state, count(*) AS days FROM hb_partitions GROUP BY state;

-- name: drift
-- For the metrics: the share of wrong rows in the last reconciliation, whichever daemon or command ran it.
SELECT coalesce((counts ->> 'wrong')::float8 / nullif((counts ->> 'checked')::float8, 0), 0) FROM job_runs
WHERE job = 'reconcile' AND status = 'completed'
ORDER BY run_no DESC LIMIT 1;

-- name: next_device
-- Where the last reconciliation stopped.
SELECT (counts ->> 'next_device_no')::int FROM job_runs
WHERE job = 'reconcile' AND status = 'completed'
ORDER BY run_no DESC
LIMIT 1;

-- name: prune_runs
-- $1: delete the runs that started before this time.
DELETE FROM job_runs WHERE started_at < $1;

-- name: prune_comparisons
-- $1: delete the comparisons of perf_diff before this time.
DELETE FROM perf_diff_comparisons WHERE compared_at < $1;

-- name: prune_flag_changes
-- $1: delete the changes before this time.
DELETE FROM feature_flag_changes WHERE changed_at < $1;

-- name: inactivate
-- Marks the devices that were last seen before $1 as inactive. Uses the index of the offline query. A device's next
-- heartbeat makes it active again.
UPDATE device_last_status SET status = 'inactive'
WHERE status = 'ok' AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int AND heard_at < $1;
