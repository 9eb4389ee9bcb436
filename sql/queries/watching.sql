-- A round of the watcher. Each statement names its devices in an array, so that device_last_status and
-- device_heartbeats are joined with no other table.

-- name: watch
-- Returns which database the last round used, in which version of the rules, and when; and whether a loss of this
-- database was found since the watcher last adopted its state.
SELECT w.database, w.rules, w.adopted_at, w.round_at,
       EXISTS (SELECT FROM database_missing WHERE found_at > w.adopted_at) AS older_copy
FROM watch w;

-- name: database
-- Identifies this database: a copy that was restored elsewhere has another identity.
SELECT (SELECT system_identifier FROM pg_control_system()) || '/' || oid FROM pg_database
WHERE datname = current_database();

-- name: adopted
-- $1 database, $2 rules, $3 now.
INSERT INTO watch (database, rules, adopted_at, round_at) VALUES ($1, $2, $3, $3)
ON CONFLICT (one) DO UPDATE SET database = $1, rules = $2, adopted_at = $3, round_at = $3;

-- name: round_done
-- $1 now. Wakes the streams of all daemons: the incidents that the round changed are complete.
WITH done AS (UPDATE watch SET round_at = $1 RETURNING 1)
SELECT pg_notify('nexhb_events', '') FROM done;

-- name: forget_state
-- Before a state is adopted: what the watcher knew no longer counts. Events and incidents are kept.
WITH states AS (DELETE FROM device_state),
     changes AS (DELETE FROM device_changes),
     members AS (UPDATE incident_devices SET left_at = $1 WHERE left_at IS NULL),
     outages AS (UPDATE device_outages SET until = greatest(since, $1), settle_at = NULL WHERE until IS NULL)
UPDATE incidents SET resolved_at = $1, members = 0, quiet = true WHERE resolved_at IS NULL;

-- name: to_judge
-- $1: the last device_no of the previous page; $2: the last one of this page; $3, $4: the condition for silent, as in
-- `silent`; $5: the delay after which a heartbeat is late; $6 device_no[] of devices with a tag that has thresholds. The
-- devices that adopt_ordinary leaves out.
SELECT device_no, status, heard_at, last_ts AS ts, received_at, clock_wrong, uptime_s, battery_pct, plugged,
       unity_running, agent_version, unity_pkg_version
FROM device_last_status
WHERE device_no > $1 AND device_no <= $2
  AND (heard_at < $3 AND NOT heard_at <@ $4::text::tstzmultirange OR received_at - last_ts > $5
       OR device_no = ANY($6::int[]));

-- name: tagged
-- $1, $2: as in to_judge; $3 tag[]. The devices that have one of these tags.
SELECT device_no FROM devices WHERE device_no > $1 AND device_no <= $2 AND tags && $3::text[];

-- name: adopt_ordinary
-- $1 to $6: as in to_judge; $7 battery_low_pct. Adopts the devices of a page that are neither silent nor late nor tagged,
-- by the rules of nexhb/watching/state.py (adopted_state); a test keeps the two equal. A million devices take seconds.
INSERT INTO device_state (
    device_no, presence, presence_since, unity, unity_since, battery, battery_since, clock, clock_since, agent_version,
    unity_pkg_version, adopted)
SELECT device_no, 'online', heard_at,
       CASE WHEN unity_running THEN 'running' WHEN NOT unity_running THEN 'down' END,
       CASE WHEN unity_running IS NOT NULL THEN received_at END,
       CASE WHEN battery_pct <= $7 THEN 'low' WHEN battery_pct > $7 THEN 'ok' END,
       CASE WHEN battery_pct IS NOT NULL THEN received_at END,
       CASE WHEN clock_wrong THEN 'wrong' ELSE 'right' END, received_at, agent_version, unity_pkg_version,
       array_remove(ARRAY[CASE WHEN NOT unity_running THEN 'unity_down' END,
                          CASE WHEN battery_pct <= $7 THEN 'battery_low' END,
                          CASE WHEN clock_wrong THEN 'clock_wrong' END], NULL)
FROM device_last_status
WHERE device_no > $1 AND device_no <= $2
  AND NOT (heard_at < $3 AND NOT heard_at <@ $4::text::tstzmultirange OR received_at - last_ts > $5
           OR device_no = ANY($6::int[]));

