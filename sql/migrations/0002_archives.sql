-- Why: days are archived, verified and dropped; late heartbeats have a place; each failure keeps its reason.
-- Lock: ACCESS EXCLUSIVE on hb_partitions for a moment; the new columns are empty, so no row is rewritten. Ingest does
-- not touch that table but when it makes a day.
-- To prepare: nothing.

ALTER TABLE hb_partitions
    ADD COLUMN reason        text,
    ADD COLUMN failed_at     timestamptz,
    ADD COLUMN counted_at    timestamptz,
    ADD COLUMN frozen_at     timestamptz,
    ADD COLUMN archive_bytes bigint,
    ADD COLUMN verified_at   timestamptz,
    ADD COLUMN drilled_at    timestamptz,
    ADD COLUMN restored_at   timestamptz;

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
    reason        text NOT NULL,
    PRIMARY KEY (device_no, bucket)
);

CREATE TABLE archive_supplements (
    supplement_no   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    partition_name  text NOT NULL REFERENCES hb_partitions,
    archive_url     text NOT NULL UNIQUE,
    checksum_sha256 text NOT NULL,
    row_count       bigint NOT NULL,
    archive_bytes   bigint NOT NULL,
    archived_at     timestamptz NOT NULL,
    verified_at     timestamptz,
    drilled_at      timestamptz
);
CREATE INDEX archive_supplements_partition ON archive_supplements (partition_name);
