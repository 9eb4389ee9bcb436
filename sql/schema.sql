-- The whole schema as it is now, with the reasons and the figures behind it. This file is for reading.
--
-- nexhb runs the files in migrations/ and never this one; tests/promises/test_schema_is_the_migrations.py checks that
-- both give the same database. Neither contains the partitions of device_heartbeats: nexhb/partitions.py creates one
-- per day. All times are timestamptz, and nexhb's sessions use UTC.

-- ---- devices: who may send ----------------------------------------------------------------------------------------

-- The places of devices. hours is in OpenStreetMap's notation, in the site's own time zone; docs/decisions/0012 says how
-- they are read. Null hours: always open.
CREATE TABLE sites (
    site       text PRIMARY KEY CHECK (length(site) BETWEEN 1 AND 100),
    name       text CHECK (length(name) BETWEEN 1 AND 200),
    zone       text NOT NULL DEFAULT 'UTC' CHECK (length(zone) BETWEEN 1 AND 64),
    hours      text CHECK (length(hours) BETWEEN 1 AND 500),
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now()
);

-- One row per device. Rows are never deleted, because heartbeats refer to device_no. The facts (alias … manufacturer)
-- are what the device's newest heartbeat states about the device itself. They rarely change, so they are stored here
-- once and not with every heartbeat. They follow the content of device_last_status (newer_content, below): a late
-- heartbeat does not replace them. facts_ts is the ts of the heartbeat that last changed them.
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
    revoked_at      timestamptz,                           -- heartbeats receive 410 from then on
    rotated         boolean NOT NULL DEFAULT false,        -- nexhb gave it a new token; from then on, none is imported from NexMDM
    name            text,                                  -- given by people; heartbeats do not change it
    nexmdm_name     text,                                  -- the name in NexMDM at the last import; a later change there is imported
    site            text REFERENCES sites,                 -- null: none
    tags            text[] NOT NULL DEFAULT '{}' CHECK (cardinality(tags) <= 20)  -- sorted
);
-- No heartbeat changes the site, so that the updates of facts stay HOT. The condition leaves out all devices of a fleet
-- without sites: then a lookup of sites costs nothing.
CREATE INDEX devices_site ON devices (site) WHERE site IS NOT NULL;

