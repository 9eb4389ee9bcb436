-- Why: a database may be replaced by an older copy of itself (a restore, a failover to a standby that lags, a renamed
-- copy). Daemons recognise it by generations: rows that they add while they run, and remember outside the database.
-- device_token_changes lets a daemon whose notifications do not arrive see within seconds that a token has changed.
-- heartbeat_history shows a row whose device or label is missing, with nulls.
-- Lock: ACCESS EXCLUSIVE on the view heartbeat_history, for milliseconds. The tables are new and empty.
-- To prepare: nothing.

CREATE TABLE database_generations (
    generation bigint PRIMARY KEY,
    mark       uuid NOT NULL DEFAULT gen_random_uuid(),
    made_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE database_missing (
    mark        uuid PRIMARY KEY,
    generation  bigint NOT NULL,
    host        text NOT NULL,
    found_at    timestamptz NOT NULL DEFAULT now(),
    accepted_at timestamptz
);

CREATE TABLE device_token_changes (
    slot    integer PRIMARY KEY,
    changes bigint NOT NULL
) WITH (fillfactor = 50);

CREATE OR REPLACE FUNCTION notify_token_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    tokens text;
BEGIN
    SELECT CASE WHEN count(*) <= 100 THEN string_agg(encode(token_sha256, 'hex'), ',') ELSE '' END
    INTO tokens FROM changed;
    IF tokens IS NOT NULL THEN
        INSERT INTO device_token_changes AS c (slot, changes) VALUES (pg_backend_pid() % 64, 1)
        ON CONFLICT (slot) DO UPDATE SET changes = c.changes + 1;
        PERFORM pg_notify('nexhb_devices', tokens);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE VIEW heartbeat_history AS
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
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no);
