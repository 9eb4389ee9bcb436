-- What nexhb reads and sets in a new session. The role's own search_path is still in force, so every name is qualified.

-- name: look
-- $1 table[], $2 column[]: the tables, each with one of its columns, by which nexhb or NexMDM is recognised. Returns:
-- `mark`: a value that only a session with nexhb's settings has.
-- `encoding`: the database's encoding.
-- `read_only_by_default`: whether the role or the database makes transactions read-only. (If the server's configuration
-- makes them read-only, the server is full or under repair, and nexhb does not override that.)
-- `whole`: the schemas that have all of these tables; `parts`: the schemas that have some of them.
-- `own`: the first schema of the role's search_path that exists; `usable`: the schemas that the role may use.
WITH found AS (
    SELECT n.nspname::text AS schema, pg_catalog.count(*) AS tables
    FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS t (relation, attribute)
    JOIN pg_catalog.pg_class c ON c.relname = t.relation AND c.relkind IN ('r', 'p')
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = t.attribute
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname NOT LIKE 'pg\_%'
    GROUP BY n.nspname
    ORDER BY n.nspname
)
SELECT pg_catalog.current_setting('nexhb.session', true) AS mark,
       pg_catalog.current_setting('server_encoding') AS encoding,
       pg_catalog.current_setting('default_transaction_read_only') = 'on'
           AND (SELECT source IN ('global', 'database', 'user', 'database user') FROM pg_catalog.pg_settings
                WHERE name = 'default_transaction_read_only') AS read_only_by_default,
       ARRAY(SELECT schema FROM found WHERE tables = pg_catalog.cardinality($1)) AS whole,
       ARRAY(SELECT schema FROM found WHERE tables < pg_catalog.cardinality($1)) AS parts,
       pg_catalog.current_schema()::text AS own,
       ARRAY(SELECT nspname::text FROM pg_catalog.pg_namespace
             WHERE pg_catalog.has_schema_privilege(oid, 'USAGE')) AS usable;

-- name: set
-- $1 name[], $2 value[]. Sets each setting that this version of PostgreSQL has, and that has another value.
SELECT pg_catalog.set_config(name, value, false)
FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS w (name, value)
WHERE pg_catalog.current_setting(name, true) <> value;