-- Tokens have a table of their own, because a device may have several (an imported token beside one that nexhb issued),
-- and because the triggers below must fire for a change of a token, but not for every change of an alias. Only the
-- SHA-256 is stored: a token is 256 random bits, so a slow hash would protect nothing and cost much (with bcrypt for
-- every heartbeat, NexMDM's server was limited to 3.7 heartbeats/s). A revoked token stays known: its device must
-- receive 410 and not 401, because the agent erases its credentials after five 401 responses in a row.
CREATE TABLE device_tokens (
    token_sha256 bytea PRIMARY KEY CHECK (length(token_sha256) = 32),
    device_no    integer NOT NULL REFERENCES devices,
    created_at   timestamptz NOT NULL DEFAULT now(),
    revoked_at   timestamptz
);
CREATE INDEX device_tokens_device ON device_tokens (device_no);

-- How often tokens have changed: the sum of all rows. Each daemon reads it every second, so that a revocation takes
-- effect within seconds even if its notification was lost. There are 64 rows, so that two changes seldom wait for each
-- other.
CREATE TABLE device_token_changes (
    slot    integer PRIMARY KEY,                           -- the backend's pid modulo 64
    changes bigint NOT NULL
) WITH (fillfactor = 50);

-- Each daemon holds all tokens in memory and is notified of every change at once. The payload lists the changed tokens
-- in hexadecimal: 100 of them take 6,500 bytes, and a notification may have 8,000. For more (an import) the payload is
-- empty, and the daemons read all tokens again.
CREATE FUNCTION notify_token_change() RETURNS trigger LANGUAGE plpgsql AS $$
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
-- The triggers fire per statement and not per row, so that 20,000 imported tokens cause one notification.
CREATE TRIGGER device_tokens_added AFTER INSERT ON device_tokens
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
CREATE TRIGGER device_tokens_changed AFTER UPDATE ON device_tokens
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
CREATE TRIGGER device_tokens_removed AFTER DELETE ON device_tokens
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();

-- If auth.enrolment is "open", a device may register itself with one of these keys. The key's row is locked while a use
-- is claimed, so that two devices cannot both claim the last use.
CREATE TABLE enrolment_keys (
    key_sha256 bytea PRIMARY KEY CHECK (length(key_sha256) = 32),
    note       text,
    uses_left  integer NOT NULL CHECK (uses_left >= 0),
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    site       text REFERENCES sites ON DELETE SET NULL    -- of the devices that register with the key
);

-- The key with which a device registered itself. If the response is lost, the device has no token and registers again.
-- If it has the same key and has not sent a heartbeat yet, it is admitted once more: it receives a new token, and no
-- further use of the key is claimed.
CREATE TABLE enrolments (
    device_no   integer PRIMARY KEY REFERENCES devices,
    key_sha256  bytea NOT NULL CHECK (length(key_sha256) = 32),
    enrolled_at timestamptz NOT NULL
);

-- Why a device was last refused, and which tokens two kiosks share (a cloned image), for people who look into a
-- device's problem. Each daemon writes what it has seen at most once per minute and device, outside the path of
-- heartbeats.
CREATE TABLE device_refusals (
    device_no  integer PRIMARY KEY REFERENCES devices,
    refused_at timestamptz NOT NULL,
    status     smallint NOT NULL,
    reason     text NOT NULL,
    field      text
);
CREATE TABLE shared_tokens (
    device_no integer PRIMARY KEY REFERENCES devices,
    since     timestamptz NOT NULL,
    last_at   timestamptz NOT NULL,
    evidence  jsonb NOT NULL                               -- model, build, address and boot time of both kiosks
);

-- The credentials that an import copied from NexMDM, each once. A credential is never copied a second time, so that a
-- device that was rotated since does not get its old token back. fingerprint is the SHA-256 of NexMDM's bcrypt hash,
-- which never changes there; it is the SHA-256 of the token if there is no such hash, and in rows from before migration
-- 0011 that no import has corrected yet. bcrypt is kept until the device's first heartbeat, or until NexMDM learns the
-- token; then the token is added to device_tokens and the hash is removed.
CREATE TABLE legacy_tokens (
    device_no    integer NOT NULL REFERENCES devices,
    fingerprint  bytea NOT NULL CHECK (length(fingerprint) = 32),
    bcrypt       text,                                     -- null: the token is known, or not needed
    taken_at     timestamptz NOT NULL,
    adopted_at   timestamptz,
    token_sha256 bytea CHECK (length(token_sha256) = 32),  -- null: not known (yet)
    PRIMARY KEY (device_no, fingerprint)
);
CREATE INDEX legacy_tokens_waiting ON legacy_tokens (taken_at) WHERE bcrypt IS NOT NULL;

-- ---- the history --------------------------------------------------------------------------------------------------

-- Values that most heartbeats share, each combination stored once: a fleet has a few versions, and one network name per
-- site. Unknown texts are empty and not null, so that the unique key works. sections tells which sections the heartbeat
-- had (battery 1, network 2, memory 4, system 8, app_versions 16), because an absent section states nothing about its
-- fields. sections is stored here and adds no byte to the history; nearly all heartbeats have all sections, so it adds
-- few labels.
CREATE TABLE heartbeat_labels (
    label_no          integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    agent_version     text NOT NULL,
    unity_pkg_version text NOT NULL,
    network_type      text NOT NULL,
    ssid              text NOT NULL,
    sections          smallint NOT NULL DEFAULT 31,
    UNIQUE (agent_version, unity_pkg_version, network_type, ssid, sections)
);

--
--   BYTES PER HEARTBEAT, 240,000 heartbeats of 2,000 varied devices written minute by minute (by nexhb 0.1's bench)
--
--   layout                                                                            heap   index   total
--   NexMDM's: text id, texts; primary key (device_id, ts, hb_id), index (device_id, ts)    160.4   190.4   350.8
--   the same with its third index, for deduplication                                 160.4   267.8   428.2
--   this one: integer device number, key (device_no, bucket), four texts in labels    90.8    27.3   118.1
--
-- Columns are ordered from wide to narrow, so that no byte is lost to alignment, and the column of variable length is
-- last. A row has 88 bytes: a header of 32 bytes (with the bitmap of nulls, because today's agent sends no signal_dbm),
-- columns of 2 × 8, 6 × 4, 1 or 2 × 2 and 3 × 1 bytes, and 7 bytes for an IPv4 address. With the 4 bytes of its line
-- pointer it takes 92.
--
-- Time is divided into buckets of ten seconds (ingest.bucket_seconds). The column bucket is the start of the bucket
-- that contains ts, in seconds since 2020-01-01. Its four bytes last until 2088; a timestamp would take eight bytes in
-- the row and eight in the key.
--
-- A device has one row per bucket: UNIQUE (device_no, bucket) is an index of each partition, which nexhb/partitions.py
-- creates with the partition (device_heartbeats_YYYYMMDD_key). The key cannot be declared here, because a unique key of
-- the parent must contain the partition key, ts. A key per partition is enough, since a bucket lies within one day. The
-- same index serves the history of a device, newest first.
--
-- There are no foreign keys: each would cost a lookup per row, and devices and labels are never deleted. Without
-- foreign keys, the table can be distributed by device_no as it is (tried on Citus: every unique key contains the
-- distribution key). There is no DEFAULT partition either: it would forbid DETACH CONCURRENTLY and delay each new day
-- once it contains a row. The accept window and the days created ahead make it unnecessary.
CREATE TABLE device_heartbeats (
    ts            timestamptz NOT NULL,                    -- when it was made, by the device's clock; received_at if that clock is wrong
    received_at   timestamptz NOT NULL,
    device_no     integer NOT NULL,
    bucket        integer NOT NULL,
    label_no      integer NOT NULL,
    uptime_s      integer,
    ram_used_mb   integer,                                 -- MiB
    temp_c        real,
    battery_pct   smallint,
    signal_dbm    smallint,
    plugged       boolean,
    unity_running boolean,
    clock_wrong   boolean NOT NULL,                        -- the device's time was outside the accept window
    ip            inet
) PARTITION BY RANGE (ts);

-- The history as people query it: by device_id, with every column, and with the texts of the labels. The joins are
-- LEFT, so that a row whose device or label is missing is shown with nulls; `nexhb audit` and `nexhb doctor` report
-- such rows.
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
LEFT JOIN devices d USING (device_no)
LEFT JOIN heartbeat_labels l USING (label_no);

-- ---- the last status ----------------------------------------------------------------------------------------------

-- Returns whether a heartbeat that was just received is newer than the known status of its device. A heartbeat with a
-- later ts is newer.
--
-- A heartbeat with an earlier ts is newer only if its uptime is larger by the time between the two receipts (within a
-- minute): then the device's clock was set back. This is not true of a replayed queue: the uptime in a heartbeat of the
-- same boot is smaller, and the uptime in a heartbeat of an earlier boot does not differ by just that time.
--
-- If the known ts is more than a day after this receipt (ingest.accept_future is at most a day), the clock of a daemon
-- was wrong: either when the known heartbeat was accepted, or now. If the new heartbeat was made within the hour before
-- its receipt, the clock is right now, and the new heartbeat is newer. If the device's clock was wrong both times, the
-- later receipt is newer.
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

-- Takes the heartbeat with the latest ts of a device (known_…). If the device's clock was set back after that
-- heartbeat, returns the heartbeat of the history that was received last since then; otherwise no row.
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

-- One row per device, written with every heartbeat: with a million devices, a million rows per minute. The layout
-- therefore has to make as many of these updates as possible HOT (heap-only tuple). Such an update changes no index,
-- and its dead row is removed by the next session that visits the page. fillfactor 85 leaves room for the new row on
-- the page, and no index may contain heard_at or last_ts.
--
--   Upserts in batches of 2,000, then the offline query. Rates vary by a fifth from run to run,
--   HOT shares and the orders of magnitude of the query do not.
--
--   index                            2,000 devices, 100 silent          1,000,000 devices, 1,000 silent
--   primary key only                 111,124/s  90 % HOT  0.26 ms       74,946/s  95 % HOT  123.67 ms  35 MB index
--   btree (last_ts)                   87,694/s   0 % HOT  0.13 ms       64,888/s   0 % HOT    0.90 ms  104 MB
--   BRIN (last_ts)                   106,284/s  90 % HOT  0.25 ms       82,601/s  96 % HOT   63.24 ms  27 MB
--   btree (a slot): this one       99,304/s  71 % HOT  0.12 ms       66,283/s  76 % HOT    0.83 ms  74 MB
--
-- heard_slot is the number of the five-minute slot that contains heard_at. It changes with every fifth heartbeat (at 60
-- s), and the updates by the four heartbeats between stay HOT. The condition `heard_slot <= slot of the cutoff` uses
-- the index and returns at most one slot too many, which `heard_at < cutoff` removes. The result is right for every
-- cutoff; the query is fast as long as the offline threshold (600 s) is longer than the heartbeat interval and one slot
-- together (60 + 300 s), because the index then returns hardly any device that is not silent.
--
-- Presence and content are separate. heard_at is when a device was last heard, by the database's clock, whatever it
-- sent: a replayed queue, a duplicate, or a heartbeat with a wrong clock. All other columns are what is known of the
-- device: the content of its newest heartbeat, which arrived at received_at, and for sections that this heartbeat
-- lacked, the values known before. The column sections tells which sections the heartbeat had. said_facts is the digest
-- of the facts that the heartbeat stated, kept_facts the digest of the facts in devices. If the two differ, the writer
-- updates devices, whichever daemon wrote last.
--
-- device_id is stored here as well as in devices, because both of NexMDM's queries (SELECT * … WHERE last_ts < …) must
-- return which device a row belongs to. alias and name are stored here too: of the 12.6 ms that PostgreSQL took for
-- 1,000 silent devices of a million, 10 ms were spent on looking up the alias. status excludes revoked devices from
-- queries about the fleet. The triggers below keep alias, name and status equal to devices, whoever changes them, at no
-- cost for heartbeats.
CREATE TABLE device_last_status (
    device_no         integer PRIMARY KEY,
    device_id         text NOT NULL,
    last_ts           timestamptz NOT NULL,
    received_at       timestamptz NOT NULL,
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
    status            text NOT NULL DEFAULT 'ok' CHECK (status IN ('ok', 'inactive', 'revoked')),
    alias             text,
    heard_at          timestamptz NOT NULL,
    heard_slot        integer NOT NULL
                      GENERATED ALWAYS AS (floor(extract(epoch FROM heard_at AT TIME ZONE 'UTC') / 300)::integer) STORED,
    sections          smallint NOT NULL DEFAULT 31,
    said_facts        integer,
    kept_facts        integer,
    name              text,
    changes           smallint NOT NULL DEFAULT 0          -- what the last heartbeat changed (sql/queries/writer.sql)
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX device_last_status_slot ON device_last_status (heard_slot) WHERE status = 'ok';
-- The index is partial: it contains only the few devices whose Unity app is not running. An update of a device whose
-- app keeps its state does not change the index.
CREATE INDEX device_last_status_unity_down ON device_last_status (device_no)
    WHERE unity_running = false AND status = 'ok';

-- When a device is renamed, revoked or readmitted, its last status is changed in the same transaction.
CREATE FUNCTION tell_last_status() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE device_last_status SET
        alias = NEW.alias,
        name = NEW.name,
        status = CASE WHEN NEW.revoked_at IS NOT NULL THEN 'revoked' WHEN status = 'revoked' THEN 'ok' ELSE status END
    WHERE device_no = NEW.device_no;
    RETURN NULL;
END $$;
CREATE TRIGGER devices_tell_last_status AFTER UPDATE OF alias, name, revoked_at ON devices FOR EACH ROW
    WHEN (NEW.alias IS DISTINCT FROM OLD.alias OR NEW.name IS DISTINCT FROM OLD.name
          OR (NEW.revoked_at IS NULL) <> (OLD.revoked_at IS NULL))
    EXECUTE FUNCTION tell_last_status();

-- Completes the first status of a device with its alias, name and revocation. The trigger fires once per device, because an ON
-- CONFLICT DO UPDATE that updates a row fires no INSERT trigger. A concurrent revocation has locked the device, so FOR
-- SHARE waits for the revocation; a later revocation waits for this transaction, and then finds the row.
CREATE FUNCTION ask_device() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    device record;
BEGIN
    SELECT alias, name, revoked_at IS NOT NULL AS revoked INTO device
    FROM devices WHERE device_no = NEW.device_no FOR SHARE;
    IF device.revoked OR device.alias IS NOT NULL OR device.name IS NOT NULL THEN
        UPDATE device_last_status SET
            alias = device.alias,
            name = device.name,
            status = CASE WHEN device.revoked THEN 'revoked' ELSE status END
        WHERE device_no = NEW.device_no;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER last_status_asks_device AFTER INSERT ON device_last_status FOR EACH ROW
    WHEN (NEW.alias IS NULL)
    EXECUTE FUNCTION ask_device();

-- taking_heartbeats has one row, which every daemon renews every five seconds while it accepts heartbeats. blackouts
-- has the gaps between renewals. During a gap nexhb could not receive any heartbeat, so a gap does not count as a
-- device's silence.
CREATE TABLE taking_heartbeats (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    since      timestamptz NOT NULL,
    renewed_at timestamptz NOT NULL
);

CREATE TABLE blackouts (
    began_at timestamptz PRIMARY KEY,
    ended_at timestamptz NOT NULL CHECK (ended_at > began_at)
);

-- ---- watching -----------------------------------------------------------------------------------------------------

-- What heartbeats changed, noted by the writer in the transaction that changed the status, and deleted by the watcher
-- in the transaction that judges it. Without this table, the watcher would have to compare a million statuses in each
-- round. `changes` is explained in sql/queries/writer.sql; the other columns are the content of that heartbeat.
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

-- The last round of the watcher. If the database is another one (its system identifier and oid), or the states were made
-- by other rules, the watcher adopts the present states without events.
CREATE TABLE watch (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    database   text NOT NULL,
    rules      integer NOT NULL,
    adopted_at timestamptz NOT NULL,
    round_at   timestamptz NOT NULL
);

-- What the watcher has established about each device. A state is written only if its revision is the one that was read,
-- so that two daemons cannot both record a change.
CREATE TABLE device_state (
    device_no         integer PRIMARY KEY,
    presence          text NOT NULL CHECK (presence IN ('online', 'offline')),
    presence_since    timestamptz NOT NULL,                -- offline: when it was last heard
    unity             text CHECK (unity IN ('running', 'down')),
    unity_since       timestamptz,
    battery           text CHECK (battery IN ('ok', 'low')),
    battery_since     timestamptz,
    clock             text NOT NULL CHECK (clock IN ('right', 'wrong')),
    clock_since       timestamptz NOT NULL,
    agent_version     text,
    unity_pkg_version text,
    interval_s        real,                                -- learned interval between heartbeats; null: not needed so far
    skew_s            real,                                -- usual delay from ts to received_at
    flips             timestamptz[] NOT NULL DEFAULT '{}', -- changes of presence and Unity within the last hour
    flapping_since    timestamptz,
    adopted           text[] NOT NULL DEFAULT '{}',        -- faults that were there in the first round: no incidents
    due_at            timestamptz,                         -- when to look at the device again, even if it does nothing
    revision          integer NOT NULL DEFAULT 0
);
CREATE INDEX device_state_due ON device_state (due_at) WHERE due_at IS NOT NULL;

-- Incidents, about which messages are sent: a fault of a device, or the same fault of a whole site or the fleet.
-- docs/decisions/0014 has the rules. Only one incident of a kind is open for the same device, site or fleet.
CREATE TABLE incidents (
    incident_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind           text NOT NULL
                   CHECK (kind IN ('offline', 'unity_down', 'battery_low', 'clock_wrong', 'token_shared', 'flapping',
                                   'nightly_failed', 'disk_low')),  -- the last two: of nexhb itself (scope ours)
    scope          text NOT NULL CHECK (scope IN ('device', 'site', 'fleet', 'ours')),
    site           text,
    device_no      integer,                                -- null unless the scope is device
    severity       text NOT NULL CHECK (severity IN ('info', 'warning', 'critical')),
    cause          text,
    since          timestamptz NOT NULL,                   -- of the first device
    opened_at      timestamptz NOT NULL,
    resolved_at    timestamptz,
    settled_at     timestamptz,                            -- when the cause became final
    mostly_back_at timestamptz,                            -- since when over half of its devices have recovered
    absorbed_into  bigint REFERENCES incidents,            -- an incident of wider scope, or of flapping
    continues      bigint REFERENCES incidents,            -- the incident of a site that ended without this device
    acked_at       timestamptz,
    acked_by       text,
    quiet          boolean NOT NULL DEFAULT false,         -- ended without a message
    members        integer NOT NULL DEFAULT 0,             -- devices that have the fault now
    devices        integer NOT NULL DEFAULT 0,             -- devices that had it
    evidence       jsonb NOT NULL DEFAULT '{}'
);
CREATE UNIQUE INDEX incidents_open ON incidents (kind, scope, coalesce(site, ''), coalesce(device_no, 0))
    WHERE resolved_at IS NULL;
CREATE INDEX incidents_resolved ON incidents (resolved_at) WHERE resolved_at IS NOT NULL;
CREATE INDEX incidents_absorbed ON incidents (absorbed_into) WHERE absorbed_into IS NOT NULL;

CREATE TABLE incident_devices (
    incident_id bigint NOT NULL REFERENCES incidents,
    device_no   integer NOT NULL,
    kind        text NOT NULL,                             -- that of the incident
    joined_at   timestamptz NOT NULL,
    left_at     timestamptz,
    PRIMARY KEY (incident_id, device_no)
);
CREATE UNIQUE INDEX incident_devices_open ON incident_devices (device_no, kind) WHERE left_at IS NULL;

-- What changed; rows are only added. `cause` is the first guess (offline) or what was known at the return (online); a
-- cause that is settled later is in device_outages.
CREATE TABLE device_events (
    event_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,                      -- when the watcher recorded it
    since       timestamptz NOT NULL,                      -- when it happened
    device_no   integer,
    site        text,                                      -- of the device at that time
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

-- The silences of devices, with their causes. A device has at most one outage that has not ended.
CREATE TABLE device_outages (
    outage_no   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_no   integer NOT NULL,
    since       timestamptz NOT NULL,                      -- when the device was last heard
    until       timestamptz,                               -- when it was heard again
    cause       text NOT NULL,
    evidence    jsonb NOT NULL DEFAULT '{}',
    settle_at   timestamptz,                               -- when to determine the final cause; null before and after
    settled_at  timestamptz,
    incident_id bigint REFERENCES incidents,
    CHECK (until >= since)
);
CREATE UNIQUE INDEX device_outages_open ON device_outages (device_no) WHERE until IS NULL;
CREATE INDEX device_outages_device ON device_outages (device_no, since);
CREATE INDEX device_outages_settle ON device_outages (settle_at) WHERE settle_at IS NOT NULL;
CREATE INDEX device_outages_incident ON device_outages (incident_id) WHERE incident_id IS NOT NULL;

-- ---- the life of a day --------------------------------------------------------------------------------------------

-- What happened to each partition, kept after its table is dropped. Which partitions are attached is read from the
-- catalog: a name in this table proves nothing.
CREATE TABLE hb_partitions (
    partition_name  text PRIMARY KEY,
    range_start     timestamptz NOT NULL,
    range_end       timestamptz NOT NULL,
    state           text NOT NULL DEFAULT 'active'
                    CHECK (state IN ('active', 'archived', 'archive_failed', 'dropped')),
    row_count       bigint,
    bytes_size      bigint,
    checksum_sha256 text,                                  -- SHA-256 of the archive's manifest, which lists the checksums of the objects
    archive_url     text,                                  -- URL of the manifest
    created_at      timestamptz NOT NULL DEFAULT now(),
    archived_at     timestamptz,
    dropped_at      timestamptz,
    reason          text,                                  -- why the last attempt to archive the day failed
    failed_at       timestamptz,
    counted_at      timestamptz,                           -- when row_count and bytes_size were determined
    frozen_at       timestamptz,                           -- when VACUUM (FREEZE) ran, once, after the last heartbeat that could arrive
    archive_bytes   bigint,                                -- size of the archive's objects, compressed
    verified_at     timestamptz,                           -- when the archive was last read back and was complete
    drilled_at      timestamptz,                           -- when the archive was last restored and compared, as a test
    restored_at     timestamptz                            -- when an operator restored the day, which is kept until it is released
);

-- What each device did on each UTC day, from which uptimes are computed. Kept for two years (uptime.retention_days),
-- because the heartbeats themselves are archived much sooner. nexhb/watching/months.py creates one partition per month
-- (device_days_YYYYMM). Each part of the day is in tenths of a minute, which fit into two bytes: 14,400 a day. The six
-- parts closed … unknown add up to the time for which the device existed on that day; unity is a part of heard and
-- replayed.
--
--   BYTES PER DEVICE AND DAY, 100,000 rows: 68.3 in the heap and 22.6 in the index, 91 in all; is_open adds 22.6
--
-- (pg_relation_size; a month of 2,000 devices has the same.) A row that is null in battery_least takes as much: its bitmap
-- of nulls fits into the padding. The key begins with the day, so that the rows of a day, which are written in the order
-- of device_no, fill each page of the index.
CREATE TABLE device_days (
    device_no       integer NOT NULL,
    day             date NOT NULL,
    place_no        integer NOT NULL,                      -- where the device was on that day
    closed_tenths   smallint NOT NULL,
    ours_tenths     smallint NOT NULL,
    heard_tenths    smallint NOT NULL,
    replayed_tenths smallint NOT NULL,
    off_tenths      smallint NOT NULL,
    unknown_tenths  smallint NOT NULL,
    unity_tenths    smallint NOT NULL,
    flaps           smallint NOT NULL,
    reboots         smallint NOT NULL,
    battery_least   smallint,
    is_open         boolean NOT NULL,                      -- a silence of the day had not ended when the row was made
    PRIMARY KEY (day, device_no)
) PARTITION BY RANGE (day);
CREATE INDEX device_days_open ON device_days (device_no) WHERE is_open;

-- The places of device_days: a site with its time zone and opening hours, as they were on the days that refer to it. A
-- row is never changed, so moving a device, or changing a site's hours, does not rewrite days.
CREATE TABLE day_places (
    place_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    site     text,
    zone     text,
    hours    text
);
CREATE UNIQUE INDEX day_places_place ON day_places (coalesce(site, ''), coalesce(zone, ''), coalesce(hours, ''));

-- The days of device_days that are complete. A day is made again when the ledger has more heartbeats of it than when it
-- was made.
CREATE TABLE days_made (
    day     date PRIMARY KEY,
    written bigint NOT NULL,                               -- the ledger's sum of the day before its rows were read
    made_at timestamptz NOT NULL
);

-- Heartbeats whose day had already been detached, archived or dropped when they arrived. They are acknowledged like any
-- other, and kept here until the nightly run moves them into their day's table (while it exists) or into a supplement
-- of its archive.
CREATE TABLE late_heartbeats (
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
    ip            inet,
    reason        text NOT NULL,                           -- detached, archived, archive_failed or dropped
    PRIMARY KEY (device_no, bucket)
);

-- Heartbeats that arrived after their day was archived: further archives of that day, which share no row with each
-- other.
CREATE TABLE archive_supplements (
    supplement_no   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    partition_name  text NOT NULL REFERENCES hb_partitions,
    archive_url     text NOT NULL UNIQUE,
    checksum_sha256 text NOT NULL,                         -- SHA-256 of its manifest, as in hb_partitions
    row_count       bigint NOT NULL,
    archive_bytes   bigint NOT NULL,
    archived_at     timestamptz NOT NULL,
    verified_at     timestamptz,
    drilled_at      timestamptz
);
CREATE INDEX archive_supplements_partition ON archive_supplements (partition_name);

-- The marker is an object that shows that an archive store is the right one. Where the marker is missing (an unmounted
-- folder, an emptied bucket, a wrong prefix), nothing is archived, and nothing is dropped.
CREATE TABLE archive_markers (
    place     text PRIMARY KEY,                            -- URL of the store, without the objects' names
    marker    text NOT NULL,                               -- the object's name
    marked_at timestamptz NOT NULL
);

-- Manifests whose rows a later archive of the same day contains. They stay in the store, and the catalog does not need
-- them.
CREATE TABLE archive_superseded (
    archive_url   text PRIMARY KEY,
    superseded_at timestamptz NOT NULL
);

-- How many heartbeats of each day (UTC, of ts) were committed, added in the transaction that commits them; `nexhb
-- audit` compares it with the day's partition or archive. There is one row per day and backend, so that no daemon waits
-- for another; the nightly run adds the rows of past days to slot 0. With this fillfactor, a row that is updated with
-- every batch stays on its page.
CREATE TABLE ingest_ledger (
    day          date NOT NULL,
    slot         integer NOT NULL,                         -- pid of the writer's backend; 0: sums of past days, and corrections
    written      bigint NOT NULL,                          -- rows, wherever they are stored now
    deduplicated bigint NOT NULL,                          -- heartbeats whose bucket already had a row
    PRIMARY KEY (day, slot)
) WITH (fillfactor = 50);

-- How far the import from NexMDM has got, one row per source and day, written in the transaction that writes the
-- imported rows: an import that is killed continues from there.
CREATE TABLE legacy_days (
    source       text NOT NULL,
    day          date NOT NULL,
    after_device text NOT NULL,                            -- the last row that was read: device_id, ts, hb_id
    after_ts     timestamptz NOT NULL,
    after_hb     bigint NOT NULL,
    written      bigint NOT NULL,                          -- rows that were written to nexhb, in all runs
    deduplicated bigint NOT NULL DEFAULT 0,
    source_rows  bigint,                                   -- number of rows in the source when the day was finished
    finished_at  timestamptz,                              -- null: not finished yet
    copies       bigint NOT NULL DEFAULT 0,                -- part of deduplicated: heartbeats that nexhb received itself, and stored with another ts
    PRIMARY KEY (source, day)
);

-- The NexMDM databases that were imported: the time zone in which the times of each source were read, and how the hour
-- that is repeated at the end of daylight saving time was resolved. Both apply to every later import of the source.
CREATE TABLE legacy_sources (
    source        text PRIMARY KEY,
    timezone      text NOT NULL,
    repeated_hour text CHECK (repeated_hour IN ('first', 'second', 'by-id'))
);

-- The devices that were imported from each source. A device that the source no longer has was deleted there.
CREATE TABLE legacy_devices (
    source     text NOT NULL,
    device_no  integer NOT NULL REFERENCES devices,
    last_seen  timestamptz,                                -- as in NexMDM at the last import; it only increases there
    revoked_at timestamptz,                                -- when an import revoked it in nexhb, because the source had deleted it
    PRIMARY KEY (source, device_no)
);

-- Every run of a job. A missed run is detected from this table, not from the memory of a scheduler.
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

-- What operators switch while daemons run: one row per flag, the same for every daemon of the database. The
-- configuration provides the first value; from then on the row counts.
CREATE TABLE feature_flags (
    flag       text PRIMARY KEY,
    value      jsonb NOT NULL,
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL
);

-- Who changed which flag, and when. Kept for a year.
CREATE TABLE feature_flag_changes (
    change_no  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    flag       text NOT NULL,
    value_from jsonb,                                      -- null: its first value
    value_to   jsonb,                                      -- null: its row was deleted by hand
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL                               -- user@host, an address, config, perf_diff
);

-- Written by a trigger, so that a change by hand is recorded too, in its own transaction. Every daemon is notified at
-- once.
CREATE FUNCTION note_flag_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO feature_flag_changes (flag, value_from, changed_at, changed_by)
        VALUES (OLD.flag, OLD.value, now(), session_user || ' (DELETE)');
    ELSIF TG_OP = 'INSERT' THEN
        INSERT INTO feature_flag_changes (flag, value_to, changed_at, changed_by)
        VALUES (NEW.flag, NEW.value, NEW.changed_at, NEW.changed_by);
    ELSIF NEW.value IS DISTINCT FROM OLD.value THEN
        INSERT INTO feature_flag_changes (flag, value_from, value_to, changed_at, changed_by)
        VALUES (NEW.flag, OLD.value, NEW.value, NEW.changed_at, NEW.changed_by);
    END IF;
    PERFORM pg_notify('nexhb_flags', '');
    RETURN NULL;
END $$;
CREATE TRIGGER feature_flags_changed AFTER INSERT OR UPDATE OR DELETE ON feature_flags
    FOR EACH ROW EXECUTE FUNCTION note_flag_change();

-- Reads that perf_diff ran against both sources in one snapshot. Kept for eight days.
CREATE TABLE perf_diff_comparisons (
    comparison_no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    query         text NOT NULL,
    compared_at   timestamptz NOT NULL,
    fast_ms       real NOT NULL,
    legacy_ms     real NOT NULL,
    fast_rows     integer NOT NULL,
    legacy_rows   integer NOT NULL,
    rows_differ   integer NOT NULL,
    examples      text[] NOT NULL,                         -- a few of the devices that differ
    host          text NOT NULL
);
CREATE INDEX perf_diff_comparisons_at ON perf_diff_comparisons (compared_at);

-- Generations of this database. Each daemon adds one when it starts, every five minutes, and whenever it has learned of
-- a changed token; it remembers the last one that it added, in data_dir too. A database that lacks that generation is
-- an older copy: what was committed since is missing. The last 50,000 are kept.
CREATE TABLE database_generations (
    generation bigint PRIMARY KEY,
    mark       uuid NOT NULL DEFAULT gen_random_uuid(),    -- two copies that continue separately add different marks
    made_at    timestamptz NOT NULL DEFAULT now()
);

-- Generations that a daemon remembers and this database lacks. Until `nexhb database accept`, tokens that the database
-- does not know receive 503 and not 401: their devices may have been added after the copy was made.
CREATE TABLE database_missing (
    mark        uuid PRIMARY KEY,
    generation  bigint NOT NULL,
    host        text NOT NULL,                             -- the daemon's host
    found_at    timestamptz NOT NULL DEFAULT now(),
    accepted_at timestamptz
);

-- The migrations that were applied. nexhb/postgres/migrate.py creates this table before the first of them; the checksum
-- detects a file that was changed after it was applied.
CREATE TABLE schema_migrations (
    version         integer PRIMARY KEY,
    name            text NOT NULL,
    checksum_sha256 text NOT NULL,
    applied_at      timestamptz NOT NULL
);

-- Which messages each route was sent about each incident. Whether another message is due follows from this record and
-- from the incident; messages and this record are written in one transaction. docs/decisions/0015 has the rules.
CREATE TABLE incident_routes (
    incident_id bigint NOT NULL REFERENCES incidents ON DELETE CASCADE,
    route       text NOT NULL,                             -- a name in notify.routes
    opened_at   timestamptz NOT NULL,                      -- when the route was told of the opening
    scope       text NOT NULL,                             -- the widest scope that the route was told of; empty: only of a
                                                           -- fault that this one replaces
    reminded_at timestamptz NOT NULL,                      -- when the route was last told that the incident is open
    resolved_at timestamptz,                               -- when it was told of the end, or no longer had to be
    PRIMARY KEY (incident_id, route)
);
CREATE INDEX incident_routes_unresolved ON incident_routes (incident_id) WHERE resolved_at IS NULL;

-- The outbox: messages about incidents. Every daemon delivers them; a lease marks a message that a daemon is sending.
CREATE TABLE notifications (
    notification_no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id              text NOT NULL UNIQUE,                  -- the same in every attempt: a webhook's webhook-id
    incident_id     bigint NOT NULL REFERENCES incidents ON DELETE CASCADE,
    route           text NOT NULL,
    kind            text NOT NULL CHECK (kind IN ('opened', 'widened', 'reminder', 'resolved')),
    payload         jsonb NOT NULL,                        -- the incident when the message was due
    created_at      timestamptz NOT NULL,
    due_at          timestamptz NOT NULL,                  -- of the next attempt
    attempts        integer NOT NULL DEFAULT 0,
    lease_until     timestamptz,                           -- until then, one daemon alone may send the message
    delivered_at    timestamptz,
    given_up_at     timestamptz,                           -- 24 hours after created_at
    last_error      text
);
CREATE INDEX notifications_pending ON notifications (route, notification_no)
    WHERE delivered_at IS NULL AND given_up_at IS NULL;
CREATE INDEX notifications_incident ON notifications (incident_id, route, notification_no);

-- Silences: periods in which no messages are sent. With `hours`, the silence recurs in these hours.
CREATE TABLE silences (
    silence_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    scope       text NOT NULL CHECK (scope IN ('fleet', 'site', 'tag', 'device')),
    value       text CHECK ((value IS NULL) = (scope = 'fleet')),  -- the site, the tag, or the device_id
    "from"      timestamptz NOT NULL,
    until       timestamptz CHECK (until > "from"),
    hours       text,                                      -- in OpenStreetMap's notation
    zone        text,
    reason      text NOT NULL,
    created_by  text NOT NULL,
    created_at  timestamptz NOT NULL,
    CHECK (until IS NOT NULL OR hours IS NOT NULL),
    CHECK ((hours IS NULL) = (zone IS NULL))
);
