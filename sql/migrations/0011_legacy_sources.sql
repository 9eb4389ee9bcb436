-- Why: a credential of NexMDM has one fingerprint, the SHA-256 of its bcrypt hash: that hash never changes, while NexMDM
-- learns the token's SHA-256 with a heartbeat. Until now the fingerprint was the token's SHA-256 where NexMDM had it, so
-- that a token which was rotated here came back with the import after that heartbeat. Such tokens are revoked. The next
-- import replaces the other fingerprints. Which devices a source gave, and in which time zone its times were read, is
-- recorded too.
-- Lock: ACCESS EXCLUSIVE on legacy_tokens while its rows are looked at: 0.3 s with 100,000 devices. Heartbeats do not wait,
-- unless their token is unknown.
-- To prepare: nothing.

ALTER TABLE legacy_tokens ADD COLUMN token_sha256 bytea CHECK (length(token_sha256) = 32);

-- Which token each credential is, where that can be told: by the old fingerprint, or by the moment of its adoption.
UPDATE legacy_tokens l SET token_sha256 = t.token_sha256
FROM device_tokens t
WHERE t.device_no = l.device_no AND t.token_sha256 = l.fingerprint;

UPDATE legacy_tokens l SET token_sha256 = t.token_sha256
FROM device_tokens t
WHERE t.device_no = l.device_no AND l.token_sha256 IS NULL
  AND t.created_at BETWEEN l.adopted_at - interval '1 minute' AND l.adopted_at + interval '1 minute'
  AND NOT EXISTS (SELECT FROM device_tokens o
                  WHERE o.device_no = t.device_no AND o.token_sha256 <> t.token_sha256
                    AND o.created_at BETWEEN l.adopted_at - interval '1 minute' AND l.adopted_at + interval '1 minute');

-- Tokens that came back: added by an import after the device had been given a new token here, though the credential had
-- been taken before as a hash. Revoked and not deleted: their device hears 410 and keeps its credentials.
UPDATE device_tokens t SET revoked_at = now()
FROM legacy_tokens l
WHERE l.device_no = t.device_no AND l.fingerprint = t.token_sha256 AND t.revoked_at IS NULL
  AND t.created_at >= l.taken_at - interval '1 minute'
  AND EXISTS (SELECT FROM legacy_tokens h JOIN device_tokens n USING (device_no)
              WHERE h.device_no = t.device_no AND h.fingerprint <> l.fingerprint AND h.bcrypt IS NULL
                AND h.taken_at < l.taken_at AND (h.adopted_at IS NULL OR h.adopted_at < t.created_at)
                AND n.created_at > h.taken_at AND n.created_at < t.created_at
                AND NOT EXISTS (SELECT FROM legacy_tokens o
                                WHERE o.device_no = n.device_no
                                  AND n.token_sha256 IN (o.fingerprint, o.token_sha256)));

CREATE TABLE legacy_sources (
    source        text PRIMARY KEY,
    timezone      text NOT NULL,
    repeated_hour text CHECK (repeated_hour IN ('first', 'second', 'by-id'))
);
INSERT INTO legacy_sources (source, timezone) SELECT DISTINCT source, 'UTC' FROM legacy_days;

CREATE TABLE legacy_devices (
    source     text NOT NULL,
    device_no  integer NOT NULL REFERENCES devices,
    last_seen  timestamptz,
    revoked_at timestamptz,
    PRIMARY KEY (source, device_no)
);
INSERT INTO legacy_devices (source, device_no)
SELECT s.source, t.device_no
FROM (SELECT min(source) AS source FROM legacy_sources HAVING count(*) = 1) s,
     (SELECT DISTINCT device_no FROM legacy_tokens) t;
