-- Why: whether a device is there and what is known of it are two things. Presence goes by when a device was last heard,
-- on the database's clock; content goes by ts, and newer_content is the one rule for it. Sections that a heartbeat does
-- not have stay as they are known. Silence is counted without the time in which no daemon took heartbeats.
-- Lock: ACCESS EXCLUSIVE on device_last_status while the table is rewritten twice, and heartbeats wait meanwhile: 0.7 s
-- with 100,000 devices, 8 s with a million (2 cores, busy). heartbeat_labels is small.
-- To prepare: nothing up to 100,000 devices. With a million, a quiet hour.

CREATE FUNCTION newer_content(
    known_ts timestamptz, known_received_at timestamptz, known_uptime_s integer, known_clock_wrong boolean,
    new_ts timestamptz, new_received_at timestamptz, new_uptime_s integer, new_clock_wrong boolean
) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT new_ts > known_ts
        OR (new_uptime_s > known_uptime_s AND new_received_at > known_received_at
            AND abs(new_uptime_s - known_uptime_s - extract(epoch FROM new_received_at - known_received_at)) <= 60)
        IS TRUE
        OR (known_ts - new_received_at > interval '25 hours'
            AND CASE WHEN new_clock_wrong THEN known_clock_wrong
                     ELSE new_received_at - new_ts <= interval '1 hour' END)
$$;

CREATE FUNCTION set_back_after(
    known_device_no integer, known_ts timestamptz, known_received_at timestamptz, known_uptime_s integer,
    known_clock_wrong boolean, since timestamptz
) RETURNS SETOF device_heartbeats LANGUAGE sql STABLE AS $$
    SELECT * FROM device_heartbeats h
    WHERE h.device_no = known_device_no AND h.ts >= since AND h.ts < known_ts AND h.received_at > known_received_at
      AND newer_content(known_ts, known_received_at, known_uptime_s, known_clock_wrong,
                        h.ts, h.received_at, h.uptime_s, h.clock_wrong)
    ORDER BY h.received_at DESC
    LIMIT 1
$$;

ALTER TABLE heartbeat_labels
    ADD COLUMN sections smallint NOT NULL DEFAULT 31,
    DROP CONSTRAINT heartbeat_labels_agent_version_unity_pkg_version_network_ty_key,
    ADD UNIQUE (agent_version, unity_pkg_version, network_type, ssid, sections);

ALTER TABLE device_last_status ADD COLUMN heard_at timestamptz;
ALTER TABLE device_last_status ALTER COLUMN heard_at TYPE timestamptz USING received_at;
ALTER TABLE device_last_status
    DROP COLUMN last_slot,
    ALTER COLUMN heard_at SET NOT NULL,
    ADD COLUMN heard_slot integer NOT NULL
        GENERATED ALWAYS AS (floor(extract(epoch FROM heard_at AT TIME ZONE 'UTC') / 300)::integer) STORED,
    ADD COLUMN sections smallint NOT NULL DEFAULT 31,
    ADD COLUMN said_facts integer,
    ADD COLUMN kept_facts integer;
CREATE INDEX device_last_status_slot ON device_last_status (heard_slot) WHERE status = 'ok';

CREATE TABLE taking_heartbeats (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    since      timestamptz NOT NULL,
    renewed_at timestamptz NOT NULL
);

CREATE TABLE blackouts (
    began_at timestamptz PRIMARY KEY,
    ended_at timestamptz NOT NULL CHECK (ended_at > began_at)
);

-- The daemon that applies this was away meanwhile: silence does not count from the last heartbeat that one took.
INSERT INTO taking_heartbeats (since, renewed_at)
SELECT max(received_at), max(received_at) FROM device_last_status HAVING max(received_at) IS NOT NULL;
