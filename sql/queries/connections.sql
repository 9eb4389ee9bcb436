-- Whether the server behind a connection can keep what it commits.

-- name: settings
-- The settings on which durability depends.
SELECT current_setting('server_version_num')::int AS version_num,
       current_setting('server_version') AS version,
       current_setting('fsync') AS fsync,
       current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('TimeZone') AS timezone,
       current_setting('nexhb.session', true) AS session_mark,
       pg_is_in_recovery() AS in_recovery;

-- name: can_write
-- False on a standby, and if the operator or the provider (full disk) has made the database read-only.
SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off';

-- name: missing_tables
-- Tables that the migrations created and that are missing in the session's schema.
SELECT relation FROM unnest(ARRAY[
    'archive_markers', 'archive_superseded', 'archive_supplements', 'blackouts', 'database_generations',
    'database_missing', 'day_places', 'days_made', 'device_changes', 'device_days', 'device_events',
    'device_heartbeats', 'device_last_status', 'device_outages', 'device_refusals', 'device_state',
    'device_token_changes', 'device_tokens', 'devices', 'enrolment_keys', 'enrolments', 'feature_flag_changes',
    'feature_flags', 'hb_partitions', 'heartbeat_history', 'heartbeat_labels', 'incident_devices',
    'incident_routes', 'incidents', 'ingest_ledger', 'job_runs', 'late_heartbeats', 'legacy_days', 'legacy_devices',
    'legacy_sources', 'legacy_tokens', 'notifications', 'perf_diff_comparisons', 'schema_migrations',
    'shared_tokens', 'silences', 'sites', 'taking_heartbeats', 'watch'
]) AS relation
WHERE to_regclass(relation) IS NULL;

-- name: write_after
-- Run as a transaction that only writes a WAL record: its COMMIT waits for the synchronous standbys, if there are any,
-- and the standbys then have everything that was committed before. Every role may call the function.
SELECT pg_logical_emit_message(true, 'nexhb', '');
