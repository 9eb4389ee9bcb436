"""A bare handler, the upper limit for nexhb's rate: aiohttp on uvloop, as in nexhb, reads a heartbeat's body, stores
nothing and returns a fixed response."""

from __future__ import annotations

import argparse

import uvloop
from aiohttp import web

_ANSWER = b'{"ok":true,"next_heartbeat_seconds":60,"deduplicated":false}'


async def _heartbeat(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=_ANSWER, content_type="application/json")


def main() -> None:
    """Serve on 127.0.0.1 until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port: int = parser.parse_args().port
    app, loop = web.Application(), uvloop.new_event_loop()
    app.router.add_post("/v1/heartbeat", _heartbeat)
    # thousands of devices connect at once; a backlog of 128 would overflow, and a SYN retry takes a second
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, loop=loop, backlog=4096)


if __name__ == "__main__":
    main()
