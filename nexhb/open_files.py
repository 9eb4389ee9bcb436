"""The limit of open files, and how many client connections it allows."""

from __future__ import annotations

import resource

from nexhb import log

_log = log.get("daemon")

MAX_OPEN_FILES = 1_048_576
# Not available to clients: about 20 database connections, archives, and what one iteration of the event loop accepts.
RESERVED_FILES = 256


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard limit: each device keeps a connection, and the usual soft limit of
    1,024 would disconnect half of a fleet of 2,000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < 4096:
        _log.warning("daemon.few_open_files", limit=limit, hint="Raise it: ulimit -n, or LimitNOFILE in the unit.")


def connection_limit(connections_max: int) -> int:
    """Return the limit of client connections: server.connections_max, or the limit of open files less the files that
    the daemon itself needs. A client that used the last file would take it from the database's connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections_max
    limit = min(connections_max, max(10, soft - RESERVED_FILES))
    if limit < connections_max:
        _log.warning("daemon.fewer_connections", connections=limit, connections_max=connections_max, open_files=soft)
    return limit
