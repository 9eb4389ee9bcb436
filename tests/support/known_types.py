"""Let asyncpg look up PostgreSQL's own types once per process, instead of in every session.

To decode an array such as text[], asyncpg asks the server in each session how the type is built: for every new set of
types, it sends a recursive query and two switches of `jit`. A test's daemon opens about ten sessions, and these queries
were a quarter of the CPU of its start and stop. The answer for a type that PostgreSQL itself defines is the same in
every session. The daemons that tests start as processes, as in the fault machine, do ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import asyncpg

_FIRST_OF_USERS = 16_384  # PostgreSQL's own types have lower object ids
_ANSWERED = SimpleNamespace(name="remembered")  # stands for the statement that was not sent

_Connection: Any = asyncpg.Connection  # asyncpg has no public name for the look-up
_ask = _Connection._introspect_types
_known: dict[frozenset[int], Any] = {}


async def _introspect_types(conn: Any, oids: Iterable[int], limit_s: float | None) -> tuple[Any, Any]:
    asked = frozenset(oids)
    if asked in _known:
        return _known[asked], _ANSWERED
    types, statement = await _ask(conn, asked, limit_s)
    if max(asked) < _FIRST_OF_USERS:
        _known[asked] = types
    return types, statement


def remember() -> None:
    """Remember the types from now on."""
    _Connection._introspect_types = _introspect_types
