-- Why: the first schema. sql/schema.sql shows the same with the figures that decided it.
-- Lock: none that matters, nothing exists yet.
-- To prepare: nothing.

CREATE TABLE devices (
    device_no       integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id       text NOT NULL UNIQUE CHECK (length(device_id) BETWEEN 1 AND 100),
    alias           text,
    android_version text,
    sdk_int         integer,
    patch_level     text,
    build_id        text,
    model           text,
    manufacturer    text,
    facts_ts        timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now(),
    revoked_at      timestamptz
);

CREATE TABLE device_tokens (
    token_sha256 bytea PRIMARY KEY CHECK (length(token_sha256) = 32),
    device_no    integer NOT NULL REFERENCES devices,
    created_at   timestamptz NOT NULL DEFAULT now(),
    revoked_at   timestamptz
);
CREATE INDEX device_tokens_device ON device_tokens (device_no);

CREATE TABLE enrolment_keys (
    key_sha256 bytea PRIMARY KEY CHECK (length(key_sha256) = 32),
    note       text,
    uses_left  integer NOT NULL CHECK (uses_left >= 0),
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE heartbeat_labels (
    label_no          integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    agent_version     text NOT NULL,
    unity_pkg_version text NOT NULL,
    network_type      text NOT NULL,
    ssid              text NOT NULL,
    UNIQUE (agent_version, unity_pkg_version, network_type, ssid)
);

CREATE TABLE device_heartbeats (
    ts            timestamptz NOT NULL,
    received_at   timestamptz NOT NULL,
    device_no     integer NOT NULL,
    bucket        integer NOT NULL,
    label_no      integer NOT NULL,
    uptime_s      integer,
    ram_used_mb   integer,
    temp_c        real,
    battery_pct   smallint,
    signal_dbm    smallint,
    plugged       boolean,
    unity_running boolean,
    clock_wrong   boolean NOT NULL,
    ip            inet
) PARTITION BY RANGE (ts);

CREATE TABLE device_last_status (
    device_no         integer PRIMARY KEY,
    device_id         text NOT NULL,
    last_ts           timestamptz NOT NULL,
    received_at       timestamptz NOT NULL,
    last_slot         integer 
                      GENERATED ALWAYS AS (floor(extract(epoch FROM last_ts AT TIME ZONE 'UTC') / 300)::integer) STORED,
    battery_pct       smallint,
    plugged           boolean,
    temp_c            real,
    network_type      text,
    ssid              text,
    ip                inet,
    signal_dbm        smallint,
    uptime_s          integer,
    ram_used_mb       integer,
    unity_pkg_version text,
    unity_running     boolean,
    agent_version     text,
    clock_wrong       boolean NOT NULL DEFAULT false,
    status            text NOT NULL DEFAULT 'ok' CHECK (status IN ('ok', 'inactive', 'revoked'))
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX device_last_status_slot ON device_last_status (last_slot) WHERE status = 'ok';
CREATE INDEX device_last_status_unity_down ON device_last_status (device_no)
    WHERE unity_running = false AND status = 'ok';

CREATE TABLE hb_partitions (
    partition_name  text PRIMARY KEY,
    range_start     timestamptz NOT NULL,
    range_end       timestamptz NOT NULL,
    state           text NOT NULL DEFAULT 'active'
                    CHECK (state IN ('active', 'archived', 'archive_failed', 'dropped')),
    row_count       bigint,
    bytes_size      bigint,
    checksum_sha256 text,
    archive_url     text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    archived_at     timestamptz,
    dropped_at      timestamptz
);

CREATE TABLE job_runs (
    run_no     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job        text NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at   timestamptz,
    status     text NOT NULL CHECK (status IN ('running', 'completed', 'skipped', 'failed')),
    reason     text,
    counts     jsonb NOT NULL DEFAULT '{}',
    host       text NOT NULL
);
CREATE INDEX job_runs_job ON job_runs (job, started_at DESC);

CREATE TABLE feature_flags (
    flag       text PRIMARY KEY,
    value      jsonb NOT NULL,
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL
);

CREATE VIEW heartbeat_history AS
SELECT d.device_id,
       h.ts,
       h.received_at,
       h.clock_wrong,
       h.battery_pct,
       h.plugged,
       h.temp_c,
       nullif(l.network_type, '') AS network_type,
       nullif(l.ssid, '') AS ssid,
       h.ip,
       h.signal_dbm,
       h.uptime_s,
       h.ram_used_mb,
       nullif(l.unity_pkg_version, '') AS unity_pkg_version,
       h.unity_running,
       nullif(l.agent_version, '') AS agent_version,
       h.device_no,
       h.bucket
FROM device_heartbeats h
JOIN devices d USING (device_no)
JOIN heartbeat_labels l USING (label_no);

-- Which tokens changed, as hex; empty where they are too many for one notification (8,000 bytes): read all again.
CREATE FUNCTION notify_token_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    tokens text;
BEGIN
    SELECT CASE WHEN count(*) <= 100 THEN string_agg(encode(token_sha256, 'hex'), ',') ELSE '' END
    INTO tokens FROM changed;
    IF tokens IS NOT NULL THEN
        PERFORM pg_notify('nexhb_devices', tokens);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER device_tokens_added AFTER INSERT ON device_tokens
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
CREATE TRIGGER device_tokens_changed AFTER UPDATE ON device_tokens
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
CREATE TRIGGER device_tokens_removed AFTER DELETE ON device_tokens
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
