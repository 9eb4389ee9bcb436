-- Messages about incidents: what each route was told, the outbox, silences.

-- name: incidents_now
-- $1 since when. Open incidents; those whose opening a route was told of, but not their end; and those that continue
-- another and were resolved since $1 without any record of what routes were sent; with everything that may make a message due.
SELECT i.incident_id, i.scope, i.severity, i.members, i.resolved_at, i.acked_at IS NOT NULL AS is_acked,
       i.quiet OR i.absorbed_into IS NOT NULL AS untold
FROM incidents i WHERE i.resolved_at IS NULL
UNION ALL
SELECT i.incident_id, i.scope, i.severity, i.members, i.resolved_at, i.acked_at IS NOT NULL,
       i.quiet OR i.absorbed_into IS NOT NULL
FROM incidents i
WHERE i.resolved_at IS NOT NULL
  AND (i.incident_id IN (SELECT t.incident_id FROM incident_routes t WHERE t.resolved_at IS NULL)
       OR i.incident_id IN (SELECT c.incident_id FROM incidents c WHERE c.resolved_at > $1 AND c.continues IS NOT NULL
                            AND NOT EXISTS (SELECT 1 FROM incident_routes t WHERE t.incident_id = c.incident_id)))
ORDER BY incident_id;

-- name: incidents_to_tell
-- $1 incident_id[].
SELECT i.incident_id, i.kind, i.scope, i.site, i.severity, i.cause, i.since, i.opened_at, i.resolved_at, i.acked_at,
       i.quiet OR i.absorbed_into IS NOT NULL AS untold, i.members, i.devices, i.evidence::text AS evidence,
       d.device_id, coalesce(d.name, d.alias) AS device_name, coalesce(d.tags, '{}') AS tags, s.name AS site_name,
       s.zone, s.hours
FROM incidents i
LEFT JOIN devices d USING (device_no)
LEFT JOIN sites s ON s.site = i.site
WHERE i.incident_id = ANY($1::bigint[])
ORDER BY i.incident_id;

-- name: told
-- $1 incident_id[].
SELECT incident_id, route, scope, reminded_at, resolved_at FROM incident_routes WHERE incident_id = ANY($1::bigint[]);

-- name: told_before
-- $1 incident_id[]. What routes were told of the incidents that these continue or have absorbed, the latest first.
SELECT i.incident_id, i.kind, p.kind AS earlier_kind, r.route, r.scope, r.reminded_at
FROM incidents i JOIN incidents p ON p.incident_id = i.continues JOIN incident_routes r ON r.incident_id = p.incident_id
WHERE i.incident_id = ANY($1::bigint[])
UNION ALL
SELECT i.incident_id, i.kind, p.kind, r.route, r.scope, r.reminded_at
FROM incidents i JOIN incidents p ON p.absorbed_into = i.incident_id
JOIN incident_routes r ON r.incident_id = p.incident_id
WHERE i.incident_id = ANY($1::bigint[])
ORDER BY 6 DESC;

-- name: tags_of
-- $1 incident_id[], $2 tag[]. Which of these tags the devices of these incidents have.
SELECT m.incident_id, array_agg(DISTINCT t.tag) AS tags
FROM incident_devices m JOIN devices d USING (device_no) CROSS JOIN LATERAL unnest(d.tags) AS t (tag)
WHERE m.incident_id = ANY($1::bigint[]) AND d.tags && $2::text[] AND t.tag = ANY($2::text[])
GROUP BY m.incident_id;

-- name: silenced
-- $1 incident_id[], $2 site[], $3 tag[], $4 device_id[]. The incidents all of whose devices are silenced.
SELECT n.incident_id FROM unnest($1::bigint[]) AS n (incident_id)
WHERE EXISTS (SELECT 1 FROM incident_devices m WHERE m.incident_id = n.incident_id)
  AND NOT EXISTS (SELECT 1 FROM incident_devices m JOIN devices d USING (device_no)
                  WHERE m.incident_id = n.incident_id AND d.device_id <> ALL ($4::text[])
                    AND coalesce(d.site <> ALL ($2::text[]), true) AND NOT d.tags && $3::text[]);

-- name: add_notifications
-- $1 incident_id[], $2 route[], $3 kind[], $4 payload[] (JSON), $5 now.
INSERT INTO notifications (id, incident_id, route, kind, payload, created_at, due_at)
SELECT 'msg_' || replace(gen_random_uuid()::text, '-', ''), incident_id, route, kind, payload::jsonb, $5, $5
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) WITH ORDINALITY
    AS n (incident_id, route, kind, payload, position)
ORDER BY position;

-- name: note_told
-- $1 incident_id[], $2 route[], $3 scope[], $4 reminded_at[], $5 is_resolved[], $6 now.
INSERT INTO incident_routes (incident_id, route, opened_at, scope, reminded_at, resolved_at)
SELECT incident_id, route, $6::timestamptz, scope, reminded_at, CASE WHEN is_resolved THEN $6::timestamptz END
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::timestamptz[], $5::bool[])
    AS n (incident_id, route, scope, reminded_at, is_resolved)
ON CONFLICT (incident_id, route) DO UPDATE
    SET scope = excluded.scope, reminded_at = excluded.reminded_at, resolved_at = excluded.resolved_at;

-- name: wake
SELECT pg_notify('nexhb_notifications', '');

-- name: acknowledge
-- $1 incident_id, $2 now, $3 by. The first acknowledgement counts. Returns null if there is no such incident.
UPDATE incidents SET acked_at = coalesce(acked_at, $2), acked_by = coalesce(acked_by, $3) WHERE incident_id = $1
RETURNING incident_id, acked_at, acked_by, resolved_at;

