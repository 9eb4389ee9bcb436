-- Devices, their tokens, and enrolment keys.

-- name: all_tokens
-- The whole token store, which the daemon holds in memory.
SELECT t.token_sha256, t.device_no, d.device_id, t.revoked_at IS NOT NULL AS revoked
FROM device_tokens t JOIN devices d USING (device_no);

-- name: token_changes
-- How often tokens have changed: the number differs after each change.
SELECT coalesce(sum(changes), 0)::bigint FROM device_token_changes;

-- name: find_tokens
-- $1: token_sha256[]. Returns the owners of tokens that are not in the daemon's memory, or that changed. `changes`: the
-- number that token_changes returns, in the same snapshot.
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
-- $1 device_no, $2 now. A trigger updates the last status. A device that is already revoked keeps its time of
-- revocation: by that time, readmit_tokens recognises the tokens that were revoked with the device.
UPDATE devices SET revoked_at = coalesce(revoked_at, $2) WHERE device_no = $1
RETURNING revoked_at;

-- name: revoke_tokens
-- $1 device_no, $2 when the device was revoked. A revoked token stays known, so that heartbeats with it receive 410 and
-- not 401.
UPDATE device_tokens SET revoked_at = $2 WHERE device_no = $1 AND revoked_at IS NULL;

-- name: readmit_tokens
-- $1 device_no. Readmits the tokens that were revoked with the device; a token that was revoked on its own stays revoked.
-- Runs before readmit_device, which clears the time of revocation.
UPDATE device_tokens t SET revoked_at = NULL
FROM devices d
WHERE d.device_no = $1 AND t.device_no = d.device_no AND t.revoked_at = d.revoked_at;

-- name: readmit_device
-- $1 device_no. A trigger updates the last status. Returns no row if the device was not revoked.
UPDATE devices SET revoked_at = NULL WHERE device_no = $1 AND revoked_at IS NOT NULL
RETURNING device_no;

-- name: count_tokens
-- $1 device_no. How many tokens the device can use: those that work, and those known only by NexMDM's bcrypt hash.
SELECT (SELECT count(*) FROM device_tokens WHERE device_no = $1 AND revoked_at IS NULL)
     + (SELECT count(*) FROM legacy_tokens WHERE device_no = $1 AND bcrypt IS NOT NULL);

-- name: mark_rotated
-- $1 device_no. From now on, no token that NexMDM has for the device is imported.
UPDATE devices SET rotated = true WHERE device_no = $1;

-- name: drop_tokens
-- $1 device_no. Runs when the device is rotated: the old tokens must stop working.
DELETE FROM device_tokens WHERE device_no = $1;

-- name: drop_nexmdm_hashes
-- $1 device_no. On rotation, a bcrypt hash from NexMDM must not admit the old token again.
UPDATE legacy_tokens SET bcrypt = NULL WHERE device_no = $1 AND bcrypt IS NOT NULL;

-- name: list_devices
-- $1: the last device_id of the previous page ('' to start), $2: the limit.
SELECT d.device_id, d.name, d.alias, d.site, d.tags, d.model, d.created_at, d.revoked_at, s.last_ts
FROM devices d LEFT JOIN device_last_status s USING (device_no)
WHERE d.device_id > $1
ORDER BY d.device_id
LIMIT $2;

-- name: change_device
-- $1 device_no; $2 the names of the columns to set: site ($3), tags ($4), name ($5). A trigger copies the name.
UPDATE devices SET
    site = CASE WHEN 'site' = ANY($2::text[]) THEN $3 ELSE site END,
    tags = CASE WHEN 'tags' = ANY($2) THEN $4 ELSE tags END,
    name = CASE WHEN 'name' = ANY($2) THEN $5 ELSE name END
WHERE device_no = $1;

-- name: import_table
CREATE TEMP TABLE device_import (line int, device_id text, alias text, name text, token_sha256 bytea, site text, tags text[])
ON COMMIT DROP;

-- name: import_conflicts
-- Lines that cannot be imported: an id or a token twice in the file, a token of another device, or a site that does not
-- exist.
SELECT i.line, i.device_id,
       CASE WHEN c.device_no IS NOT NULL THEN 'its token belongs to another device'
            WHEN i.same_id > 1 THEN 'its device_id is in the file twice'
            WHEN i.same_token > 1 THEN 'its token is in the file twice'
            ELSE format('column site: site ''%s'' not found', i.site) END AS reason
