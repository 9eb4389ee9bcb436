-- What operators read of the watcher's records. Scopes of sites are arrays: null means every site.

-- name: events
-- $1 from (inclusive), $2 to (exclusive), by `at`; $3 site[], $4 kind[], $5 device_no: null for all; $6: only events with a
-- lower number; $7 the limit. Newest first.
SELECT e.event_id, e.at, e.since, d.device_id, e.site, e.kind, e.cause, e.evidence::text AS evidence, e.incident_id
FROM device_events e LEFT JOIN devices d USING (device_no)
WHERE e.at >= $1 AND e.at < $2
  AND ($3::text[] IS NULL OR e.site = ANY($3)) AND ($4::text[] IS NULL OR e.kind = ANY($4))
  AND ($5::int IS NULL OR e.device_no = $5) AND e.event_id < $6
ORDER BY e.event_id DESC LIMIT $7;

-- name: events_ascending
-- As events, but oldest first; $6: only events with a higher number.
SELECT e.event_id, e.at, e.since, d.device_id, e.site, e.kind, e.cause, e.evidence::text AS evidence, e.incident_id
FROM device_events e LEFT JOIN devices d USING (device_no)
WHERE e.at >= $1 AND e.at < $2
  AND ($3::text[] IS NULL OR e.site = ANY($3)) AND ($4::text[] IS NULL OR e.kind = ANY($4))
  AND ($5::int IS NULL OR e.device_no = $5) AND e.event_id > $6
ORDER BY e.event_id LIMIT $7;

-- name: newest
-- The newest event, and the last round that the watcher has completed.
SELECT coalesce(max(event_id), 0) AS event_id, (SELECT round_at FROM watch) AS round_at FROM device_events;

-- name: recorded_at
-- $1 event_id. When this event, or the last one before it, was recorded.
SELECT at FROM device_events WHERE event_id <= $1 ORDER BY event_id DESC LIMIT 1;

-- name: changed_incidents
-- $1, $2: only incidents that changed after this time, or at this time with a higher number; $3: and not after this time,
-- that of the last complete round: all changes of a round have its time. $4 site[], $5 kind[], $6 device_no: null for all; $7
-- the limit. `change` is the last one. The columns are those of `incidents`, and absorbed_into.
SELECT * FROM (
    SELECT i.incident_id, i.kind, i.scope, i.site, i.severity, i.cause, i.since, i.opened_at, i.resolved_at, i.settled_at,
           i.acked_at, i.acked_by, i.members, i.devices, i.continues, i.absorbed_into, i.evidence::text AS evidence,
           (SELECT coalesce(array_agg(n.device_id ORDER BY n.device_id), '{}')
            FROM (SELECT d.device_id FROM incident_devices m JOIN devices d USING (device_no)
                  WHERE m.incident_id = i.incident_id AND (m.left_at IS NULL OR i.resolved_at IS NOT NULL)
                  ORDER BY d.device_id LIMIT 20) n) AS named,
           CASE WHEN i.resolved_at IS NOT NULL THEN 'resolved' WHEN i.evidence->>'widened_at' IS NOT NULL THEN 'widened'
                ELSE 'opened' END AS change,
           coalesce(i.resolved_at, (i.evidence->>'widened_at')::timestamptz, i.opened_at) AS changed_at
    FROM incidents i
    WHERE (i.resolved_at IS NULL OR i.resolved_at >= $1)
      AND ($4::text[] IS NULL OR i.site = ANY($4)) AND ($5::text[] IS NULL OR i.kind = ANY($5))
      AND ($6::int IS NULL OR EXISTS (SELECT 1 FROM incident_devices m
                                      WHERE m.incident_id = i.incident_id AND m.device_no = $6))
) c
WHERE (c.changed_at, c.incident_id) > ($1::timestamptz, $2::bigint) AND c.changed_at <= $3
ORDER BY c.changed_at, c.incident_id LIMIT $7;

-- name: incidents
-- $1: whether to return only open incidents; $2 site[], null for all; $3: only incidents with a lower number; $4 the
-- limit. Newest first. Incidents that another one has absorbed are not shown. `devices`: all devices that had the fault;
-- `members`: those that have it now; `named`: up to twenty of these, or of all devices if the incident is resolved.
SELECT i.incident_id, i.kind, i.scope, i.site, i.severity, i.cause, i.since, i.opened_at, i.resolved_at, i.settled_at,
       i.acked_at, i.acked_by, i.members, i.devices, i.continues, i.evidence::text AS evidence,
       (SELECT coalesce(array_agg(n.device_id ORDER BY n.device_id), '{}')
        FROM (SELECT d.device_id FROM incident_devices m JOIN devices d USING (device_no)
              WHERE m.incident_id = i.incident_id AND (m.left_at IS NULL OR i.resolved_at IS NOT NULL)
              ORDER BY d.device_id LIMIT 20) n) AS named
FROM incidents i
WHERE i.absorbed_into IS NULL AND (NOT $1 OR i.resolved_at IS NULL)
  AND ($2::text[] IS NULL OR i.site = ANY($2)) AND i.incident_id < $3
ORDER BY i.incident_id DESC LIMIT $4;

-- name: watched_device
-- $1 device_id. Since when the watcher knows the device, and its present state.
SELECT d.device_no, d.site, d.created_at, d.revoked_at, s.presence, s.presence_since,
       (SELECT adopted_at FROM watch) AS adopted_at
FROM devices d LEFT JOIN device_state s USING (device_no)
WHERE d.device_id = $1;

-- name: outages
-- $1 device_no, $2 from, $3 to, $4 the limit. The outages that touch this time, oldest first.
SELECT since, until, cause, settled_at, evidence::text AS evidence, incident_id
FROM device_outages
WHERE device_no = $1 AND since < $3 AND (until IS NULL OR until > $2)
ORDER BY since LIMIT $4;
