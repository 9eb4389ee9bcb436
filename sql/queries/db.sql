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