FROM (SELECT *, count(*) OVER (PARTITION BY device_id) AS same_id,
             count(*) OVER (PARTITION BY token_sha256) AS same_token FROM device_import) i
LEFT JOIN devices d ON d.device_id = i.device_id
LEFT JOIN device_tokens c ON c.token_sha256 = i.token_sha256 AND c.device_no IS DISTINCT FROM d.device_no
LEFT JOIN sites s ON s.site = i.site
WHERE c.device_no IS NOT NULL OR i.same_id > 1 OR i.same_token > 1 OR (i.site IS NOT NULL AND s.site IS NULL)
ORDER BY i.line;

-- name: import_devices
-- Adds new devices. A known device keeps its number and its revocation, and also its alias, name, site and tags if the
-- file has none.
INSERT INTO devices AS d (device_id, alias, name, site, tags)
SELECT device_id, alias, name, site, tags FROM device_import ORDER BY device_id
ON CONFLICT (device_id) DO UPDATE SET
    alias = coalesce(excluded.alias, d.alias), name = coalesce(excluded.name, d.name),
    site = coalesce(excluded.site, d.site), tags = CASE WHEN excluded.tags = '{}' THEN d.tags ELSE excluded.tags END
RETURNING (xmax = 0) AS made, revoked_at IS NOT NULL AS revoked;

-- name: import_tokens
-- A device may hold several tokens: the imported token is added to those that the device has. The token of a revoked
-- device is revoked.
INSERT INTO device_tokens (token_sha256, device_no, revoked_at)
SELECT i.token_sha256, d.device_no, d.revoked_at FROM device_import i JOIN devices d USING (device_id)
ON CONFLICT (token_sha256) DO NOTHING;

-- name: add_enrolment_key
-- $1 key_sha256, $2 note, $3 uses, $4 expires_at, $5 site.
INSERT INTO enrolment_keys (key_sha256, note, uses_left, expires_at, site) VALUES ($1, $2, $3, $4, $5);

-- name: hold_enrolment_key
-- $1 key_sha256, $2 now. Returns how many uses the key has left. The key's row is locked, so that two devices cannot
-- both spend the last use.
SELECT uses_left FROM enrolment_keys WHERE key_sha256 = $1 AND expires_at > $2 FOR UPDATE;

-- name: use_enrolment_key
-- $1 key_sha256.
UPDATE enrolment_keys SET uses_left = uses_left - 1 WHERE key_sha256 = $1;

-- name: unacknowledged_enrolment
-- $1 device_id, $2 key_sha256. A device that registered with this key and has sent nothing since: the response was lost.
-- Both rows are locked: a concurrent rotation or revocation deletes the enrolment, and then no row is returned.
SELECT d.device_no, d.device_id FROM devices d JOIN enrolments e USING (device_no)
WHERE d.device_id = $1 AND e.key_sha256 = $2 AND d.revoked_at IS NULL
  AND NOT EXISTS (SELECT 1 FROM device_last_status s WHERE s.device_no = d.device_no)
FOR UPDATE OF d, e;

-- name: unacknowledged_enrolments_as
-- $1 alias, $2 key_sha256. Like unacknowledged_enrolment, by alias. Two rows mean that the device cannot be identified.
SELECT d.device_no, d.device_id FROM devices d JOIN enrolments e USING (device_no)
WHERE d.alias = $1 AND e.key_sha256 = $2 AND d.revoked_at IS NULL
  AND NOT EXISTS (SELECT 1 FROM device_last_status s WHERE s.device_no = d.device_no)
LIMIT 2
FOR UPDATE OF d, e;

-- name: rename
-- $1 device_no, $2 alias; null keeps the alias.
UPDATE devices SET alias = coalesce($2, alias) WHERE device_no = $1;

-- name: add_enrolment
-- $1 device_no, $2 key_sha256, $3 now.
INSERT INTO enrolments (device_no, key_sha256, enrolled_at) VALUES ($1, $2, $3);

-- name: give_site_of_key
-- $1 device_no, $2 key_sha256.
UPDATE devices d SET site = k.site FROM enrolment_keys k
WHERE d.device_no = $1 AND k.key_sha256 = $2 AND k.site IS NOT NULL;

-- name: end_enrolment
-- $1 device_no. After an operator rotates or revokes, the enrolment key can no longer give this device another token.
DELETE FROM enrolments WHERE device_no = $1;

-- name: part_twins
-- $1 device_no. With a new token, the record that two kiosks shared the old token is obsolete.
DELETE FROM shared_tokens WHERE device_no = $1;
