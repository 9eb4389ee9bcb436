-- The whole schema as it is now, with the reasons and the figures that decided it. To be read.
--
-- nexhb runs the files of migrations/, never this one; tests/promises/test_schema_is_the_migrations.py holds the two
-- together, to the last default. The partitions of device_heartbeats are in neither: nexhb/partitions.py makes one a
-- day. All times are timestamptz; nexhb's sessions run in UTC.

-- ---- devices: who may send ----------------------------------------------------------------------------------------

-- One row a device, for ever: a heartbeat carries device_no, which must keep its meaning. The facts (alias …
-- manufacturer) are what the newest heartbeat said of the device itself; they change rarely, so they stand here once
-- and not in every heartbeat. They follow the content of device_last_status (newer_content, below): a late heartbeat
-- does not turn them back. facts_ts is the ts of the heartbeat that changed them last.
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
    revoked_at      timestamptz,                           -- from then on its heartbeats are answered 410
    rotated         boolean NOT NULL DEFAULT false,        -- it got a new token here: none of NexMDM's is taken any more
    name            text,                                  -- that people gave it; no heartbeat changes it
    nexmdm_name     text                                   -- in NexMDM at the last import: a later one there is taken
);

-- A table of their own, because a device may hold several tokens (an imported one beside its own, an old one while it
-- is rotated), and because the triggers below must fire for a change of a token, not for every change of an alias.
-- Only the SHA-256 is stored: the token is 256 random bits, so a slow hash would protect nothing and cost much
-- (bcrypt on every heartbeat held the public server to 3.7 heartbeats/s). A revoked token stays known: the device is
-- to hear 410, and not 401, after five of which in a row it erases its credentials.
CREATE TABLE device_tokens (
    token_sha256 bytea PRIMARY KEY CHECK (length(token_sha256) = 32),
    device_no    integer NOT NULL REFERENCES devices,
    created_at   timestamptz NOT NULL DEFAULT now(),
    revoked_at   timestamptz
);
CREATE INDEX device_tokens_device ON device_tokens (device_no);

-- How often tokens have changed: the sum of all rows. Each daemon reads it every second, so that a revocation is in
-- force within seconds where its notification was lost. 64 rows, so that two changes seldom wait for each other.
CREATE TABLE device_token_changes (
    slot    integer PRIMARY KEY,                           -- the backend's pid modulo 64
    changes bigint NOT NULL
) WITH (fillfactor = 50);

-- Each daemon holds all tokens in memory and hears of every change at once. The payload says which tokens changed, as
-- hex: 100 of them are 6,500 bytes, and a notification takes 8,000. More (an import) is the empty text: read all again.
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
-- For each statement, not for each row: 20,000 imported tokens are one notification.
CREATE TRIGGER device_tokens_added AFTER INSERT ON device_tokens
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
CREATE TRIGGER device_tokens_changed AFTER UPDATE ON device_tokens
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();
CREATE TRIGGER device_tokens_removed AFTER DELETE ON device_tokens
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION notify_token_change();

-- With auth.enrolment = "open" a device registers itself against one of these. A use is taken by one conditional
-- UPDATE, so that two devices cannot both take the last one.
CREATE TABLE enrolment_keys (
    key_sha256 bytea PRIMARY KEY CHECK (length(key_sha256) = 32),
    note       text,
    uses_left  integer NOT NULL CHECK (uses_left >= 0),
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- With which key a device registered itself. An answer that is lost takes the token with it, and the device comes again:
-- with the same key, and before its first heartbeat, it is admitted once more, with a new token and without another use.
CREATE TABLE enrolments (
    device_no   integer PRIMARY KEY REFERENCES devices,
    key_sha256  bytea NOT NULL CHECK (length(key_sha256) = 32),
    enrolled_at timestamptz NOT NULL
);

-- What a device was last refused for, and which tokens two kiosks share (a cloned image): for whoever asks what is wrong
-- with one. Each daemon writes what it saw, at most once a minute a device, beside the heartbeats' way.
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
    evidence  jsonb NOT NULL                               -- the two: model, build, address, when they booted
);

