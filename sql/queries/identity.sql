-- Which database this is, and whether it contains what a daemon has learned.

-- name: look
-- $1, $2: generation and mark of the last generation that this daemon added; $3, $4: generation and mark of the
-- generation that is missing (either pair may be null); $5 device_no[], $6 device_id[]: the devices that the daemon has
-- learned since generation $1; $7: the highest count of token changes that the daemon has read.
SELECT d.oid::bigint AS oid,
       pg_is_in_recovery() AS in_recovery,
       $2::uuid IS NULL OR EXISTS (SELECT FROM database_generations WHERE generation = $1::bigint AND mark = $2)
           AS contains,
       $4::uuid IS NOT NULL AND EXISTS (SELECT FROM database_generations WHERE generation = $3::bigint AND mark = $4)
           AS found_again,
       $4::uuid IS NOT NULL
           AND EXISTS (SELECT FROM database_missing WHERE mark = $4 AND accepted_at IS NOT NULL) AS accepted,
       (SELECT count(*) FROM unnest($5::int[], $6::text[]) AS l (device_no, device_id)
        JOIN devices USING (device_no, device_id)) AS learned,
       (SELECT coalesce(sum(changes), 0) >= $7::bigint FROM device_token_changes) AS counted,
       (SELECT max(generation) FROM database_missing WHERE accepted_at IS NULL) AS missing
FROM pg_database d
WHERE d.datname = current_database();

-- name: advance
-- $1 a generation that the new one must exceed. Returns no row if another daemon added the same number at the same
-- moment.
INSERT INTO database_generations (generation)
SELECT greatest(coalesce(max(generation), 0), $1::bigint) + 1 FROM database_generations
ON CONFLICT DO NOTHING
RETURNING generation, mark;

-- name: prune
-- $1 the newest generation, $2 how many to keep.
DELETE FROM database_generations WHERE generation <= $1::bigint - $2::bigint;

-- name: claim
-- $1 mark, $2 generation, $3 host. Records that this database lacks the generation.
INSERT INTO database_missing (mark, generation, host) VALUES ($1, $2, $3)
ON CONFLICT (mark) DO NOTHING;

-- name: missing
-- The missing generations that no operator has accepted yet.
SELECT mark, generation, host, found_at FROM database_missing WHERE accepted_at IS NULL ORDER BY generation DESC;

-- name: accept
UPDATE database_missing SET accepted_at = now() WHERE accepted_at IS NULL
RETURNING mark, generation, host, found_at;