-- name: page_end
-- $1: the last device_no of the previous page; $2: the number of devices on a page. Returns the last device_no of the page.
SELECT max(device_no) FROM (
    SELECT device_no FROM device_last_status WHERE device_no > $1 ORDER BY device_no LIMIT $2) page;

-- name: changes
-- $1: the limit. The oldest changes first. A device's changes are in the order of its heartbeats, because each locks the
-- device's status until it is committed.
SELECT change_no, device_no, changes, heard_at, ts, received_at, clock_wrong, uptime_s, battery_pct, plugged,
       unity_running, agent_version, unity_pkg_version
FROM device_changes ORDER BY change_no LIMIT $1;

-- name: forget_changes
-- $1 change_no[].
DELETE FROM device_changes WHERE change_no = ANY($1::bigint[]);

-- name: silent
-- Devices that were last heard before $1, but not within $2 (a tstzmultirange as text), the longest silence first; the
-- page starts after the device that was last heard at $3 and has the device_no $4; $5: the limit.
SELECT device_no, heard_at FROM device_last_status
WHERE status = 'ok'
  AND heard_slot <= floor(extract(epoch FROM $1::timestamptz) / 300)::int
  AND heard_slot >= floor(extract(epoch FROM $3::timestamptz) / 300)::int
  AND heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange
  AND (heard_at, device_no) > ($3::timestamptz, $4::int)
ORDER BY heard_slot, heard_at, device_no LIMIT $5;

-- name: due
-- $1 now; the page starts after the due_at $2 and the device_no $3; $4 the limit.
SELECT device_no, due_at FROM device_state
WHERE due_at <= $1 AND (due_at, device_no) > ($2::timestamptz, $3::int)
ORDER BY due_at, device_no LIMIT $4;

-- name: hold_states
-- $1 device_no[]. Locks the states for this transaction.
SELECT device_no, presence, presence_since, unity, unity_since, battery, battery_since, clock, clock_since,
       agent_version, unity_pkg_version, interval_s, skew_s, flips, flapping_since, adopted, due_at, revision
FROM device_state WHERE device_no = ANY($1::int[]) ORDER BY device_no FOR UPDATE;

-- name: contents
-- $1 device_no[].
SELECT device_no, status, heard_at, last_ts AS ts, received_at, clock_wrong, uptime_s, battery_pct, plugged,
       unity_running, agent_version, unity_pkg_version
FROM device_last_status WHERE device_no = ANY($1::int[]);

-- name: devices
-- $1 device_no[].
SELECT device_no, device_id, site, tags, revoked_at IS NULL AS active FROM devices WHERE device_no = ANY($1::int[]);

-- name: last_heartbeats
-- $1 device_no[]; $2, $3: the earliest and the latest ts. The last eleven heartbeats of each device, newest first.
SELECT n.device_no, last.ts, last.received_at
FROM unnest($1::int[]) n (device_no)
CROSS JOIN LATERAL (
    SELECT array_agg(ts ORDER BY bucket DESC) AS ts, array_agg(received_at ORDER BY bucket DESC) AS received_at
    FROM (SELECT ts, received_at, bucket FROM device_heartbeats h
          WHERE h.device_no = n.device_no AND h.ts > $2 AND h.ts <= $3
            AND h.bucket > floor(extract(epoch FROM $2::timestamptz))::bigint - 1577836800 - 3600
          ORDER BY h.bucket DESC LIMIT 11) newest
) last
WHERE last.ts IS NOT NULL;

-- name: insert_states
-- One array for each column of device_state but revision, in its order. Returns the devices that had no state yet.
INSERT INTO device_state (
    device_no, presence, presence_since, unity, unity_since, battery, battery_since, clock, clock_since, agent_version,
    unity_pkg_version, interval_s, skew_s, flips, flapping_since, adopted, due_at)
SELECT device_no, presence, presence_since, unity, unity_since, battery, battery_since, clock, clock_since,
       agent_version, unity_pkg_version, interval_s, skew_s, flips::timestamptz[], flapping_since, adopted::text[], due_at
