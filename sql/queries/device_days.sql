-- device_days: what each device did on each UTC day. `$table` is the day's table, or device_heartbeats for days that
-- are not made yet. Neither device_heartbeats nor device_last_status is joined with another table.

-- name: edges
-- $1 device_no[]; $2, $3: the day's start and end; $4: from when heartbeats before the day are looked at; $5: the
-- interval of a device with fewer than three distances, or with distances of more than an hour, in seconds; $6: the
-- offline threshold in seconds.
--
-- Returns the heartbeats that begin a stretch (nexhb/watching/uptime.py) and the last heartbeat of each device: a healthy
-- device has two rows, instead of 1,440. `begins` distinguishes the two kinds. Times are seconds since the epoch, and
-- …_before is the device's previous heartbeat. Each row repeats what is usual for the device: interval_s is the median
-- distance, and skew_s the median of received_at - ts. The day has live heartbeats if at least one arrived within the
-- offline threshold, or if heartbeats over more than twice that time were late by the same time (a slow clock). If most
-- heartbeats were replayed, skew_s is the least received_at - ts; if all were, it is 0.
WITH history AS (
    SELECT device_no, bucket, ts, received_at, uptime_s, unity_running, battery_pct FROM $table
    WHERE device_no = ANY($1::int[]) AND ts >= $2 AND ts < $3
    UNION ALL
    SELECT device_no, bucket, ts, received_at, uptime_s, unity_running, NULL FROM device_heartbeats
    WHERE device_no = ANY($1::int[]) AND ts >= $4 AND ts < $2
      AND bucket > floor(extract(epoch FROM $4::timestamptz))::bigint - 1577836800 - 3600
      AND bucket <= floor(extract(epoch FROM $2::timestamptz))::bigint - 1577836800
    UNION ALL
    SELECT device_no, bucket, ts, received_at, uptime_s, unity_running, battery_pct FROM late_heartbeats
    WHERE device_no = ANY($1::int[]) AND ts >= $4 AND ts < $3
),
beats AS MATERIALIZED (
    SELECT *, lag(at) OVER w AS at_before, lag(received) OVER w AS received_before, lag(unity) OVER w AS unity_before,
           lead(at) OVER w IS NULL AS is_last
    FROM (SELECT device_no, bucket, date_part('epoch', ts) AS at, date_part('epoch', received_at) AS received,
                 uptime_s, unity_running AS unity, battery_pct FROM history) h
    WINDOW w AS (PARTITION BY device_no ORDER BY bucket)
),
measured AS (
    SELECT device_no, count(at_before) AS distances, min(received - at) AS least_s, max(at) - min(at) AS span_s,
           percentile_disc(0.5) WITHIN GROUP (ORDER BY at - at_before) AS interval_s,
           percentile_disc(0.5) WITHIN GROUP (ORDER BY received - at) AS median_s,
           min(battery_pct) AS battery_least
    FROM beats GROUP BY device_no
),
usual AS (
    SELECT device_no, battery_least,
           CASE WHEN distances < 3 OR interval_s > 3600 THEN $5 ELSE interval_s END AS interval_s,
           CASE WHEN median_s - least_s <= $6 AND (least_s <= $6 OR span_s > 2 * $6) THEN median_s
                WHEN least_s <= $6 THEN least_s
                ELSE 0 END AS skew_s
    FROM measured
),
judged AS (
    SELECT b.*, u.interval_s, u.skew_s, u.battery_least, received - at > skew_s + $6 AS late,
           at_before IS NULL OR at - at_before > 1.5 * interval_s OR unity IS DISTINCT FROM unity_before
               OR uptime_s < at - at_before OR received < received_before
               OR (received - at > skew_s + $6) <> (received_before - at_before > skew_s + $6) AS begins
    FROM beats b JOIN usual u USING (device_no)
)
SELECT device_no, at, received, at_before, received_before, late, uptime_s, unity, begins, interval_s, skew_s,
       battery_least
FROM judged WHERE begins OR is_last
ORDER BY device_no, bucket;

-- name: first_heartbeats
-- $1 device_no[]; $2 from (inclusive), $3 to (exclusive). The first heartbeat of each device in this time.
SELECT DISTINCT ON (device_no) device_no, date_part('epoch', ts) AS at, date_part('epoch', received_at) AS received,
       uptime_s
FROM device_heartbeats
WHERE device_no = ANY($1::int[]) AND ts >= $2 AND ts < $3
  AND bucket > floor(extract(epoch FROM $2::timestamptz))::bigint - 1577836800 - 3600
  AND bucket <= floor(extract(epoch FROM $3::timestamptz))::bigint - 1577836800
ORDER BY device_no, bucket;

-- name: last_heartbeats
-- $1 device_no[]; $2 from (inclusive), $3 to (exclusive). The time of each device's last heartbeat in this time.
SELECT DISTINCT ON (device_no) device_no, date_part('epoch', ts) AS at
FROM device_heartbeats
WHERE device_no = ANY($1::int[]) AND ts >= $2 AND ts < $3
  AND bucket > floor(extract(epoch FROM $2::timestamptz))::bigint - 1577836800 - 3600
  AND bucket <= floor(extract(epoch FROM $3::timestamptz))::bigint - 1577836800
