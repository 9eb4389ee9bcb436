-- Why: nexhb remembers what changed (events), judges why a device was silent (outages), and combines what belongs
-- together (incidents). The writer notes in device_changes which heartbeats changed something, so that the watcher need
-- not compare every status in each round.
-- Lock: ACCESS EXCLUSIVE on device_last_status for milliseconds; it is not rewritten.
-- To prepare: nothing.

ALTER TABLE device_last_status ADD COLUMN changes smallint NOT NULL DEFAULT 0;

CREATE TABLE device_changes (
    change_no         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_no         integer NOT NULL,
    changes           smallint NOT NULL,
    heard_at          timestamptz NOT NULL,
    ts                timestamptz NOT NULL,
    received_at       timestamptz NOT NULL,
    clock_wrong       boolean NOT NULL,
    uptime_s          integer,
    battery_pct       smallint,
    plugged           boolean,
    unity_running     boolean,
    agent_version     text,
    unity_pkg_version text
);

CREATE TABLE watch (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    database   text NOT NULL,
    rules      integer NOT NULL,
    adopted_at timestamptz NOT NULL,
    round_at   timestamptz NOT NULL
);

CREATE TABLE device_state (
    device_no         integer PRIMARY KEY,
    presence          text NOT NULL CHECK (presence IN ('online', 'offline')),
    presence_since    timestamptz NOT NULL,
    unity             text CHECK (unity IN ('running', 'down')),
    unity_since       timestamptz,
    battery           text CHECK (battery IN ('ok', 'low')),
    battery_since     timestamptz,
    clock             text NOT NULL CHECK (clock IN ('right', 'wrong')),
    clock_since       timestamptz NOT NULL,
    agent_version     text,
    unity_pkg_version text,
    interval_s        real,
    skew_s            real,
    flips             timestamptz[] NOT NULL DEFAULT '{}',
    flapping_since    timestamptz,
    adopted           text[] NOT NULL DEFAULT '{}',
    due_at            timestamptz,
    revision          integer NOT NULL DEFAULT 0
);
CREATE INDEX device_state_due ON device_state (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE incidents (
    incident_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind           text NOT NULL
                   CHECK (kind IN ('offline', 'unity_down', 'battery_low', 'clock_wrong', 'token_shared', 'flapping')),
    scope          text NOT NULL CHECK (scope IN ('device', 'site', 'fleet', 'ours')),
    site           text,
    device_no      integer,
    severity       text NOT NULL CHECK (severity IN ('info', 'warning', 'critical')),
    cause          text,
    since          timestamptz NOT NULL,
    opened_at      timestamptz NOT NULL,
    resolved_at    timestamptz,
    settled_at     timestamptz,
    mostly_back_at timestamptz,
    absorbed_into  bigint REFERENCES incidents,
    continues      bigint REFERENCES incidents,
    acked_at       timestamptz,
    acked_by       text,
    quiet          boolean NOT NULL DEFAULT false,
    members        integer NOT NULL DEFAULT 0,
    devices        integer NOT NULL DEFAULT 0,
    evidence       jsonb NOT NULL DEFAULT '{}'
);
CREATE UNIQUE INDEX incidents_open ON incidents (kind, scope, coalesce(site, ''), coalesce(device_no, 0))
    WHERE resolved_at IS NULL;
CREATE INDEX incidents_resolved ON incidents (resolved_at) WHERE resolved_at IS NOT NULL;

CREATE TABLE incident_devices (
    incident_id bigint NOT NULL REFERENCES incidents,
    device_no   integer NOT NULL,
    kind        text NOT NULL,
    joined_at   timestamptz NOT NULL,
    left_at     timestamptz,
    PRIMARY KEY (incident_id, device_no)
);
CREATE UNIQUE INDEX incident_devices_open ON incident_devices (device_no, kind) WHERE left_at IS NULL;

CREATE TABLE device_events (
    event_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    since       timestamptz NOT NULL,
    device_no   integer,
    site        text,
    kind        text NOT NULL CHECK (kind IN (
                    'offline', 'online', 'unity_down', 'unity_up', 'battery_low', 'battery_ok', 'clock_wrong', 'clock_right',
                    'rebooted', 'app_changed', 'token_shared', 'flapping')),
    cause       text,
    evidence    jsonb NOT NULL DEFAULT '{}',
    incident_id bigint REFERENCES incidents
);
CREATE INDEX device_events_device ON device_events (device_no, event_id);
CREATE INDEX device_events_site ON device_events (site, event_id) WHERE site IS NOT NULL;
CREATE INDEX device_events_at ON device_events (at);
CREATE INDEX device_events_incident ON device_events (incident_id) WHERE incident_id IS NOT NULL;

CREATE TABLE device_outages (
    outage_no   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_no   integer NOT NULL,
    since       timestamptz NOT NULL,
    until       timestamptz,
    cause       text NOT NULL,
    evidence    jsonb NOT NULL DEFAULT '{}',
    settle_at   timestamptz,
    settled_at  timestamptz,
    incident_id bigint REFERENCES incidents,
    CHECK (until >= since)
);
CREATE UNIQUE INDEX device_outages_open ON device_outages (device_no) WHERE until IS NULL;
CREATE INDEX device_outages_device ON device_outages (device_no, since);
CREATE INDEX device_outages_settle ON device_outages (settle_at) WHERE settle_at IS NOT NULL;
CREATE INDEX device_outages_incident ON device_outages (incident_id) WHERE incident_id IS NOT NULL;
