-- Why: nexhb sends messages about incidents. incident_routes records what each route was told of each incident, so that
-- what is still to be told can be decided anew in each round; notifications is the outbox, from which every daemon
-- delivers; silences suppress messages.
-- Lock: ACCESS EXCLUSIVE on incidents for milliseconds, to accept the kinds of incidents of nexhb itself.
-- To prepare: nothing.

ALTER TABLE incidents DROP CONSTRAINT incidents_kind_check;
ALTER TABLE incidents ADD CONSTRAINT incidents_kind_check CHECK (kind IN (
    'offline', 'unity_down', 'battery_low', 'clock_wrong', 'token_shared', 'flapping', 'nightly_failed', 'disk_low'));
CREATE INDEX incidents_absorbed ON incidents (absorbed_into) WHERE absorbed_into IS NOT NULL;

CREATE TABLE incident_routes (
    incident_id bigint NOT NULL REFERENCES incidents ON DELETE CASCADE,
    route       text NOT NULL,
    opened_at   timestamptz NOT NULL,
    scope       text NOT NULL,
    reminded_at timestamptz NOT NULL,
    resolved_at timestamptz,
    PRIMARY KEY (incident_id, route)
);
CREATE INDEX incident_routes_unresolved ON incident_routes (incident_id) WHERE resolved_at IS NULL;

CREATE TABLE notifications (
    notification_no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id              text NOT NULL UNIQUE,
    incident_id     bigint NOT NULL REFERENCES incidents ON DELETE CASCADE,
    route           text NOT NULL,
    kind            text NOT NULL CHECK (kind IN ('opened', 'widened', 'reminder', 'resolved')),
    payload         jsonb NOT NULL,
    created_at      timestamptz NOT NULL,
    due_at          timestamptz NOT NULL,
    attempts        integer NOT NULL DEFAULT 0,
    lease_until     timestamptz,
    delivered_at    timestamptz,
    given_up_at     timestamptz,
    last_error      text
);
CREATE INDEX notifications_pending ON notifications (route, notification_no)
    WHERE delivered_at IS NULL AND given_up_at IS NULL;
CREATE INDEX notifications_incident ON notifications (incident_id, route, notification_no);

CREATE TABLE silences (
    silence_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    scope       text NOT NULL CHECK (scope IN ('fleet', 'site', 'tag', 'device')),
    value       text CHECK ((value IS NULL) = (scope = 'fleet')),
    "from"      timestamptz NOT NULL,
    until       timestamptz CHECK (until > "from"),
    hours       text,
    zone        text,
    reason      text NOT NULL,
    created_by  text NOT NULL,
    created_at  timestamptz NOT NULL,
    CHECK (until IS NOT NULL OR hours IS NOT NULL),
    CHECK ((hours IS NULL) = (zone IS NULL))
);
