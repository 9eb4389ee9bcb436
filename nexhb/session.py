"""The settings of every session that nexhb opens, and the schema that it works in.

A role, a database or an extension may have defaults of its own for each of them (ALTER ROLE … SET, ALTER DATABASE …
SET). What nexhb depends on is set on the session, so that no such default reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import asyncpg

from nexhb import sql
from nexhb.errors import DatabaseUnfit, PoolerBetween

_Q = sql.queries("session")

MARK = "direct"  # comes back where PostgreSQL itself took our settings
ENCODING = "UTF8"

# Sent with the connection's first message: every version from 14 on knows them, and they win over any default. asyncpg
# sends client_encoding. Plans and memory (enable_*, work_mem, jit, temp_tablespaces, …) are the operator's to choose.
AT_START: dict[str, str] = {
    "nexhb.session": MARK,
    # What a 2xx promises, and the warning that it may not hold.
    "synchronous_commit": "on",
    "client_min_messages": "notice",
    # No limit but the caller's own.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    # What a transaction may do, and what it sees.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "exit_on_error": "off",
    # A policy that hides rows is an error: a token that a policy hides would be answered 401.
    "row_security": "off",
    # How values are read and written.
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # Where and how new tables are stored: a day's table follows its parent.
    "default_tablespace": "",
    "default_table_access_method": "heap",
}

# Set once the session stands: an older version refuses a connection that names transaction_timeout (17) or
# restrict_nonsystem_relation_kind, and only a superuser may set session_replication_role.
AFTERWARDS: dict[str, str] = {
    "transaction_timeout": "0",
    "restrict_nonsystem_relation_kind": "",
    "session_replication_role": "origin",
}


# Tables and a column of each by which nexhb's are known: no other system's table of that name has it.
OURS = {"schema_migrations": "checksum_sha256", "heartbeat_labels": "label_no", "device_tokens": "token_sha256"}


@dataclass
class Home:
    """The schema of a system's tables in one database."""

    configured: str | None = None  # database.schema_name
    marks: Mapping[str, str] = field(default_factory=lambda: OURS)  # table → column; another system's are only read
    found: str = field(default="", compare=False)  # by the session before this one

    @property
    def is_ours(self) -> bool:
        """Whether it is nexhb's."""
        return self.marks is OURS


class Schemas(NamedTuple):
    """The schemas of a database."""

    whole: Sequence[str]  # hold every table by which nexhb's are known
    parts: Sequence[str]  # hold one of these tables: somebody's copy, or what is left
    own: str | None  # the first of the role's search_path that exists
    usable: Sequence[str]  # that the role may use


def at_start(application: str, more: Mapping[str, str | None]) -> dict[str, str]:
    """The settings that a new connection asks for; `more`: the caller's own, None to ask for none."""
    wanted: dict[str, str | None] = {"application_name": application, **AT_START, **more}
    return {name: value for name, value in wanted.items() if value is not None}


async def settle(conn: asyncpg.Connection, home: Home) -> None:
    """Set what could not be set at the start, and look whether the database can be nexhb's at all.

    Raises DatabaseUnfit with the remedy, PoolerBetween where the settings did not reach PostgreSQL.
    """
    row = await conn.fetchrow(_Q["look"], list(home.marks), list(home.marks.values()))
    assert row is not None  # noqa: S101 - a SELECT without FROM has one row
    if row["mark"] != MARK:
        raise PoolerBetween
    wanted = dict(AFTERWARDS)
    if row["read_only_by_default"]:
        wanted["default_transaction_read_only"] = "off"
    there = Schemas(row["whole"], row["parts"], row["own"], row["usable"])
    if home.is_ours:
        check_encoding(row["encoding"])
        home.found = choose_schema(home, there)
    else:
        home.found = choose_theirs(there)
    wanted["search_path"] = quoted(home.found)
    try:
        await conn.execute(_Q["set"], list(wanted), list(wanted.values()))
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseUnfit(
            f"session_replication_role is not origin, and this role may not set it: {error}.",
            hint="Run ALTER ROLE … RESET session_replication_role, and the same for the database, as a superuser.",
        ) from error


def check_encoding(encoding: str) -> None:
    """Raise DatabaseUnfit unless every text that a device may send can be stored."""
    if encoding != ENCODING:
        raise DatabaseUnfit(
            f"Its encoding is {encoding}: it cannot store every text that devices send.",
            hint="Create a database with ENCODING 'UTF8' TEMPLATE template0, and restore a dump into it.",
        )


def choose_schema(home: Home, there: Schemas) -> str:
    """The schema to work in: the one that holds nexhb's tables, whatever search_path says; where none does, the first
    of the role's search_path. Raises DatabaseUnfit with the remedy where that is not clear, or the role may not use it.
    """
    holders = there.whole or there.parts
    if home.configured:
        chosen = _configured(home.configured, there)
    elif home.found in (*there.whole, *there.parts):
        chosen = home.found  # somebody may look at a copy beside the daemon
    elif len(holders) > 1:
        raise DatabaseUnfit(
            f"Tables of nexhb are in the schemas {_listed(holders)}.",
            hint="Set database.schema_name to the one that is used, or drop the others.",
        )
    elif holders or there.own:
        chosen = holders[0] if holders else str(there.own)
    else:
        raise DatabaseUnfit(
            "The role's search_path names no schema that exists.",
            hint="Run CREATE SCHEMA nexhb, and set database.schema_name to it.",
        )
    if chosen not in there.usable:
        raise DatabaseUnfit(
            f"This role may not use the schema {quoted(chosen)}, or there is none.",
            hint="database.url names the role that owns the tables; CREATE SCHEMA makes a schema.",
        )
    return chosen


def choose_theirs(there: Schemas) -> str:
    """The schema of another system's tables: the role's own, where they are in several or in none."""
    holders = there.whole or there.parts
    return holders[0] if len(holders) == 1 else there.own or "public"


def _configured(schema: str, there: Schemas) -> str:
    holders = there.whole or there.parts
    if holders and schema not in (*there.whole, *there.parts):
        raise DatabaseUnfit(
            f"database.schema_name is {quoted(schema)}, and the tables of nexhb are in {_listed(holders)}.",
            hint="Set database.schema_name to that schema, or leave it out.",
        )
    return schema


def quoted(name: str) -> str:
    """A name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(quoted, names))
