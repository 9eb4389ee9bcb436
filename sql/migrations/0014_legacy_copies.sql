-- Why: a heartbeat that was sent to both systems is recognised by its values, though NexMDM stamped its arrival; of each day
-- it is recorded how many have no row of their own.
-- Lock: ACCESS EXCLUSIVE on legacy_days for milliseconds; the table is not rewritten.
-- To prepare: nothing.

ALTER TABLE legacy_days ADD COLUMN copies bigint NOT NULL DEFAULT 0;