-- ---- incidents of nexhb itself ------------------------------------------------------------------------------------

-- name: nightly_failure
-- Why the last nightly run failed, and when; no row if it succeeded.
SELECT reason, started_at FROM (
    SELECT status, reason, started_at FROM job_runs WHERE job = 'nightly' AND status IN ('completed', 'failed')
    ORDER BY run_no DESC LIMIT 1) last
WHERE status = 'failed';

-- name: open_own
-- $1 kind[], $2 severity[], $3 detail[], $4 now.
INSERT INTO incidents (kind, scope, severity, since, opened_at, evidence)
SELECT kind, 'ours', severity, $4, $4, jsonb_build_object('detail', detail)
FROM unnest($1::text[], $2::text[], $3::text[]) AS n (kind, severity, detail)
ON CONFLICT DO NOTHING;

-- name: resolve_own
-- $1 kind[] of the troubles that nexhb can have, $2 kind[] of those that it has, $3 now.
UPDATE incidents SET resolved_at = $3
WHERE scope = 'ours' AND resolved_at IS NULL AND kind = ANY($1::text[]) AND kind <> ALL ($2::text[]);

-- ---- delivery -----------------------------------------------------------------------------------------------------

-- name: routes_with_messages
-- $1 now. Routes that have a message to deliver now.
SELECT DISTINCT route FROM notifications
WHERE delivered_at IS NULL AND given_up_at IS NULL AND due_at <= $1 AND (lease_until IS NULL OR lease_until < $1);

-- name: claim
-- $1 route, $2 now, $3 lease_until, $4 limit. Of each incident only the oldest message is claimed.
WITH next AS (
    SELECT n.notification_no FROM notifications n
    WHERE n.route = $1 AND n.delivered_at IS NULL AND n.given_up_at IS NULL AND n.due_at <= $2
      AND (n.lease_until IS NULL OR n.lease_until < $2)
      AND NOT EXISTS (SELECT 1 FROM notifications e
                      WHERE e.incident_id = n.incident_id AND e.route = n.route
                        AND e.notification_no < n.notification_no
                        AND e.delivered_at IS NULL AND e.given_up_at IS NULL)
    ORDER BY n.notification_no LIMIT $4
    FOR UPDATE SKIP LOCKED
)
UPDATE notifications n SET lease_until = $3, attempts = n.attempts + 1
FROM next WHERE n.notification_no = next.notification_no
RETURNING n.id, n.kind, n.payload::text AS payload, n.created_at, n.attempts;

-- name: delivered
-- $1 id, $2 now. An id, not a number: the database may have been replaced meanwhile.
UPDATE notifications SET delivered_at = $2, lease_until = NULL WHERE id = $1 AND delivered_at IS NULL;

-- name: failed
-- $1 id, $2 the lease under which the attempt was made, $3 due_at, $4 error. If the lease has expired,
-- another daemon may be sending it.
UPDATE notifications SET lease_until = NULL, due_at = $3, last_error = $4
WHERE id = $1 AND lease_until = $2 AND delivered_at IS NULL;

-- name: give_up
-- $1 now, $2: messages created before this time are given up. Returns their routes.
UPDATE notifications SET given_up_at = $1, lease_until = NULL
WHERE delivered_at IS NULL AND given_up_at IS NULL AND created_at < $2 AND (lease_until IS NULL OR lease_until < $1)
RETURNING id, route, last_error;

-- name: prune
-- $1: delete the messages that ended before this time, a thousand at a time.
DELETE FROM notifications WHERE notification_no IN (
    SELECT notification_no FROM notifications WHERE created_at < $1
      AND (delivered_at IS NOT NULL OR given_up_at IS NOT NULL) ORDER BY notification_no LIMIT 1000);

-- ---- silences -----------------------------------------------------------------------------------------------------

-- name: silences
-- $1: only silences that end after this time; null: all. $2 after this silence_id, $3 limit.
SELECT silence_id, scope, value, "from", until, hours, zone, reason, created_by, created_at FROM silences
WHERE ($1::timestamptz IS NULL OR until IS NULL OR until > $1) AND silence_id > $2 ORDER BY silence_id LIMIT $3;

-- name: devices_tagged
-- $1 device_id[], $2 tag[]. Those of these devices that have one of the tags.
SELECT device_id, tags FROM devices WHERE device_id = ANY($1::text[]) AND tags && $2::text[];

-- name: count_silences
-- $1 now.
SELECT count(*) FROM silences WHERE until IS NULL OR until > $1;

-- name: add_silence
-- $1 scope, $2 value, $3 from, $4 until, $5 hours, $6 zone, $7 reason, $8 by, $9 now.
INSERT INTO silences (scope, value, "from", until, hours, zone, reason, created_by, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
RETURNING silence_id, scope, value, "from", until, hours, zone, reason, created_by, created_at;

-- name: remove_silence
-- $1 silence_id.
DELETE FROM silences WHERE silence_id = $1 RETURNING silence_id;

-- name: prune_silences
-- $1: delete the silences that ended before this time.
DELETE FROM silences WHERE until < $1;

-- name: has_site
SELECT EXISTS (SELECT 1 FROM sites WHERE site = $1);

-- name: has_tag
SELECT EXISTS (SELECT 1 FROM devices WHERE $1 = ANY (tags));

-- name: has_device
SELECT EXISTS (SELECT 1 FROM devices WHERE device_id = $1);
