-- When nexhb accepted heartbeats, and when it did not. A device's silence counts only while nexhb accepted heartbeats.

-- name: hold
-- The row that every ready daemon renews, locked until the end of the transaction, so that only one daemon records a gap.
SELECT since, renewed_at FROM taking_heartbeats FOR UPDATE;

-- name: renew
-- $1 since, $2 renewed_at.
INSERT INTO taking_heartbeats (since, renewed_at) VALUES ($1, $2)
ON CONFLICT (one) DO UPDATE SET since = excluded.since, renewed_at = excluded.renewed_at;

-- name: add_blackout
-- $1 began_at, $2 ended_at.
INSERT INTO blackouts (began_at, ended_at) VALUES ($1, $2) ON CONFLICT DO NOTHING;

-- name: forget
-- Deletes blackouts that ended before $1, and blackouts that end after $2, which a clock that was ahead has written.
DELETE FROM blackouts WHERE ended_at < $1 OR ended_at > $2;

-- name: presence
-- $1 now, $2 the maximum number of blackouts. Returns `since`: since when heartbeats are accepted; `renewed_at`: when a
-- daemon last confirmed that; `began` and `ended`: the blackouts that began before now, newest first. Without rows,
-- these are nulls and empty arrays.
WITH recent AS (
    SELECT began_at, ended_at FROM blackouts WHERE began_at < $1 ORDER BY began_at DESC LIMIT $2
)
SELECT (SELECT since FROM taking_heartbeats) AS since,
       (SELECT renewed_at FROM taking_heartbeats) AS renewed_at,
       (SELECT coalesce(array_agg(began_at ORDER BY began_at DESC), '{}') FROM recent) AS began,
       (SELECT coalesce(array_agg(ended_at ORDER BY began_at DESC), '{}') FROM recent) AS ended;
