"""The program in OpenStack Swift's virtual environment: `rings FOLDER KIND=PORT…` writes the rings, `serve KIND FOLDER`
runs one of the four servers. tests/swift.py starts it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def rings(folder: Path, ports: dict[str, int]) -> None:
    """Write a ring with one device and one replica for each of the three storage servers."""
    from swift.common.ring import RingBuilder  # noqa: PLC0415 - a server does not need it

    for kind, port in ports.items():
        builder = RingBuilder(4, 1, 0)
        where = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
        builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "disk", "meta": "", **where})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


def serve(kind: str, folder: Path) -> int:
    """Run one server until it is terminated, or its parent process has exited."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    from swift.common.wsgi import run_wsgi  # noqa: PLC0415 - the rings do not need it

    return int(run_wsgi(str(folder / f"{kind}.conf"), f"{kind}-server", verbose=True))


if __name__ == "__main__":
    if sys.argv[1] == "rings":
        rings(Path(sys.argv[2]), {kind: int(port) for kind, _, port in (arg.partition("=") for arg in sys.argv[3:])})
    else:
        sys.exit(serve(sys.argv[2], Path(sys.argv[3])))