FROM unnest($1::int[], $2::text[], $3::timestamptz[], $4::text[], $5::timestamptz[], $6::text[], $7::timestamptz[],
            $8::text[], $9::timestamptz[], $10::text[], $11::text[], $12::real[], $13::real[], $14::text[],
            $15::timestamptz[], $16::text[], $17::timestamptz[])
    AS n (device_no, presence, presence_since, unity, unity_since, battery, battery_since, clock, clock_since,
          agent_version, unity_pkg_version, interval_s, skew_s, flips, flapping_since, adopted, due_at)
ON CONFLICT DO NOTHING
RETURNING device_no;

-- name: update_states
-- As insert_states, and $18: the revisions that were read. A state that has changed since is not written, so that two
-- daemons cannot both record a change. Returns the devices whose state was written.
UPDATE device_state s SET
    presence = n.presence, presence_since = n.presence_since, unity = n.unity, unity_since = n.unity_since,
    battery = n.battery, battery_since = n.battery_since, clock = n.clock, clock_since = n.clock_since,
    agent_version = n.agent_version, unity_pkg_version = n.unity_pkg_version, interval_s = n.interval_s,
    skew_s = n.skew_s, flips = n.flips::timestamptz[], flapping_since = n.flapping_since, adopted = n.adopted::text[],
    due_at = n.due_at, revision = s.revision + 1
FROM unnest($1::int[], $2::text[], $3::timestamptz[], $4::text[], $5::timestamptz[], $6::text[], $7::timestamptz[],
            $8::text[], $9::timestamptz[], $10::text[], $11::text[], $12::real[], $13::real[], $14::text[],
            $15::timestamptz[], $16::text[], $17::timestamptz[], $18::int[])
    AS n (device_no, presence, presence_since, unity, unity_since, battery, battery_since, clock, clock_since,
          agent_version, unity_pkg_version, interval_s, skew_s, flips, flapping_since, adopted, due_at, revision)
WHERE s.device_no = n.device_no AND s.revision = n.revision
RETURNING s.device_no;

-- name: add_events
-- $1 at; $2 since[], $3 device_no[], $4 site[], $5 kind[], $6 cause[], $7 evidence[] (JSON), $8 incident_id[].
INSERT INTO device_events (at, since, device_no, site, kind, cause, evidence, incident_id)
SELECT $1, since, device_no, site, kind, cause, evidence::jsonb, incident_id
FROM unnest($2::timestamptz[], $3::int[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[])
    WITH ORDINALITY AS n (since, device_no, site, kind, cause, evidence, incident_id, position)
ORDER BY position;

-- name: announce
-- Tells the streams of all daemons that this transaction has recorded something (nexhb/reading/following.py).
SELECT pg_notify('nexhb_events', '');

-- name: open_outages
-- $1 device_no[], $2 since[], $3 cause[], $4 evidence[] (JSON).
INSERT INTO device_outages (device_no, since, cause, evidence)
SELECT device_no, since, cause, evidence::jsonb
FROM unnest($1::int[], $2::timestamptz[], $3::text[], $4::text[]) AS n (device_no, since, cause, evidence);

-- name: ongoing_outages
-- $1 device_no[].
SELECT outage_no, device_no, since, cause, evidence::text AS evidence, incident_id
FROM device_outages WHERE device_no = ANY($1::int[]) AND until IS NULL;

-- name: end_outages
-- $1 outage_no[], $2 until[], $3 cause[], $4 evidence[] (JSON), $5 settle_at[].
UPDATE device_outages o SET until = n.until, cause = n.cause, evidence = o.evidence || n.evidence::jsonb,
                            settle_at = n.settle_at
FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::text[], $5::timestamptz[])
    AS n (outage_no, until, cause, evidence, settle_at)
WHERE o.outage_no = n.outage_no;

-- name: outages_to_settle
-- $1 now, $2 limit.
SELECT o.outage_no, o.device_no, o.since, o.until, o.cause, o.evidence::text AS evidence, o.incident_id
FROM device_outages o WHERE o.settle_at <= $1 ORDER BY o.settle_at LIMIT $2;

-- name: gaps
-- $1 device_no[], $2 last_ts[]: the ts of the last heartbeat before the gap; $3 until[]: when the device was heard
-- again; $4 seconds[]: a heartbeat that arrives later than this after it was made is not live; $5, $6: the earliest and
-- the latest ts. For each device the first live heartbeat after the gap, and the number of those that were made in the
-- gap and arrived after it.
SELECT n.device_no, n.until, live.ts, live.received_at, live.uptime_s,
       (SELECT count(*) FROM device_heartbeats h
        WHERE h.device_no = n.device_no AND h.ts > n.last_ts AND h.ts < live.ts AND h.ts >= $5 AND h.ts <= $6
          AND h.received_at >= n.until) AS replayed
