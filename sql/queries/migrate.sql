-- name: journal
CREATE TABLE IF NOT EXISTS schema_migrations (
    version         integer PRIMARY KEY,
    name            text NOT NULL,
    checksum_sha256 text NOT NULL,
    applied_at      timestamptz NOT NULL
);

-- name: applied
SELECT version, name, checksum_sha256 FROM schema_migrations ORDER BY version;

-- name: record
-- $1 version, $2 name, $3 checksum_sha256, $4 now.
INSERT INTO schema_migrations (version, name, checksum_sha256, applied_at) VALUES ($1, $2, $3, $4);

-- name: journal_exists
SELECT to_regclass('schema_migrations') IS NOT NULL;

-- name: last
SELECT max(version) FROM schema_migrations;

-- name: database
SELECT current_database();
