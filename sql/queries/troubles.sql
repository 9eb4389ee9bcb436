-- The last refusal of each device, and tokens that two kiosks share.

-- name: write_refusals
-- $1 device_no[], $2 refused_at[], $3 status[], $4 reason[], $5 field[]. Keeps a newer refusal, which another daemon
-- may have written.
INSERT INTO device_refusals AS r (device_no, refused_at, status, reason, field)
SELECT * FROM unnest($1::int[], $2::timestamptz[], $3::int[], $4::text[], $5::text[]) AS n (device_no, refused_at, status,
                                                                                            reason, field)
ORDER BY device_no
ON CONFLICT (device_no) DO UPDATE
SET refused_at = excluded.refused_at, status = excluded.status, reason = excluded.reason, field = excluded.field
WHERE r.refused_at < excluded.refused_at;

-- name: write_shared
-- $1 device_no[], $2 since[], $3 last_at[], $4 evidence[] (JSON). Keeps the first `since`.
INSERT INTO shared_tokens AS s (device_no, since, last_at, evidence)
SELECT device_no, since, last_at, evidence::jsonb
FROM unnest($1::int[], $2::timestamptz[], $3::timestamptz[], $4::text[]) AS n (device_no, since, last_at, evidence)
ORDER BY device_no
ON CONFLICT (device_no) DO UPDATE
SET last_at = excluded.last_at, evidence = excluded.evidence
WHERE s.last_at < excluded.last_at;
