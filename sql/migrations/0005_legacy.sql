-- Why: moving over from NexMDM: which tokens were taken from it and which bcrypt hashes still wait for their token, and
-- how far each day of its history is.
-- Lock: none that matters: two new tables.
-- To prepare: nothing.

CREATE TABLE legacy_tokens (
    device_no   integer NOT NULL REFERENCES devices,
    fingerprint bytea NOT NULL CHECK (length(fingerprint) = 32),
    bcrypt      text,
    taken_at    timestamptz NOT NULL,
    adopted_at  timestamptz,
    PRIMARY KEY (device_no, fingerprint)
);
CREATE INDEX legacy_tokens_waiting ON legacy_tokens (taken_at) WHERE bcrypt IS NOT NULL;

CREATE TABLE legacy_days (
    source       text NOT NULL,
    day          date NOT NULL,
    after_device text NOT NULL,
    after_ts     timestamptz NOT NULL,
    after_hb     bigint NOT NULL,
    written      bigint NOT NULL,
    deduplicated bigint NOT NULL DEFAULT 0,
    source_rows  bigint,
    finished_at  timestamptz,
    PRIMARY KEY (source, day)
);