FROM unnest($1::int[], $2::timestamptz[], $3::timestamptz[], $4::float8[]) AS n (device_no, last_ts, until, seconds)
LEFT JOIN LATERAL (
    SELECT h.ts, h.received_at, h.uptime_s FROM device_heartbeats h
    WHERE h.device_no = n.device_no AND h.ts > n.last_ts AND h.ts >= $5 AND h.ts <= $6
      AND h.received_at >= n.until AND h.received_at - h.ts <= make_interval(secs => n.seconds)
    ORDER BY h.ts LIMIT 1
) live ON true;

-- name: settle_outages
-- $1 outage_no[], $2 cause[], $3 evidence[] (JSON), $4 settle_at[] (null: settled), $5 now.
UPDATE device_outages o SET cause = n.cause, evidence = o.evidence || n.evidence::jsonb, settle_at = n.settle_at,
                            settled_at = CASE WHEN n.settle_at IS NULL THEN $5::timestamptz END
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::timestamptz[]) AS n (outage_no, cause, evidence, settle_at)
WHERE o.outage_no = n.outage_no;

-- ---- incidents ----------------------------------------------------------------------------------------------------

-- name: memberships
-- $1 device_no[]. The open incidents of these devices.
SELECT m.device_no, m.kind, m.incident_id, i.scope
FROM incident_devices m JOIN incidents i USING (incident_id)
WHERE m.device_no = ANY($1::int[]) AND m.left_at IS NULL;

-- name: open_incidents
-- $1 kind, $2 site[]; $3: whether to return those of every site. The conditions are those of the index incidents_open.
SELECT incident_id, kind, scope, site, device_no, members, devices
FROM incidents WHERE resolved_at IS NULL AND kind = $1 AND scope = 'fleet'
UNION ALL
SELECT incident_id, kind, scope, site, device_no, members, devices
FROM incidents
WHERE NOT $3 AND resolved_at IS NULL AND kind = $1 AND scope = ANY('{device,site}')
  AND coalesce(site, '') = ANY($2::text[]) AND site IS NOT NULL
UNION ALL
SELECT incident_id, kind, scope, site, device_no, members, devices
FROM incidents WHERE $3 AND resolved_at IS NULL AND kind = $1 AND scope <> 'fleet'
ORDER BY incident_id;

-- name: devices_of_sites
-- $1 site[]. The active devices of these sites.
SELECT site, array_agg(device_no) AS numbers
FROM devices WHERE site = ANY($1::text[]) AND revoked_at IS NULL GROUP BY site;

-- name: unity_down_of
-- $1 device_no[] as text. Those of these devices whose Unity app is not running.
SELECT device_no FROM device_last_status
WHERE device_no = ANY($1::text::int[]) AND unity_running = false AND status = 'ok';

-- name: heard_before
-- $1 device_no[] as text, $2 time. Those of these devices that were last heard before this time.
SELECT device_no, heard_at FROM device_last_status
WHERE device_no = ANY($1::text::int[]) AND heard_at < $2 AND status = 'ok';

-- name: intervals
-- $1 device_no[] as text. The intervals that were learned.
SELECT device_no, interval_s FROM device_state WHERE device_no = ANY($1::text::int[]) AND interval_s IS NOT NULL;

-- name: heard
-- $1 device_no[] as text.
SELECT device_no, heard_at FROM device_last_status WHERE device_no = ANY($1::text::int[]) AND status = 'ok';

-- name: fleet_rows
-- About how many rows device_last_status has; less than 1 if that is not known.
SELECT reltuples FROM pg_class WHERE oid = 'device_last_status'::regclass;

-- name: fleet_overdue_sample
-- $1, $2: the condition for overdue, as in `silent`. The share of overdue devices in a hundredth of the table's pages:
-- of 35,000 pages for a million devices, in 3 ms instead of 300.
SELECT coalesce(avg((heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange)::int), 1)::float8
FROM device_last_status TABLESAMPLE SYSTEM (1) WHERE status = 'ok';

