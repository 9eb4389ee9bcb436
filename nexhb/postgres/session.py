"""The settings of every session that nexhb opens, and the schema that it works in.

A role, a database or an extension may have its own default for each setting (ALTER ROLE … SET, ALTER DATABASE … SET).
nexhb sets on the session what it depends on, so that no such default applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import asyncpg

from nexhb.errors import DatabaseUnfit, PoolerBetween
from nexhb.postgres import sql

_Q = sql.queries("session")

MARK = "direct"  # readable in the session only if PostgreSQL itself received the startup parameters
ENCODING = "UTF8"

# These settings are sent with the connection's first message: every version since 14 supports them, and they override
# any default. asyncpg sends client_encoding. Plans and memory (enable_*, work_mem, jit, temp_tablespaces, …) are left
# to the operator.
AT_START: dict[str, str] = {
    "nexhb.session": MARK,
    # A 2xx promises durability; if a commit may lack it, PostgreSQL sends a warning.
    "synchronous_commit": "on",
    "client_min_messages": "notice",
    # Only the caller sets timeouts.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    # What a transaction may do, and what it sees.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "exit_on_error": "off",
    # A policy that hides rows must cause an error: a request with a hidden token would receive 401.
    "row_security": "off",
    # The formats of values.
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # A new table is stored in the same way as its parent.
    "default_tablespace": "",
    "default_table_access_method": "heap",
}

# These settings are set once the session is open: an older version rejects a connection that names transaction_timeout
# (17) or restrict_nonsystem_relation_kind, and only a superuser may set session_replication_role.
AFTER_START: dict[str, str] = {
    "transaction_timeout": "0",
    "restrict_nonsystem_relation_kind": "",
    "session_replication_role": "origin",
}


# Tables that identify nexhb's schema, and one column of each: no other system's table of that name has this column.
NEXHB_TABLES = {"schema_migrations": "checksum_sha256", "heartbeat_labels": "label_no", "device_tokens": "token_sha256"}


@dataclass
class TableSchema:
    """The choice of the schema in which a system's tables are."""

    configured: str | None = None  # database.schema_name
    tables: Mapping[str, str] = field(default_factory=lambda: NEXHB_TABLES)  # table → column, to identify the schema
    chosen: str = field(default="", compare=False)  # the latest session's choice

    @property
    def is_nexhb(self) -> bool:
        """Return whether nexhb owns the tables; the tables of another system are only read."""
        return self.tables is NEXHB_TABLES


class Schemas(NamedTuple):
    """The schemas of a database."""

    complete: Sequence[str]  # the schemas that have every table by which the system is identified
    partial: Sequence[str]  # the schemas that have only some of these tables: an incomplete copy, or a remainder
    default: str | None  # the first schema of the role's search_path that exists
    usable: Sequence[str]  # the schemas that the role may use


def at_start(application: str, more: Mapping[str, str | None]) -> dict[str, str]:
    """Return the settings for a new connection. `more` are the caller's own; None leaves a setting out."""
    settings: dict[str, str | None] = {"application_name": application, **AT_START, **more}
    return {name: value for name, value in settings.items() if value is not None}


async def configure(conn: asyncpg.Connection, schema: TableSchema) -> None:
    """Set what could not be set at the start, and check that nexhb can use the database.

    Raises DatabaseUnfit with the remedy, PoolerBetween if the startup parameters did not reach PostgreSQL.
    """
    row = await conn.fetchrow(_Q["look"], list(schema.tables), list(schema.tables.values()))
    assert row is not None  # noqa: S101 - a SELECT without FROM has one row
    if row["mark"] != MARK:
        raise PoolerBetween
    settings = dict(AFTER_START)
    if row["read_only_by_default"]:
        settings["default_transaction_read_only"] = "off"
    schemas = Schemas(row["whole"], row["parts"], row["own"], row["usable"])
    if schema.is_nexhb:
        check_encoding(row["encoding"])
        schema.chosen = choose_schema(schema, schemas)
    else:
        schema.chosen = choose_foreign_schema(schemas)
    settings["search_path"] = quoted(schema.chosen)
    try:
        await conn.execute(_Q["set"], list(settings), list(settings.values()))
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseUnfit(
            f"session_replication_role is not origin, and this role may not set it: {error}.",
            hint="Run ALTER ROLE … RESET session_replication_role, and the same for the database, as a superuser.",
        ) from error


def check_encoding(encoding: str) -> None:
    """Raise DatabaseUnfit unless the encoding can store every text that a device may send."""
    if encoding != ENCODING:
        raise DatabaseUnfit(
            f"Its encoding is {encoding}, which cannot store every text that devices send.",
            hint="Create a database with ENCODING 'UTF8' TEMPLATE template0, and restore a dump into it.",
        )


def choose_schema(schema: TableSchema, schemas: Schemas) -> str:
    """Return the schema to work in: the one that has nexhb's tables, whatever search_path is; else the first existing
    schema of the role's search_path. Raises DatabaseUnfit with the remedy if the choice is ambiguous or the role may
    not use it.
    """
    candidates = schemas.complete or schemas.partial
    if schema.configured:
        chosen = _configured(schema.configured, schemas)
    elif schema.chosen in (*schemas.complete, *schemas.partial):
        chosen = schema.chosen  # a copy may be added while the daemon runs
    elif len(candidates) > 1:
        raise DatabaseUnfit(
            f"Tables of nexhb are in the schemas {_listed(candidates)}.",
            hint="Set database.schema_name to the one in use, or drop the others.",
        )
    elif candidates or schemas.default:
        chosen = candidates[0] if candidates else str(schemas.default)
    else:
        raise DatabaseUnfit(
            "No schema in the role's search_path exists.",
            hint="Run CREATE SCHEMA nexhb, and set database.schema_name to it.",
        )
    if chosen not in schemas.usable:
        raise DatabaseUnfit(
            f"This role may not use the schema {quoted(chosen)}, or the schema does not exist.",
            hint="Set database.url to the role that owns the tables; CREATE SCHEMA makes a schema.",
        )
    return chosen


def choose_foreign_schema(schemas: Schemas) -> str:
    """Return the schema of another system's tables; the role's default if several schemas have them, or none has."""
    candidates = schemas.complete or schemas.partial
    return candidates[0] if len(candidates) == 1 else schemas.default or "public"


def _configured(schema: str, schemas: Schemas) -> str:
    candidates = schemas.complete or schemas.partial
    if candidates and schema not in (*schemas.complete, *schemas.partial):
        raise DatabaseUnfit(
            f"database.schema_name is {quoted(schema)}, but the tables of nexhb are in {_listed(candidates)}.",
            hint="Set database.schema_name to that schema, or remove the setting.",
        )
    return schema


def quoted(name: str) -> str:
    """Return the name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(quoted, names))
