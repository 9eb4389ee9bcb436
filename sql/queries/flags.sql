-- Feature flags, which operators change while daemons run. A trigger on feature_flags records each change and notifies every
-- daemon.

-- name: values
SELECT flag, value::text AS value FROM feature_flags;

-- name: last_change_no
SELECT coalesce(max(change_no), 0) FROM feature_flag_changes;

-- name: changes_since
-- $1 change_no. The changes after this number, in order.
SELECT change_no, flag, value_from::text AS value_from, value_to::text AS value_to, changed_by
FROM feature_flag_changes WHERE change_no > $1 ORDER BY change_no LIMIT 1000;

-- name: last_changes
-- $1 the limit; the newest first.
SELECT flag, value_from::text AS value_from, value_to::text AS value_to, changed_at, changed_by
FROM feature_flag_changes ORDER BY change_no DESC LIMIT $1;

-- name: add_missing
-- $1 flag[], $2 value[] (JSON), $3 now, $4 changed by. Inserts flags that have no row; others stay as they are.
INSERT INTO feature_flags (flag, value, changed_at, changed_by)
SELECT flag, value::jsonb, $3, $4 FROM unnest($1::text[], $2::text[]) AS f (flag, value)
ON CONFLICT (flag) DO NOTHING;

-- name: hold
-- $1 flag[]. Locks the flags in the order of their names, so that concurrent changes wait for each other and do not
-- deadlock.
SELECT flag, value::text AS value FROM feature_flags WHERE flag = ANY($1::text[]) ORDER BY flag FOR UPDATE;

-- name: change
-- $1 flag, $2 value (JSON), $3 now, $4 changed by.
UPDATE feature_flags SET value = $2::text::jsonb, changed_at = $3, changed_by = $4
WHERE flag = $1 AND value <> $2::text::jsonb;