-- name: fleet_overdue
-- $1, $2: the condition for overdue, as in `silent`.
SELECT count(*) AS devices,
       count(*) FILTER (WHERE heard_at < $1 AND NOT heard_at <@ $2::text::tstzmultirange) AS affected
FROM device_last_status WHERE status = 'ok';

-- name: fleet_unity_down
-- Of the devices of the fleet, only twice as many are counted as are affected, and one more: this is enough to know
-- whether these are over half of them.
WITH down AS (SELECT count(*) AS affected FROM device_last_status WHERE status = 'ok' AND unity_running = false)
SELECT affected, (SELECT count(*) FROM (
    SELECT FROM device_last_status WHERE status = 'ok' LIMIT 2 * (SELECT affected FROM down) + 1) counted) AS devices
FROM down;

-- name: long_intervals
-- $1 seconds. Devices with a longer interval.
SELECT device_no, interval_s FROM device_state WHERE interval_s > $1;

-- name: other_sites
-- $1 kind, $2 site[]. The number of sites, other than these, with a device that has a fault of this kind; at most two.
SELECT count(*) FROM (
    SELECT DISTINCT d.site FROM incident_devices m JOIN devices d USING (device_no)
    WHERE m.kind = $1 AND m.left_at IS NULL AND d.site <> ALL($2::text[]) LIMIT 2) found;

-- name: uses_sites
SELECT EXISTS (SELECT FROM devices WHERE site IS NOT NULL);

-- name: add_incidents
-- $1 kind; $2 scope[], $3 site[], $4 device_no[], $5 severity[], $6 cause[], $7 since[]; $8 opened_at; $9: the incident
-- that they continue. Opens incidents.
INSERT INTO incidents (kind, scope, site, device_no, severity, cause, since, opened_at, continues)
SELECT $1, scope, site, device_no, severity, cause, since, $8, $9
FROM unnest($2::text[], $3::text[], $4::int[], $5::text[], $6::text[], $7::timestamptz[]) WITH ORDINALITY
    AS n (scope, site, device_no, severity, cause, since, position)
ORDER BY position
RETURNING incident_id, scope, site, device_no;

-- name: widen_incident
-- $1 incident_id, $2 scope, $3 site, $4 severity, $5 cause, $6 now.
UPDATE incidents SET scope = $2, site = $3, device_no = NULL, severity = $4, cause = $5, mostly_back_at = NULL,
                     evidence = evidence || jsonb_build_object('widened_at', $6::timestamptz)
WHERE incident_id = $1;

-- name: absorb_incidents
-- $1 incident_id, $2 incident_id[] of those that it absorbs, $3 now. Their devices become its devices.
WITH moved AS (
    UPDATE incident_devices SET incident_id = $1 WHERE incident_id = ANY($2::bigint[]) AND left_at IS NULL
    RETURNING 1
),
absorbed AS (
    UPDATE incidents SET resolved_at = $3, members = 0, absorbed_into = $1 WHERE incident_id = ANY($2::bigint[])
)
UPDATE incidents SET members = members + (SELECT count(*) FROM moved), devices = devices + (SELECT count(*) FROM moved)
WHERE incident_id = $1;

-- name: add_members
-- $1 incident_id[], $2 device_no[], $3 kind, $4 now. Returns the incidents.
WITH added AS (
    INSERT INTO incident_devices (incident_id, device_no, kind, joined_at)
    SELECT incident_id, device_no, $3, $4 FROM unnest($1::bigint[], $2::int[]) AS n (incident_id, device_no)
    ON CONFLICT (incident_id, device_no) DO UPDATE SET left_at = NULL
    RETURNING incident_id, (xmax = 0) AS first
)
UPDATE incidents i SET members = i.members + a.added, devices = i.devices + a.first
FROM (SELECT incident_id, count(*) AS added, count(*) FILTER (WHERE first) AS first FROM added GROUP BY incident_id) a
WHERE i.incident_id = a.incident_id
RETURNING i.incident_id, i.kind, i.scope, i.site, i.device_no, i.members, i.devices;

