-- Why: a device that got a new token here must not be taken over with the one that NexMDM has for it, by no way. NexMDM
-- never gives a device another token, so that one mark a device is enough.
-- Lock: ACCESS EXCLUSIVE on devices for milliseconds; the table is not rewritten.
-- To prepare: nothing.

ALTER TABLE devices ADD COLUMN rotated boolean NOT NULL DEFAULT false;
