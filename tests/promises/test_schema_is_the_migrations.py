"""sql/schema.sql, which people read, and sql/migrations/, which nexhb runs, give the same database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from nexhb.postgres import migrate, sql
from nexhb.postgres.connections import Connection, Database

# One query per kind of object; each row is a line with the name and all properties of one object.
CATALOG = {
    "relations": """
        SELECT format('%s %s %s options %s partitioned %s', c.relkind, c.relname, c.relpersistence,
                      c.reloptions, pg_get_partkeydef(c.oid))
        FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace""",
    "columns": """
        SELECT format('%s.%s %s %s not null %s identity %s generated %s default %s collation %s storage %s %s',
                      c.relname, a.attname, row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum),
                      format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                      pg_get_expr(d.adbin, d.adrelid), a.attcollation::regcollation, a.attstorage, a.attcompression)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND NOT a.attisdropped
          AND c.relkind <> 'i'""",
    "constraints": """
        SELECT format('%s %s: %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace""",
    "indexes": """
        SELECT format('%s options %s unique %s', pg_get_indexdef(i.indexrelid), c.reloptions, i.indisunique)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'public'::regnamespace""",
    "views": """
        SELECT format('%s: %s', viewname, definition) FROM pg_views WHERE schemaname = 'public'""",
    "functions": """
        SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace""",
    "triggers": """
        SELECT format('%s enabled %s', pg_get_triggerdef(oid), tgenabled) FROM pg_trigger WHERE NOT tgisinternal""",
    "sequences": """
        SELECT format('%s %s %s %s %s %s', sequencename, data_type, start_value, increment_by, max_value, cycle)
        FROM pg_sequences WHERE schemaname = 'public'""",
    "types": """
        SELECT format('%s %s', typname, typtype) FROM pg_type
        WHERE typnamespace = 'public'::regnamespace AND typtype <> 'c' AND typcategory <> 'A'""",
    "comments": """
        SELECT format('%s %s', pg_describe_object(classoid, objoid, objsubid), description) FROM pg_description
        WHERE objoid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)""",
}


async def catalog(conn: Connection, kind: str) -> list[str]:
    """Return one line for each object of this kind, in a fixed order."""
    return sorted(str(row[0]) for row in await conn.fetch(CATALOG[kind]))


@pytest.fixture
async def read(empty_database: Database) -> AsyncIterator[Connection]:
    """Yield a connection to a database created by schema.sql."""
    conn = await empty_database.connect(application="test")
    await conn.execute((sql.root() / "schema.sql").read_text(encoding="utf-8"))
    yield conn
    conn.terminate()


async def test_schema_sql_and_the_migrations_create_the_same_schema(read: Connection, conn: Connection) -> None:
    for kind in CATALOG:
        assert await catalog(read, kind) == await catalog(conn, kind), kind


async def test_the_comparison_sees_the_whole_schema(conn: Connection) -> None:
    counts = {kind: len(await catalog(conn, kind)) for kind in CATALOG}
    assert {kind for kind, count in counts.items() if not count} == {"types", "comments"}
    columns = await catalog(conn, "columns")
    generated = "generated s default (floor((EXTRACT(epoch FROM (heard_at AT TIME ZONE 'UTC'::text))"
    assert [line.partition(" ")[0] for line in columns if generated in line] == ["device_last_status.heard_slot"]
    assert any("fillfactor=85" in line for line in await catalog(conn, "relations"))


async def test_schema_sql_is_not_a_migration_and_the_migrations_would_stop_at_it(read: Connection) -> None:
    """A database created by hand from schema.sql has no journal of migrations: nexhb reports that and changes
    nothing."""
    with pytest.raises(Exception, match="already exists"):
        await migrate.migrate(read, datetime.now(UTC))