-- The credentials that an import took from NexMDM, once each: a credential is not given a second time, so that a device
-- which was rotated since does not get its old token back. fingerprint: the SHA-256 of NexMDM's bcrypt hash, which never
-- changes there; the token's SHA-256 where there is no such hash, and in rows from before 0011 that no import has mended
-- yet. bcrypt waits for the device's first heartbeat, or for NexMDM to learn the token; then the token goes to
-- device_tokens, and the hash is removed.
CREATE TABLE legacy_tokens (
    device_no    integer NOT NULL REFERENCES devices,
    fingerprint  bytea NOT NULL CHECK (length(fingerprint) = 32),
    bcrypt       text,                                     -- null: nothing is to be found out any more
    taken_at     timestamptz NOT NULL,
    adopted_at   timestamptz,
    token_sha256 bytea CHECK (length(token_sha256) = 32),  -- null: not known, or not yet
    PRIMARY KEY (device_no, fingerprint)
);
CREATE INDEX legacy_tokens_waiting ON legacy_tokens (taken_at) WHERE bcrypt IS NOT NULL;

-- ---- the history --------------------------------------------------------------------------------------------------

-- What most heartbeats share, once each: a fleet has a few versions and a network name a site. Texts are empty where
-- unknown, not null, so that the unique key holds. sections: which parts the heartbeat had (battery 1, network 2,
-- memory 4, system 8, app_versions 16), as a part that is absent says nothing of its fields. It stands here since nearly
-- all heartbeats have all of them, so that it costs the history no byte.
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
--   BYTES PER HEARTBEAT, 240,000 heartbeats of 2,000 varied devices written minute by minute: `python -m bench micro`
--
--   layout                                                                            heap   index   total
--   NexMDM's: text id, texts; primary key (device_id, ts, hb_id), index (device_id, ts)    160.4   190.4   350.8
--   the same with its third index, for deduplication                                 160.4   267.8   428.2
--   this one: integer device number, key (device_no, bucket), four texts in labels    90.8    27.3   118.1
--
-- Columns stand from wide to narrow, so that no byte goes to alignment, and what varies in length comes last: 32 bytes
-- of header (with the bitmap of nulls: today's agent sends no signal_dbm), 2 × 8, 6 × 4, 1 or 2 × 2, 3 × 1, 7 of an
-- IPv4 address make 88, and 4 of line pointer 92.
--
-- bucket is the start of the ten seconds (ingest.bucket_seconds) of ts that admit one row a device, in seconds since
-- 2020-01-01: four bytes, which last to 2088, where a timestamp would take eight in the row and eight in the key.
--
-- One row a device and bucket: UNIQUE (device_no, bucket) is an index of each partition, made with it by
-- nexhb/partitions.py (device_heartbeats_YYYYMMDD_key). Here it cannot stand, because a unique key of the parent must
-- contain the partition key: ts. That loses nothing: a bucket lies within one day. The same index serves the history
-- of a device, newest first.
--
-- No foreign keys: each would cost a look-up a row, devices and labels are never deleted, and the table can be
-- distributed by device_no as it stands (tried on Citus: every unique key contains the distribution key). No DEFAULT
-- partition either: it forbids DETACH CONCURRENTLY and holds up each new day once a row has strayed into it. The
-- accept window and the days made ahead keep strays out.
CREATE TABLE device_heartbeats (
    ts            timestamptz NOT NULL,                    -- made: the device's clock, or received_at where that is wrong
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
    clock_wrong   boolean NOT NULL,                        -- its own time lay outside the accept window
    ip            inet
) PARTITION BY RANGE (ts);

-- The history as people ask for it: by device_id, with every column, the texts in their place. LEFT: a row whose device
-- or label is missing, which `nexhb audit` and `nexhb doctor` report, is shown with nulls.
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

-- Whether a heartbeat that comes now is newer content than what is known of its device. Its ts decides. An older ts is
-- newer only where the uptime has grown by what has passed between both receipts (within a minute): then the device's
-- clock was set back. A queue never passes for that: of the same boot its uptime is smaller, of an earlier one it has
-- not grown by that time. And a ts that lies more than a day ahead of this receipt (ingest.accept_future is a day at
-- most) was taken by a daemon whose clock was wrong, unless it is this receipt's clock that is. A heartbeat that was made
-- within the hour before its receipt shows that the receipt is right; of a device whose clock was wrong both times, the
-- later one counts.
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

-- The heartbeat of the history that is newer than the one with the latest ts, as the device's clock was set back after
-- that one; no row where it was not.
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

-- One row a device, written with every heartbeat: a million rows a minute at a million devices.
-- What decides its layout is therefore how many of those updates are HOT, touching no index and leaving their dead row
-- to the next visitor of the page: fillfactor 85 keeps room for it on the page, and no index may hold heard_at or last_ts.
--
--   `python -m bench micro`: upserts in batches of 2,000, then the offline query. Rates vary by a fifth from run to run,
--   HOT shares and the orders of magnitude of the query do not.
--
--   index                            2,000 devices, 100 silent          1,000,000 devices, 1,000 silent
--   primary key only                 111,124/s  90 % HOT  0.26 ms       74,946/s  95 % HOT  123.67 ms  35 MB index
--   btree (last_ts)                   87,694/s   0 % HOT  0.13 ms       64,888/s   0 % HOT    0.90 ms  104 MB
--   BRIN (last_ts)                   106,284/s  90 % HOT  0.25 ms       82,601/s  96 % HOT   63.24 ms  27 MB
--   btree (a slot): this one       99,304/s  71 % HOT  0.12 ms       66,283/s  76 % HOT    0.83 ms  74 MB
--
-- heard_slot is the number of the five minutes that heard_at lies in. It changes with every fifth heartbeat (at 60 s),
-- and the four between stay HOT. `heard_slot <= slot of the cutoff` comes from the index and is at most one slot too
-- much; `heard_at < cutoff` takes that away. Right for every cutoff; quick as long as the threshold is longer than the
-- interval and a slot together (600 s against 60 + 300): then the index yields the silent ones and hardly another.
--
-- Presence and content are two things. heard_at says when a device was last heard, on the database's clock, whatever it
-- sent: a queue that is replayed, a duplicate, a heartbeat whose clock is wrong. All other columns say what is known of
-- it: the content of its newest heartbeat, received at received_at, with what that one left out as it was known before
-- (sections: what it had). said_facts is the digest of what it said of the device itself, kept_facts that of what devices
-- holds of this: where they differ, the writer brings devices up to date, whichever daemon wrote last.
--
-- device_id stands here too, though devices has it: both of the seed's queries (SELECT * … WHERE last_ts < …) must say
-- which device they mean. So do alias and name: of the 12.6 ms that PostgreSQL took for 1,000 silent devices of a
-- million, 10 went into looking the alias up. status leaves revoked devices out of what is asked of the fleet. All three
-- follow devices by the triggers below, whoever changes it, and no heartbeat pays for them.
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
    name              text
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX device_last_status_slot ON device_last_status (heard_slot) WHERE status = 'ok';
-- Partial: it holds the few devices whose Unity does not run, and an update of one whose Unity goes on running (or
-- goes on not running) does not touch it.
CREATE INDEX device_last_status_unity_down ON device_last_status (device_no)
    WHERE unity_running = false AND status = 'ok';

-- A device that is renamed, revoked or admitted again: its status says so in the same transaction.
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

-- The first status of a device, once in its life: ON CONFLICT DO UPDATE does not come here. A revocation that is under
-- way has locked the device, so it is waited for (FOR SHARE); one that comes later waits for us, and then finds the row.
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

-- The row that every daemon renews every five seconds while it takes heartbeats, and the gaps between its renewals: in
-- them nexhb could not have heard a device, so that they do not count as its silence.
CREATE TABLE taking_heartbeats (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    since      timestamptz NOT NULL,
    renewed_at timestamptz NOT NULL
);

CREATE TABLE blackouts (
    began_at timestamptz PRIMARY KEY,
    ended_at timestamptz NOT NULL CHECK (ended_at > began_at)
);

-- ---- the life of a day --------------------------------------------------------------------------------------------

-- What became of each partition, also when its table is long gone. What is attached is read from the catalog: a name
-- here proves nothing.
CREATE TABLE hb_partitions (
    partition_name  text PRIMARY KEY,
    range_start     timestamptz NOT NULL,
    range_end       timestamptz NOT NULL,
    state           text NOT NULL DEFAULT 'active'
                    CHECK (state IN ('active', 'archived', 'archive_failed', 'dropped')),
    row_count       bigint,
    bytes_size      bigint,
    checksum_sha256 text,                                  -- of its archive's manifest, which has those of the objects
    archive_url     text,                                  -- of that manifest
    created_at      timestamptz NOT NULL DEFAULT now(),
    archived_at     timestamptz,
    dropped_at      timestamptz,
    reason          text,                                  -- why the last try to archive it failed
    failed_at       timestamptz,
    counted_at      timestamptz,                           -- when row_count and bytes_size were true
    frozen_at       timestamptz,                           -- VACUUM (FREEZE), once, when no heartbeat can come any more
    archive_bytes   bigint,                                -- of its objects, compressed
    verified_at     timestamptz,                           -- last time that its archive was read back and found whole
    drilled_at      timestamptz,                           -- last time that it was restored and compared, as a drill
    restored_at     timestamptz                            -- brought back by somebody: kept until it is released
);

-- Heartbeats whose day was detached, archived or dropped already when they came: acknowledged like any other, kept here
-- until the nightly run brings them into their day's table (while that is there) or into a supplement of its archive.
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

-- What came after a day had been archived: more archives of the same day, none of whose rows the others have.
CREATE TABLE archive_supplements (
    supplement_no   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    partition_name  text NOT NULL REFERENCES hb_partitions,
    archive_url     text NOT NULL UNIQUE,
    checksum_sha256 text NOT NULL,                         -- of its manifest, as in hb_partitions
    row_count       bigint NOT NULL,
    archive_bytes   bigint NOT NULL,
    archived_at     timestamptz NOT NULL,
    verified_at     timestamptz,
    drilled_at      timestamptz
);
CREATE INDEX archive_supplements_partition ON archive_supplements (partition_name);

-- Which object at an archive's place says that it is the very place: without it nothing is archived there, and nothing
-- dropped. A folder that is not mounted, a bucket that was emptied and a wrong prefix lack it.
CREATE TABLE archive_markers (
    place     text PRIMARY KEY,                            -- its url, up to the objects' names
    marker    text NOT NULL,                               -- the object's name
    marked_at timestamptz NOT NULL
);

-- Manifests whose rows a later archive of the same day has: they stay in the store, and the catalog lacks nothing.
CREATE TABLE archive_superseded (
    archive_url   text PRIMARY KEY,
    superseded_at timestamptz NOT NULL
);

-- What was committed of each day (UTC, of ts), added up in the very transaction that commits it: held against the day's
-- partition or archive by `nexhb audit`. A row a day and backend, so that no daemon waits for another; the nightly run
-- folds those of past days into slot 0. fillfactor: a row that is updated with every batch stays on its page.
CREATE TABLE ingest_ledger (
    day          date NOT NULL,
    slot         integer NOT NULL,                         -- the writer's backend; 0: folded, and corrections
    written      bigint NOT NULL,                          -- rows, wherever they are now
    deduplicated bigint NOT NULL,                          -- heartbeats whose bucket had its row already
    PRIMARY KEY (day, slot)
) WITH (fillfactor = 50);

-- How far the import from NexMDM is, a row a source and day, written in the transaction that writes the rows: killed
-- anywhere, it goes on where it was.
CREATE TABLE legacy_days (
    source       text NOT NULL,
    day          date NOT NULL,
    after_device text NOT NULL,                            -- the row read last: device_id, ts, hb_id
    after_ts     timestamptz NOT NULL,
    after_hb     bigint NOT NULL,
    written      bigint NOT NULL,                          -- rows that became rows here, in all runs
    deduplicated bigint NOT NULL DEFAULT 0,
    source_rows  bigint,                                   -- how many the source had when the day was done
    finished_at  timestamptz,                              -- null: not to its end yet
    copies       bigint NOT NULL DEFAULT 0,                -- of deduplicated: made here at another time, and no row
    PRIMARY KEY (source, day)
);

-- The NexMDM databases that were imported: the time zone in which the times of each were read, and how an hour that the
-- end of daylight saving time repeats was told apart. Both hold for every later import of the source.
CREATE TABLE legacy_sources (
    source        text PRIMARY KEY,
    timezone      text NOT NULL,
    repeated_hour text CHECK (repeated_hour IN ('first', 'second', 'by-id'))
);

-- Which devices each source gave: one that the source no longer has was deleted there.
CREATE TABLE legacy_devices (
    source     text NOT NULL,
    device_no  integer NOT NULL REFERENCES devices,
    last_seen  timestamptz,                                -- as NexMDM had it at the last import; it only grows there
    revoked_at timestamptz,                                -- revoked here by an import, since it was deleted there
    PRIMARY KEY (source, device_no)
);

-- Every run of a job. A run that was missed is found here, not in some scheduler's memory.
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

-- What operators switch while daemons run: one row a flag, the same for every daemon of the database. Its first value
-- comes from the configuration; from then on the row counts.
CREATE TABLE feature_flags (
    flag       text PRIMARY KEY,
    value      jsonb NOT NULL,
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL
);

-- Who switched what, and when: kept for a year.
CREATE TABLE feature_flag_changes (
    change_no  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    flag       text NOT NULL,
    value_from jsonb,                                      -- null: its first value
    value_to   jsonb,                                      -- null: its row was deleted by hand
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL                               -- user@host, an address, config, perf_diff
);

-- Written by a trigger, so that a change by hand is in the history too, and in its own transaction. Every daemon hears
-- of it at once.
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

-- Reads that perf_diff asked both ways, in one snapshot: kept for eight days.
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

-- Generations of this database: each daemon adds one when it starts, every five minutes, and at once when it has learned
-- of a changed token; it remembers the last one that it added, in data_dir too. A database that lacks it is an older
-- copy: what was committed since is missing. The last 50,000 are kept.
CREATE TABLE database_generations (
    generation bigint PRIMARY KEY,
    mark       uuid NOT NULL DEFAULT gen_random_uuid(),    -- two copies that go on separately have other marks
    made_at    timestamptz NOT NULL DEFAULT now()
);

-- Generations that a daemon remembers and this database lacks. Until `nexhb database accept`, tokens that the database
-- does not know are answered 503 and not 401: their devices may have been added after the copy was made.
CREATE TABLE database_missing (
    mark        uuid PRIMARY KEY,
    generation  bigint NOT NULL,
    host        text NOT NULL,                             -- of the daemon
    found_at    timestamptz NOT NULL DEFAULT now(),
    accepted_at timestamptz
);

-- Which migrations are in. Made by nexhb/migrate.py before the first of them; the checksum finds a file that was
-- changed after it had been applied.
CREATE TABLE schema_migrations (
    version         integer PRIMARY KEY,
    name            text NOT NULL,
    checksum_sha256 text NOT NULL,
    applied_at      timestamptz NOT NULL
);
