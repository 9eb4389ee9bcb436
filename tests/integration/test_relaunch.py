"""packaging/nexmdm/relaunch.py turns a message about a crashed app into NexMDM's restart of the app. NexMDM needs
Google's push service, so a stand-in answers the two calls."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from nexhb.config import NotifySettings
from nexhb.messages import delivery
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, SOON_S, StartDaemon
from tests.support.receiver import SECRET, Receiver
from tests.support.watching import Watched

SCRIPT = Path(__file__).parents[2] / "packaging" / "nexmdm" / "relaunch.py"


def listening() -> socket.socket:
    """Return a socket that listens on a port of its own."""
    return socket.create_server(("127.0.0.1", 0))


def url_of(listener: socket.socket) -> str:
    """Return the URL of a server on this socket."""
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@asynccontextmanager
async def served(app: web.Application, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an application on this socket."""
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        yield
    finally:
        await runner.cleanup()


@dataclass
class NexMDM:
    """Answers the login and the restart as NexMDM does."""

    status: int = 200
    restarted: list[list[str]] = field(default_factory=list)  # the devices of each request
    attempts: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Wait until a condition is true, which only a request can make true."""
        async with asyncio.timeout(SOON_S):
            while not is_true():
                self._changed.clear()
                await self._changed.wait()

    def application(self) -> web.Application:
        """Return the application."""
        app = web.Application()
        app.router.add_post("/api/auth/login", self.login)
        app.router.add_post("/v1/remote-exec/restart-app", self.restart)
        return app

    async def login(self, request: web.Request) -> web.Response:
        """Check the password, and return a token."""
        assert await request.json() == {"username": "nexhb", "password": "geheim"}
        return web.json_response({"ok": True, "access_token": "a.b.c"})

    async def restart(self, request: web.Request) -> web.Response:
        """Record which devices restart which app."""
        assert request.headers["Authorization"] == "Bearer a.b.c"
        body = await request.json()
        assert (body["scope_type"], body["package_name"]) == ("device_ids", "com.example.app")
        self.attempts += 1
        if self.status == 200:
            self.restarted.append(sorted(body["device_ids"]))
        self._changed.set()
        return web.json_response({}, status=self.status)


def relauncher(**env: str) -> web.Application:
    """Return the application of the script."""
    spec = importlib.util.spec_from_file_location("relaunch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: web.Application = module.application(env)
    return app


async def test_nexmdm_restarts_the_app_on_every_device_of_an_incident(
    start_daemon: StartDaemon, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "POLL_S", 0.05)
    monkeypatch.setattr(delivery, "retry_delay", lambda _: timedelta(0))
    nexmdm, of_nexmdm, of_script = NexMDM(), listening(), listening()
    match = {"kinds": ["unity_down", "offline"]}
    route = Receiver(url_of(of_script)).route("relaunch", url=url_of(of_script) + "/relaunch", match=match)
    watched = await Watched.start(start_daemon, conn, now, notify=NotifySettings(routes=[route]))
    script = relauncher(
        ROUTE_SECRET=SECRET, NEXHB_URL=watched.nexhb.url, NEXHB_ADMIN_KEY=ADMIN_KEY, NEXMDM_URL=url_of(of_nexmdm),
        NEXMDM_USER="nexhb", NEXMDM_PASSWORD="geheim", NEXMDM_PACKAGE="com.example.app",
    )  # fmt: skip
    async with served(nexmdm.application(), of_nexmdm), served(script, of_script):
        await watched.add("a", "b", "c", site="store-42")
        await watched.add("d", "e", "f", "g")
        await watched.minutes(2)
        for device in ("a", "b"):
            watched.kiosks[device].changes = {"unity_process_running": False}
        nexmdm.status = 500
        await watched.minutes(5)
        await nexmdm.until(lambda: nexmdm.attempts >= 2)  # nexhb sends a message again until it is accepted
        nexmdm.status = 200
        await nexmdm.until(lambda: nexmdm.restarted == [["a", "b"]])
        watched.kiosks["d"].changes = {"unity_process_running": False}
        await watched.minutes(13, silent=["e"])  # a message that a kiosk is offline restarts nothing
        await nexmdm.until(lambda: len(nexmdm.restarted) == 2)
        assert nexmdm.restarted[1] == ["d"]


async def test_a_message_with_a_wrong_signature_restarts_nothing() -> None:
    script = relauncher(
        ROUTE_SECRET=SECRET, NEXHB_ADMIN_KEY=ADMIN_KEY, NEXMDM_URL="http://127.0.0.1:9", NEXMDM_USER="nexhb",
        NEXMDM_PASSWORD="geheim",
    )  # fmt: skip
    listener = listening()
    async with (
        served(script, listener),
        aiohttp.ClientSession() as http,
        http.post(url_of(listener) + "/relaunch", json={"type": "incident.opened"}) as response,
    ):
        assert (response.status, await response.text()) == (401, "The signature is wrong.")
