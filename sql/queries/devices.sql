-- Who may send, and who is known.

-- name: all_tokens
-- The whole token store; it is held in memory.
SELECT t.token_sha256, t.device_no, d.device_id, t.revoked_at IS NOT NULL AS revoked
FROM device_tokens t JOIN devices d USING (device_no);

-- name: token_changes
-- How often tokens have changed: another number after each change.
SELECT coalesce(sum(changes), 0)::bigint FROM device_token_changes;

-- name: find_tokens
-- $1: token_sha256[]. For tokens that the memory does not know (yet), or that changed; with how often tokens have
-- changed by then.
SELECT t.token_sha256, t.device_no, d.device_id, t.revoked_at IS NOT NULL AS revoked,
       (SELECT coalesce(sum(changes), 0)::bigint FROM device_token_changes) AS changes
FROM device_tokens t JOIN devices d USING (device_no)
WHERE t.token_sha256 = ANY($1::bytea[]);

-- name: add_device
-- $1 device_id, $2 alias.
INSERT INTO devices (device_id, alias) VALUES ($1, $2)
ON CONFLICT (device_id) DO NOTHING
RETURNING device_no;

-- name: add_token
-- $1 token_sha256, $2 device_no.
INSERT INTO device_tokens (token_sha256, device_no) VALUES ($1, $2);

-- name: device_no
-- $1 device_id.
SELECT device_no FROM devices WHERE device_id = $1 FOR UPDATE;

-- name: revoke_device
-- $1 device_no, $2 now. Its last status follows by trigger. One that is revoked stays so since then: by that time
-- readmit_tokens knows what was revoked with it.
UPDATE devices SET revoked_at = coalesce(revoked_at, $2) WHERE device_no = $1
RETURNING revoked_at;

-- name: revoke_tokens
-- $1 device_no, $2 since when the device is revoked. The token stays known, so that it is told 410 and not 401.
UPDATE device_tokens SET revoked_at = $2 WHERE device_no = $1 AND revoked_at IS NULL;

-- name: readmit_tokens
-- $1 device_no. Those that were revoked with the device; one that was revoked on its own stays so. Before
-- readmit_device, which forgets the time.
UPDATE device_tokens t SET revoked_at = NULL
FROM devices d
WHERE d.device_no = $1 AND t.device_no = d.device_no AND t.revoked_at = d.revoked_at;

-- name: readmit_device
-- $1 device_no. Its last status follows by trigger. No row where it was not revoked.
UPDATE devices SET revoked_at = NULL WHERE device_no = $1 AND revoked_at IS NOT NULL
RETURNING device_no;

-- name: count_tokens
-- $1 device_no. With how many it may come: those that work, and those that a hash of NexMDM's waits for.
SELECT (SELECT count(*) FROM device_tokens WHERE device_no = $1 AND revoked_at IS NULL)
     + (SELECT count(*) FROM legacy_tokens WHERE device_no = $1 AND bcrypt IS NOT NULL);

-- name: mark_rotated
-- $1 device_no. From now on no token that NexMDM has for it is taken.
UPDATE devices SET rotated = true WHERE device_no = $1;

-- name: drop_tokens
-- $1 device_no. On rotation the old token must stop working.
DELETE FROM device_tokens WHERE device_no = $1;

-- name: forget_legacy
-- $1 device_no. Nor may a hash that NexMDM left bring it back.
UPDATE legacy_tokens SET bcrypt = NULL WHERE device_no = $1 AND bcrypt IS NOT NULL;

-- name: list_devices
-- $1: the last device_id of the page before ('' to start), $2: how many.
SELECT d.device_id, d.name, d.alias, d.model, d.created_at, d.revoked_at, s.last_ts
FROM devices d LEFT JOIN device_last_status s USING (device_no)
WHERE d.device_id > $1
ORDER BY d.device_id
LIMIT $2;

-- name: import_table
CREATE TEMP TABLE device_import (line int, device_id text, alias text, name text, token_sha256 bytea) ON COMMIT DROP;

