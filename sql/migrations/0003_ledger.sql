-- Why: how many heartbeats of each day were committed, written in the transaction that commits them, so that a day's
-- partition or archive can be held against it (nexhb audit).
-- Lock: none that matters. It counts the rows that are there already: about a second for ten million.
-- To prepare: nothing.

CREATE TABLE ingest_ledger (
    day          date NOT NULL,
    slot         integer NOT NULL,
    written      bigint NOT NULL,
    deduplicated bigint NOT NULL,
    PRIMARY KEY (day, slot)
) WITH (fillfactor = 50);

INSERT INTO ingest_ledger (day, slot, written, deduplicated)
SELECT (ts AT TIME ZONE 'UTC')::date, 0, count(*), 0
FROM (SELECT ts FROM device_heartbeats UNION ALL SELECT ts FROM late_heartbeats) h
GROUP BY 1;
