-- Sites, and the devices of a site. `devices` counts the devices of a site that are not revoked; `online`, `offline` and
-- `unity_down` count those in a state that the watcher has established. The states are read by the numbers of a site's
-- devices: otherwise the planner may read the states of the whole fleet for one site.

-- name: set
-- $1 site, $2 name, $3 zone, $4 hours. Creates the site or replaces all of it. A site that stays as it was keeps changed_at.
INSERT INTO sites AS s (site, name, zone, hours) VALUES ($1, $2, $3, $4)
ON CONFLICT (site) DO UPDATE SET
    name = excluded.name, zone = excluded.zone, hours = excluded.hours,
    changed_at = CASE WHEN (s.name, s.zone, s.hours) IS DISTINCT FROM (excluded.name, excluded.zone, excluded.hours)
                      THEN now() ELSE s.changed_at END
RETURNING xmax = 0 AS created;

-- name: page
-- $1: the last site of the previous page ('' to start), $2: the limit; $3 the only sites to return, null for all.
SELECT site, name, zone, hours, d.devices, c.online, c.offline, c.unity_down
FROM sites s
CROSS JOIN LATERAL (
    SELECT count(*) AS devices, array_agg(device_no) AS numbers
    FROM devices WHERE devices.site = s.site AND revoked_at IS NULL
) d
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE presence = 'online') AS online, count(*) FILTER (WHERE presence = 'offline') AS offline,
           count(*) FILTER (WHERE unity = 'down') AS unity_down
    FROM device_state WHERE device_no = ANY(d.numbers)
) c
WHERE site > $1 AND ($3::text[] IS NULL OR site = ANY($3))
ORDER BY site
LIMIT $2;

-- name: hold
-- $1 site. The row is locked, so that no device is assigned to the site while it is removed.
SELECT site FROM sites WHERE site = $1 FOR UPDATE;

-- name: count_devices
-- $1 site.
SELECT count(*) FROM devices WHERE site = $1 AND revoked_at IS NULL;

-- name: release_revoked
-- $1 site. Revoked devices do not keep a site from being removed.
UPDATE devices SET site = NULL WHERE site = $1 AND revoked_at IS NOT NULL;

-- name: remove
-- $1 site. Enrolment keys that name the site stay valid, and name none from then on.
DELETE FROM sites WHERE site = $1;