ORDER BY device_no, bucket DESC;

-- name: devices
-- $1: after this device_no; $2: the limit; $3: the day's start; $4 device_no[], null: all. Devices that were not revoked
-- before the day.
SELECT device_no, site, created_at, revoked_at FROM devices
WHERE device_no > $1 AND (revoked_at IS NULL OR revoked_at > $3) AND ($4::int[] IS NULL OR device_no = ANY($4))
ORDER BY device_no
LIMIT $2;

-- name: sites
-- $1 site[].
SELECT site, zone, hours FROM sites WHERE site = ANY($1::text[]);

-- name: places_of_day
-- $1 day, $2 device_no[].
SELECT d.device_no, p.site, p.zone, p.hours FROM device_days d JOIN day_places p USING (place_no)
WHERE d.day = $1 AND d.device_no = ANY($2::int[]);

-- name: add_places
-- $1 site[], $2 zone[], $3 hours[].
INSERT INTO day_places (site, zone, hours)
SELECT site, zone, hours FROM unnest($1::text[], $2::text[], $3::text[]) AS p (site, zone, hours)
WHERE NOT EXISTS (SELECT FROM day_places k
                  WHERE (k.site, k.zone, k.hours) IS NOT DISTINCT FROM (p.site, p.zone, p.hours))
ON CONFLICT DO NOTHING;

-- name: place_numbers
-- $1 site[], $2 zone[], $3 hours[].
SELECT k.place_no, p.site, p.zone, p.hours
FROM unnest($1::text[], $2::text[], $3::text[]) AS p (site, zone, hours)
JOIN day_places k ON (k.site, k.zone, k.hours) IS NOT DISTINCT FROM (p.site, p.zone, p.hours);

-- name: blackouts
-- $1 from, $2 to. The times in which nexhb could not receive heartbeats, as seconds since the epoch.
SELECT date_part('epoch', began_at) AS began, date_part('epoch', ended_at) AS ended FROM blackouts
WHERE ended_at > $1 AND began_at < $2 ORDER BY began_at;

-- name: written
-- $1 day. How many heartbeats of the day were committed.
SELECT coalesce(sum(written), 0)::bigint FROM ingest_ledger WHERE day = $1;

-- name: delete_days
-- $1 day; $2 and $3: the first and the last device_no; $4 device_no[], null: all.
DELETE FROM device_days
WHERE day = $1 AND device_no BETWEEN $2 AND $3 AND ($4::int[] IS NULL OR device_no = ANY($4));

-- name: made
-- $1 day, $2 the ledger's count from before the day's rows were read, $3 now.
INSERT INTO days_made (day, written, made_at) VALUES ($1, $2, $3)
ON CONFLICT (day) DO UPDATE SET written = excluded.written, made_at = excluded.made_at;

-- name: due
-- $1 day[]: days that are over and whose table exists. Returns those to make: the days that were not made yet, if any
-- device existed or any heartbeat was committed for them; and the days with more heartbeats than when they were made.
SELECT d.day, m.day IS NULL AS is_new
FROM unnest($1::date[]) AS d (day)
LEFT JOIN days_made m USING (day)
LEFT JOIN (SELECT day, sum(written) AS written FROM ingest_ledger WHERE day = ANY($1::date[]) GROUP BY day) l USING (day)
WHERE m.written IS DISTINCT FROM coalesce(l.written, 0)
  AND (l.written > 0 OR m.day IS NOT NULL
       OR EXISTS (SELECT FROM devices WHERE created_at < (d.day + 1)::timestamp AT TIME ZONE 'UTC'));

-- name: open_devices
-- $1 day[]. The devices of which a day has a silence that had not ended when the day was made.
SELECT DISTINCT device_no FROM device_days WHERE is_open AND day = ANY($1::date[]);

-- name: heard
-- $1 device_no[]. When each device was last heard.
SELECT device_no, heard_at FROM device_last_status WHERE device_no = ANY($1::int[]);

-- name: ended
-- $1 day[]; $2 device_no[], $3 heard_at[]: of devices with open silences. Returns for each day the devices that were
-- heard after the day: their silence has ended.
SELECT d.day, array_agg(d.device_no) AS devices
FROM device_days d JOIN unnest($2::int[], $3::timestamptz[]) AS h (device_no, heard_at) USING (device_no)
WHERE d.is_open AND d.day = ANY($1::date[]) AND h.heard_at >= (d.day + 1)::timestamp AT TIME ZONE 'UTC'
GROUP BY d.day;

-- name: has_month
-- $1: the name of a month's table.
SELECT EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'device_days'::regclass AND inhrelid = to_regclass($1));

-- name: months_before
-- $1: the name of a month's table. The earlier months; their names sort like their months.
SELECT c.relname AS name FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'device_days'::regclass AND c.relname ~ '^device_days_\d{6}$' AND c.relname < $1
ORDER BY c.relname;

-- name: forget_made
-- $1: the first day to keep.
DELETE FROM days_made WHERE day < $1;

-- name: oldest
-- The start of the oldest day of which heartbeats are in the database.
SELECT min(range_start) FROM hb_partitions p
WHERE EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'device_heartbeats'::regclass
              AND inhrelid = to_regclass(quote_ident(p.partition_name)));
