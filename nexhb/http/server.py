"""Listen, and serve the application until the daemon stops."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from nexhb.config import ServerSettings
from nexhb.http.app import make_app
from nexhb.http.device_api.context import DeviceApi
from nexhb.http.device_api.fast_path import FastPath
from nexhb.http.operator_api.context import OperatorApi
from nexhb.http.transport import listening
from nexhb.http.transport.connections import Connections
from nexhb.http.transport.handshake import Handshake
from nexhb.http.transport.http_connection import READ_BUFFER, HttpConnection

KEEPALIVE_S = 150.0  # an agent that sends every 60 s keeps its connection; one at 600 s reconnects each time
# How long the body of a refused request is still read and discarded before the connection is closed: the sender would
# not read the response if the connection was reset.
LINGER_S = 1.0


@asynccontextmanager
async def serving(
    device_api: DeviceApi, operator_api: OperatorApi, connections: Connections, tls: ssl.SSLContext | None
) -> AsyncIterator[tuple[str, str | None]]:
    """Accept connections for the block; yield the URL, and the URL of server.instance_port if it is set. On exit,
    no new request is accepted, and running requests finish."""
    settings = device_api.settings.server
    runner = web.AppRunner(make_app(device_api, operator_api), shutdown_timeout=settings.shutdown_timeout_seconds)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - set by setup()
    make_connection = partial(
        HttpConnection, connections, runner.server, FastPath(device_api), loop=asyncio.get_running_loop(),
        read_bufsize=READ_BUFFER, access_log=None, keepalive_timeout=KEEPALIVE_S, auto_decompress=False,
        lingering_time=LINGER_S,
    )  # fmt: skip
    factory = make_connection if tls is None else partial(Handshake, connections, tls, make_connection)
    listeners: list[asyncio.Server] = []
    try:
        listeners.append(await listen(factory, settings, "port"))
        if settings.instance_port is not None:
            listeners.append(await listen(factory, settings, "instance_port"))
        ports = [int(listener.sockets[0].getsockname()[1]) for listener in listeners]
        yield settings.url(ports[0]), settings.url(ports[1]) if len(ports) > 1 else None
    finally:
        for listener in listeners:
            listener.close()
        connections.cut_all(Handshake, "stopping")  # aiohttp does not know the connections in a handshake
        await runner.cleanup()


async def listen(factory: Callable[[], asyncio.BaseProtocol], settings: ServerSettings, key: str) -> asyncio.Server:
    """Listen on server.host and the port in the setting `key`; only server.port may be shared. Raises ConfigError, or
    CannotListen if a later attempt may succeed with the same settings."""
    port, shared = getattr(settings, key), settings.reuse_port and key == "port"
    try:
        return await asyncio.get_running_loop().create_server(
            factory, settings.host.strip("[]"), port, backlog=4096, reuse_port=shared or None
        )
    except OSError as error:
        raise listening.listen_error(error, settings.host, key, port) from error