-- name: import_conflicts
-- Lines that cannot be taken: an id or a token twice in the file, a token of another device.
SELECT i.line, i.device_id,
       CASE WHEN c.device_no IS NOT NULL THEN 'its token belongs to another device'
            WHEN i.same_id > 1 THEN 'its device_id stands twice in the file'
            ELSE 'its token stands twice in the file' END AS why
FROM (SELECT *, count(*) OVER (PARTITION BY device_id) AS same_id,
             count(*) OVER (PARTITION BY token_sha256) AS same_token FROM device_import) i
LEFT JOIN devices d ON d.device_id = i.device_id
LEFT JOIN device_tokens c ON c.token_sha256 = i.token_sha256 AND c.device_no IS DISTINCT FROM d.device_no
WHERE c.device_no IS NOT NULL OR i.same_id > 1 OR i.same_token > 1
ORDER BY i.line;

-- name: import_devices
-- New devices are made; a known one keeps its number, its alias and name where the file gives none, and its revocation.
INSERT INTO devices AS d (device_id, alias, name)
SELECT device_id, alias, name FROM device_import ORDER BY device_id
ON CONFLICT (device_id) DO UPDATE SET alias = coalesce(excluded.alias, d.alias), name = coalesce(excluded.name, d.name)
RETURNING (xmax = 0) AS made, revoked_at IS NOT NULL AS revoked;

-- name: import_tokens
-- A device may hold several tokens: an imported one is added beside what it has. One of a revoked device is revoked.
INSERT INTO device_tokens (token_sha256, device_no, revoked_at)
SELECT i.token_sha256, d.device_no, d.revoked_at FROM device_import i JOIN devices d USING (device_id)
ON CONFLICT (token_sha256) DO NOTHING;

-- name: add_enrolment_key
-- $1 key_sha256, $2 note, $3 uses, $4 expires_at.
INSERT INTO enrolment_keys (key_sha256, note, uses_left, expires_at) VALUES ($1, $2, $3, $4);

-- name: hold_enrolment_key
-- $1 key_sha256, $2 now. How many uses it has left; held, so that two devices cannot both take the last one.
SELECT uses_left FROM enrolment_keys WHERE key_sha256 = $1 AND expires_at > $2 FOR UPDATE;

-- name: use_enrolment_key
-- $1 key_sha256.
UPDATE enrolment_keys SET uses_left = uses_left - 1 WHERE key_sha256 = $1;

-- name: enrolled_in_vain
-- $1 device_id, $2 key_sha256. A device that registered with this key and never sent: the answer was lost. Both rows are
-- locked: a rotation or revocation that is under way deletes the second one, and then there is none.
SELECT d.device_no, d.device_id FROM devices d JOIN enrolments e USING (device_no)
WHERE d.device_id = $1 AND e.key_sha256 = $2 AND d.revoked_at IS NULL
  AND NOT EXISTS (SELECT 1 FROM device_last_status s WHERE s.device_no = d.device_no)
FOR UPDATE OF d, e;

-- name: enrolled_in_vain_as
-- $1 alias, $2 key_sha256. Likewise, by its alias; two rows where it is not clear which one.
SELECT d.device_no, d.device_id FROM devices d JOIN enrolments e USING (device_no)
WHERE d.alias = $1 AND e.key_sha256 = $2 AND d.revoked_at IS NULL
  AND NOT EXISTS (SELECT 1 FROM device_last_status s WHERE s.device_no = d.device_no)
LIMIT 2
FOR UPDATE OF d, e;

-- name: rename
-- $1 device_no, $2 alias; null keeps the name.
UPDATE devices SET alias = coalesce($2, alias) WHERE device_no = $1;

-- name: add_enrolment
-- $1 device_no, $2 key_sha256, $3 now.
INSERT INTO enrolments (device_no, key_sha256, enrolled_at) VALUES ($1, $2, $3);

-- name: end_enrolment
-- $1 device_no. The operator gave or took a token: the key that it registered with gives none any more.
DELETE FROM enrolments WHERE device_no = $1;

-- name: part_twins
-- $1 device_no. With a new token, what was seen of the old one is over.
DELETE FROM shared_tokens WHERE device_no = $1;
