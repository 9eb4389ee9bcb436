-- Why: a registration whose answer was lost is admitted again with the same key; and operators ask which device was
-- refused and why, and which token is in two kiosks.
-- Lock: none that matters: three new tables.
-- To prepare: nothing.

CREATE TABLE enrolments (
    device_no   integer PRIMARY KEY REFERENCES devices,
    key_sha256  bytea NOT NULL CHECK (length(key_sha256) = 32),
    enrolled_at timestamptz NOT NULL
);

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
    evidence  jsonb NOT NULL
);
