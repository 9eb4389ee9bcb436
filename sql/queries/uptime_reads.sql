-- What operators read of device_days. A scope of sites is an array, in which '' stands for devices without a site; null
-- means every device. Rows are read by the numbers of places or devices, and only of days that are complete.

-- name: made
-- $1 from (inclusive), $2 to (exclusive). The days that are complete.
SELECT day FROM days_made WHERE day >= $1 AND day < $2 ORDER BY day;

-- name: places
-- $1 site[]. The numbers of their places, to which days refer.
SELECT coalesce(array_agg(place_no), '{}') FROM day_places WHERE coalesce(site, '') = ANY($1::text[]);

-- name: has_site
-- $1 site[]. Whether one of these sites exists, or existed on a day.
SELECT EXISTS (SELECT FROM sites WHERE site = ANY($1::text[]))
    OR EXISTS (SELECT FROM day_places WHERE site = ANY($1::text[]));

-- name: site_page
-- $1: the last site of the previous page, null to start; $2: the limit; $3 site[].
SELECT site
FROM (SELECT site FROM sites UNION SELECT site FROM day_places WHERE site IS NOT NULL) s
WHERE ($1::text IS NULL OR site > $1) AND ($3::text[] IS NULL OR site = ANY($3))
ORDER BY site
LIMIT $2;

-- name: device_no
-- $1 device_id.
SELECT device_no FROM devices WHERE device_id = $1;

-- name: tagged
-- $1 tag. The devices that have it now.
SELECT coalesce(array_agg(device_no), '{}') FROM devices WHERE $1::text = ANY(tags);

-- name: devices_of
-- $1 site[]. The devices that are there now.
SELECT coalesce(array_agg(device_no), '{}') FROM devices WHERE coalesce(site, '') = ANY($1::text[]);

-- name: devices_at
-- $1 from, $2 to (exclusive): a part of one month; $3 place_no[]. The devices that were there on one of these days.
SELECT coalesce(array_agg(DISTINCT device_no), '{}') FROM device_days
WHERE day >= $1 AND day < $2 AND place_no = ANY($3::int[]);

-- name: device_page
-- $1: the last device_id of the previous page ('' to start), $2: the limit; $3 device_no[], null for all; $4: the start of
-- the range; $5 day[], sorted: days that are not complete. Devices that were not revoked before the range. days_missing:
-- on how many of the days $5 the device existed, from its creation to its revocation.
SELECT device_no, device_id, name, site, created_at, revoked_at,
       greatest(width_bucket(coalesce((revoked_at AT TIME ZONE 'UTC')::date, 'infinity'), $5::date[])
                - width_bucket((created_at AT TIME ZONE 'UTC')::date - 1, $5::date[]), 0) AS days_missing
FROM devices
WHERE device_id > $1 AND ($3::int[] IS NULL OR device_no = ANY($3)) AND (revoked_at IS NULL OR revoked_at > $4)
ORDER BY device_id
LIMIT $2;

-- name: missing_by_site
-- $1 site[]; $2 device_no[], null for all; $3 day[], sorted. days_missing as in device_page, for the devices of each site.
SELECT coalesce(site, '') AS site,
       sum(greatest(width_bucket(coalesce((revoked_at AT TIME ZONE 'UTC')::date, 'infinity'), $3::date[])
                    - width_bucket((created_at AT TIME ZONE 'UTC')::date - 1, $3::date[]), 0))::bigint AS days_missing
FROM devices
WHERE ($1::text[] IS NULL OR coalesce(site, '') = ANY($1)) AND ($2::int[] IS NULL OR device_no = ANY($2))
GROUP BY 1;

-- name: existing
-- $1 site[]; $2 device_no[], null for all; $3: the start of a day; $4: the limit. Devices that were not revoked before the
-- day, site by site.
SELECT device_no, site, created_at, revoked_at FROM devices
WHERE ($1::text[] IS NULL OR coalesce(site, '') = ANY($1)) AND ($2::int[] IS NULL OR device_no = ANY($2))
  AND (revoked_at IS NULL OR revoked_at > $3)
ORDER BY site, device_id
LIMIT $4;

-- name: existing_by_site
-- As existing, without the limit: their number in each site.
SELECT coalesce(site, '') AS site, count(*) AS devices FROM devices
WHERE ($1::text[] IS NULL OR coalesce(site, '') = ANY($1)) AND ($2::int[] IS NULL OR device_no = ANY($2))
  AND (revoked_at IS NULL OR revoked_at > $3)
GROUP BY 1;

-- name: by_device
-- $1 day[]; $2 device_no[]; $3 place_no[], null for all. One probe of the key for each day and device: the rows of a page
-- are a small part of a large fleet's. OFFSET 0 keeps the planner from reading every month to join it with the days.
SELECT u.device_no, count(*) AS days, sum(closed_tenths) AS closed, sum(ours_tenths) AS ours, sum(heard_tenths) AS heard,
       sum(replayed_tenths) AS replayed, sum(off_tenths) AS off, sum(unknown_tenths) AS unknown,
       sum(unity_tenths) AS unity, min(battery_least) AS battery_least, sum(flaps) AS flaps, sum(reboots) AS reboots
FROM unnest($1::date[]) AS d (day)
CROSS JOIN LATERAL (
    SELECT * FROM device_days u WHERE u.day = d.day AND u.device_no = ANY($2::int[]) OFFSET 0
) u
WHERE $3::int[] IS NULL OR u.place_no = ANY($3)
GROUP BY u.device_no;

-- name: by_place
-- $1 from, $2 to (exclusive): a part of one month; $3 day[]: days in it that are not complete; $4 place_no[] and
-- $5 device_no[], null for all. A row for each place, with its site.
SELECT coalesce(p.site, '') AS site, s.*
FROM (
    SELECT place_no, count(*) AS days, sum(closed_tenths) AS closed, sum(ours_tenths) AS ours, sum(heard_tenths) AS heard,
           sum(replayed_tenths) AS replayed, sum(off_tenths) AS off, sum(unknown_tenths) AS unknown,
           sum(unity_tenths) AS unity, min(battery_least) AS battery_least, sum(flaps) AS flaps, sum(reboots) AS reboots
    FROM device_days
    WHERE day >= $1 AND day < $2 AND NOT day = ANY($3::date[])
      AND ($4::int[] IS NULL OR place_no = ANY($4)) AND ($5::int[] IS NULL OR device_no = ANY($5))
    GROUP BY place_no
) s
JOIN day_places p USING (place_no);