-- name: link_outages
-- $1 incident_id[], $2 device_no[], $3 cause[]: a cause that is assumed from now on, or null. The present outages of these
-- devices belong to these incidents; an incident without a cause has that of its outages.
WITH linked AS (
    UPDATE device_outages o SET incident_id = n.incident_id, cause = coalesce(n.cause, o.cause)
    FROM unnest($1::bigint[], $2::int[], $3::text[]) AS n (incident_id, device_no, cause)
    WHERE o.device_no = n.device_no AND o.until IS NULL
    RETURNING o.incident_id, o.cause
)
UPDATE incidents i SET cause = l.cause
FROM (SELECT incident_id, mode() WITHIN GROUP (ORDER BY cause) AS cause FROM linked GROUP BY incident_id) l
WHERE i.incident_id = l.incident_id AND i.cause IS NULL;

-- name: leave
-- $1 device_no[], $2 kind[], $3 now. Returns the incidents that these devices have left.
WITH gone AS (
    UPDATE incident_devices m SET left_at = $3
    FROM unnest($1::int[], $2::text[]) AS n (device_no, kind)
    WHERE m.device_no = n.device_no AND m.kind = n.kind AND m.left_at IS NULL
    RETURNING m.incident_id
)
UPDATE incidents i SET members = i.members - g.left_now
FROM (SELECT incident_id, count(*) AS left_now FROM gone GROUP BY incident_id) g
WHERE i.incident_id = g.incident_id
RETURNING i.incident_id, i.kind, i.scope, i.site, i.device_no, i.members, i.devices;

-- name: resolve
-- $1 incident_id[], $2 now, $3 evidence (JSON). The cause of an incident of several devices is that of most of them.
UPDATE incidents i SET resolved_at = $2, mostly_back_at = NULL, evidence = i.evidence || $3::text::jsonb,
    cause = coalesce((SELECT mode() WITHIN GROUP (ORDER BY o.cause) FROM device_outages o
                      WHERE o.incident_id = i.incident_id AND o.until IS NOT NULL), i.cause)
WHERE i.incident_id = ANY($1::bigint[]) AND i.resolved_at IS NULL;

-- name: settle_incidents
-- $1 incident_id[], $2 now. The cause of incidents whose outages are all settled.
UPDATE incidents i SET settled_at = $2,
    cause = (SELECT mode() WITHIN GROUP (ORDER BY o.cause) FROM device_outages o WHERE o.incident_id = i.incident_id)
WHERE i.incident_id = ANY($1::bigint[]) AND i.resolved_at IS NOT NULL AND i.settled_at IS NULL
  AND NOT EXISTS (SELECT FROM device_outages o WHERE o.incident_id = i.incident_id AND o.settled_at IS NULL);

-- name: set_mostly_back
-- $1 incident_id[], $2 back[], $3 now. Since when over half of the devices of an incident have recovered.
UPDATE incidents i SET mostly_back_at = CASE WHEN n.back THEN coalesce(i.mostly_back_at, $3) END
FROM unnest($1::bigint[], $2::bool[]) AS n (incident_id, back)
WHERE i.incident_id = n.incident_id AND i.resolved_at IS NULL;

-- name: to_split
-- $1: only incidents over half of whose devices have been back since this time.
SELECT incident_id, kind, site, since, cause FROM incidents WHERE resolved_at IS NULL AND mostly_back_at <= $1;

-- name: rest
-- $1 incident_id. The devices that still have the fault.
SELECT m.device_no, d.device_id, d.site, coalesce(o.since, m.joined_at) AS since, o.cause
FROM incident_devices m JOIN devices d USING (device_no)
LEFT JOIN device_outages o ON o.device_no = m.device_no AND o.until IS NULL AND m.kind = 'offline'
WHERE m.incident_id = $1 AND m.left_at IS NULL ORDER BY m.device_no;

-- name: revoked_members
-- Devices that were revoked while they belong to an open incident. By an array, because a join would read all devices.
SELECT m.device_no, m.kind FROM incident_devices m
WHERE m.left_at IS NULL AND m.device_no = ANY(ARRAY(
    SELECT device_no FROM devices WHERE revoked_at IS NOT NULL
      AND device_no = ANY(ARRAY(SELECT device_no FROM incident_devices WHERE left_at IS NULL))));

-- name: replace_incidents
-- $1 incident_id, $2 incident_id[] of incidents of the same device that it replaces, $3 now.
WITH members AS (
    UPDATE incident_devices SET left_at = $3 WHERE incident_id = ANY($2::bigint[]) AND left_at IS NULL
)
UPDATE incidents SET resolved_at = $3, members = 0, absorbed_into = $1 WHERE incident_id = ANY($2::bigint[]);

