-- name: settings
-- What a promise of durability rests on.
SELECT current_setting('server_version_num')::int AS version_num,
       current_setting('server_version') AS version,
       current_setting('fsync') AS fsync,
       current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('TimeZone') AS timezone,
       current_setting('nexhb.session', true) AS session_mark,
       pg_is_in_recovery() AS in_recovery;

-- name: can_write
-- False on a standby, and where the operator or the provider (a full disk) has made the database read-only.
SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off';

-- name: missing_tables
-- Tables that the migrations made, and that are not in the session's schema any more.
SELECT relation FROM unnest(ARRAY[
    'archive_markers', 'archive_superseded', 'archive_supplements', 'blackouts', 'database_generations',
    'database_missing', 'device_heartbeats', 'device_last_status', 'device_refusals', 'device_token_changes',
    'device_tokens', 'devices', 'enrolment_keys', 'enrolments', 'feature_flag_changes', 'feature_flags',
    'hb_partitions', 'heartbeat_history', 'heartbeat_labels', 'ingest_ledger', 'job_runs', 'late_heartbeats',
    'legacy_days', 'legacy_devices', 'legacy_sources', 'legacy_tokens', 'perf_diff_comparisons', 'schema_migrations',
    'shared_tokens', 'taking_heartbeats'
]) AS relation
WHERE to_regclass(relation) IS NULL;

-- name: clock
-- The database's time, which is the daemon's.
SELECT clock_timestamp();

-- name: write_after
-- A transaction of its own with nothing in it but a WAL record: its COMMIT waits for the synchronous standbys, if there
-- are any, and they then have all that was committed before. Every role may call it.
SELECT pg_logical_emit_message(true, 'nexhb', '');
