"""The ceiling: aiohttp on uvloop that reads a heartbeat's body, keeps nothing, and gives one fixed answer.

What nexhb is measured against in scenario 5: the same server library with nothing behind it.
"""

from __future__ import annotations

import argparse

import uvloop
from aiohttp import web

_ANSWER = b'{"ok":true,"next_heartbeat_seconds":60,"deduplicated":false}'


async def _heartbeat(request: web.Request) -> web.Response:
    """Read the body and say yes."""
    await request.read()
    return web.Response(body=_ANSWER, content_type="application/json")


def make_app() -> web.Application:
    """The one route."""
    app = web.Application()
    app.router.add_post("/v1/heartbeat", _heartbeat)
    return app


def main() -> None:
    """Serve on 127.0.0.1 until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port: int = parser.parse_args().port
    web.run_app(
        make_app(),
        host="127.0.0.1",
        port=port,
        access_log=None,
        loop=uvloop.new_event_loop(),
        # a fleet of thousands connects at once; 128 would overflow and cost a SYN retry of a second
        backlog=4096,
    )


if __name__ == "__main__":
    main()