-- name: hours
-- $1 site[].
SELECT site, zone, hours FROM sites WHERE site = ANY($1::text[]);

-- name: quiet_incidents
-- $1 device_no[], $2 kind[]. The incidents of single devices end without a message.
UPDATE incidents i SET quiet = true
FROM unnest($1::int[], $2::text[]) AS n (device_no, kind)
WHERE i.device_no = n.device_no AND i.kind = n.kind AND i.resolved_at IS NULL;

-- name: shared_tokens
-- $1: only tokens that were seen with two kiosks since this time.
SELECT t.device_no, t.since, t.evidence::text AS evidence, d.site
FROM shared_tokens t JOIN devices d USING (device_no)
WHERE t.last_at > $1 AND d.revoked_at IS NULL ORDER BY t.device_no LIMIT 1000;

-- name: members_of_kind
-- $1 kind.
SELECT device_no FROM incident_devices WHERE kind = $1 AND left_at IS NULL;

-- ---- retention ----------------------------------------------------------------------------------------------------

-- name: prune_events
-- $1: delete events recorded before this time; $2: at most this many. Returns their number.
WITH old AS (SELECT event_id FROM device_events WHERE at < $1 ORDER BY at LIMIT $2),
     deleted AS (DELETE FROM device_events WHERE event_id IN (SELECT event_id FROM old) RETURNING 1)
SELECT count(*) FROM deleted;

-- name: prune_changes
-- $1: delete changes that no round has judged since this time, because no daemon watched; $2: at most this many.
WITH old AS (SELECT change_no FROM device_changes WHERE heard_at < $1 LIMIT $2),
     deleted AS (DELETE FROM device_changes WHERE change_no IN (SELECT change_no FROM old) RETURNING 1)
SELECT count(*) FROM deleted;

-- name: prune_outages
-- $1: delete outages that ended before this time; $2: at most this many.
WITH old AS (SELECT outage_no FROM device_outages WHERE until < $1 AND settle_at IS NULL LIMIT $2),
     deleted AS (DELETE FROM device_outages WHERE outage_no IN (SELECT outage_no FROM old) RETURNING 1)
SELECT count(*) FROM deleted;

-- name: prune_incidents
-- $1: delete incidents that were resolved before this time; $2: at most this many. Those to which an event or an
-- outage refers are kept until it is deleted.
WITH old AS (
    SELECT i.incident_id FROM incidents i
    WHERE i.resolved_at < $1
      AND NOT EXISTS (SELECT FROM device_events e WHERE e.incident_id = i.incident_id)
      AND NOT EXISTS (SELECT FROM device_outages o WHERE o.incident_id = i.incident_id)
    ORDER BY i.resolved_at LIMIT $2
),
members AS (DELETE FROM incident_devices WHERE incident_id IN (SELECT incident_id FROM old)),
released AS (
    UPDATE incidents SET absorbed_into = NULL, continues = NULL
    WHERE incident_id NOT IN (SELECT incident_id FROM old)
      AND (absorbed_into IN (SELECT incident_id FROM old) OR continues IN (SELECT incident_id FROM old))
),
deleted AS (DELETE FROM incidents WHERE incident_id IN (SELECT incident_id FROM old) RETURNING 1)
SELECT count(*) FROM deleted;

-- ---- metrics ------------------------------------------------------------------------------------------------------

-- name: state_counts
-- The number of devices by site (null: no site) and presence, and how many of them have Unity down or a low battery.
SELECT d.site, s.presence, count(*) AS devices, count(*) FILTER (WHERE s.unity = 'down') AS unity_down,
       count(*) FILTER (WHERE s.battery = 'low') AS battery_low
FROM device_state s JOIN devices d USING (device_no)
WHERE d.revoked_at IS NULL
GROUP BY d.site, s.presence;

-- name: incident_counts
-- The number of open incidents by scope, kind and, if a whole site has the fault, site.
SELECT scope, kind, CASE WHEN scope = 'site' THEN site END AS site, count(*) AS incidents
FROM incidents WHERE resolved_at IS NULL GROUP BY 1, 2, 3;
