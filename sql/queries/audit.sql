-- The committed heartbeats of a day, compared with the rows that exist.

-- name: day
-- $1 a day's start (UTC). The partition that contains it, and the ledger of all days of that partition.
SELECT p.partition_name, p.range_start, p.range_end, p.state, p.row_count, p.archive_url,
       to_regclass(quote_ident(p.partition_name)) IS NOT NULL AS present,
       (SELECT sum(l.written)::bigint FROM ingest_ledger l
        WHERE l.day >= (p.range_start AT TIME ZONE 'UTC')::date AND l.day < (p.range_end AT TIME ZONE 'UTC')::date) AS written,
       (SELECT sum(l.deduplicated)::bigint FROM ingest_ledger l
        WHERE l.day >= (p.range_start AT TIME ZONE 'UTC')::date AND l.day < (p.range_end AT TIME ZONE 'UTC')::date)
           AS deduplicated,
       (SELECT count(*) FROM late_heartbeats h WHERE h.ts >= p.range_start AND h.ts < p.range_end) AS late,
       (SELECT coalesce(sum(s.row_count), 0)::bigint FROM archive_supplements s
        WHERE s.partition_name = p.partition_name) AS supplements
FROM hb_partitions p
WHERE p.range_start <= $1 AND p.range_end > $1;
