"""nginx and HAProxy with the files of packaging/, between devices, nexhb and a stand-in of NexMDM."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import WSMsgType, web

from bench.process import free_port
from tests.conftest import SOON_S, Answer
from tests.tls import accept_any_certificate, certificate

PACKAGING = Path(__file__).parents[1] / "packaging"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
NGINX_PLACES = {"nexhb.conf": "conf.d", "nexhb-heartbeats.conf": "snippets", "site.conf": "sites-enabled"}
NGINX, HAPROXY = shutil.which("nginx", path=PATH), shutil.which("haproxy", path=PATH)

# The lines that an operator comments out in each proxy's files to turn a feature off.
MIRROR = {"nginx": r"mirror /nexmdm-copy;", "haproxy": r"http-request lua\.copy_to_nexmdm .*"}
FALLBACK = {
    "nginx": r"error_page 401 = @nexmdm;|proxy_intercept_errors on;",
    "haproxy": r"retry-on 401|retries 1|option redispatch 1|server nexmdm 127\.0\.0\.1:\d+ weight 1",
}
ROUTE = {"nginx": r"include snippets/nexhb-heartbeats\.conf;", "haproxy": r"use_backend (heartbeats|queues) .*"}
# The lines that an operator uncomments if devices are to enrol at nexhb.
ENROLMENT = {"nginx": r"location = /v1/register \{|    proxy_.*|\}", "haproxy": r"use_backend queues .*register.*"}

RELOAD_AGAIN_S = 10.0
APK = bytes(range(256)) * 20_000


# ---- NexMDM ---------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A request that the stand-in received."""

    method: str
    path: str
    body: bytes
    headers: Any


@dataclass
class NexMDM:
    """A stand-in for NexMDM: it records requests, and knows the tokens in `tokens`."""

    port: int
    tokens: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    hangs: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _let_go: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Start to listen."""
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/v1/apk/download/{apk_id}", self._apk)
        app.router.add_get("/ws/stream/device/{device_id}", self._stream)
        app.router.add_route("*", "/{tail:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        """Stop listening."""
        self._let_go.set()
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    def of(self, path: str) -> list[Call]:
        """Return the requests for a path."""
        return [call for call in self.calls if call.path == path]

    async def until(self, so: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is checked with each request."""
        async with asyncio.timeout(SOON_S):
            while not so():
                self._news.clear()
                await self._news.wait()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.calls.append(Call(request.method, request.path_qs, body, request.headers))
        self._news.set()
        if self.hangs:
            await self._let_go.wait()
        if "Authorization" in request.headers and request.headers["Authorization"][7:] not in self.tokens:
            return web.json_response({"detail": "Invalid device token"}, status=401)
        return web.json_response({"ok": True, "by": "NexMDM"})

    async def _apk(self, request: web.Request) -> web.Response:
        self.calls.append(Call(request.method, request.path_qs, b"", request.headers))
        return web.Response(body=APK)

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        """Echo a WebSocket: remote control needs this from a proxy."""
        self.calls.append(Call(request.method, request.path_qs, b"", request.headers))
        line = web.WebSocketResponse()
        await line.prepare(request)
        async for message in line:
            if message.type is WSMsgType.BINARY:
                await line.send_bytes(message.data)
        return line


@asynccontextmanager
async def nexmdm(port: int, tokens: Sequence[str] = ()) -> AsyncIterator[NexMDM]:
    """Provide a stand-in for NexMDM that listens."""
    made = NexMDM(port, set(tokens))
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


# ---- the proxy ------------------------------------------------------------------------------------------------------


@dataclass
class Proxy:
    """A running proxy, whose files may be edited and reloaded as an operator does."""

    kind: str  # nginx or haproxy
    url: str
    folder: Path
    process: asyncio.subprocess.Process
    log: Path

    async def send(self, path: str, token: str, body: bytes, method: str = "POST", **headers: str) -> Answer:
        """Send a request on a new connection; return the response."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=accept_any_certificate())) as client:
            return await send(client, self.url + path, token, body, method, **headers)

    async def raw(self, request: bytes) -> bytes:
        """Send bytes; return everything received until the proxy closes the connection."""
        port = int(self.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=accept_any_certificate())
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), SOON_S)
        writer.close()
        return answer

    def comment_out(self, pattern: str) -> int:
        """Comment out the lines that match, in any of the proxy's files; return how many. `reload` puts this into
        force."""
        return comment_out(self.folder, pattern)

    def uncomment(self, pattern: str) -> int:
        """Uncomment the lines that match; return how many."""
        return _edit(self.folder, rf"^(\s*)#({pattern})$", r"\1\2")

    async def reload(self) -> None:
        """Reload the files as `systemctl reload` does, and wait until new connections use them."""
        old, started = workers(self), time.monotonic()
        signals = 0
        while old & workers(self):
            waited = time.monotonic() - started
            assert waited < SOON_S, (old, workers(self), self.log.read_text()[-3000:])
            if waited >= RELOAD_AGAIN_S * signals and workers(self) <= old:  # HAProxy misses a signal while it starts
                self.process.send_signal(signal.SIGHUP if self.kind == "nginx" else signal.SIGUSR2)
                signals += 1
            await asyncio.sleep(0.02)


def comment_out(folder: Path, pattern: str) -> int:
    """Comment out the lines of a proxy's files that match; return how many."""
    return _edit(folder, rf"^(\s*)({pattern})$", r"\1# \2")


def _edit(folder: Path, pattern: str, replacement: str) -> int:
    edited = 0
    for path in folder.rglob("*.c*f*"):
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
        edited += count
    return edited


def workers(proxy: Proxy) -> set[str]:
    """Return the ids of the processes that accept connections."""
    return set(Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children").read_text().split())


async def send(
    client: aiohttp.ClientSession, url: str, token: str, body: bytes, method: str = "POST", **headers: str
) -> Answer:
    """POST JSON with a token as the agent does. If the response is an HTML page of the proxy itself, return an empty
    body."""
    fields = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"} | headers
    async with client.request(method, url, data=io.BytesIO(body), headers=fields) as response:
        raw = await response.read()
        found: dict[str, Any] = {}
        with suppress(orjson.JSONDecodeError):
            found = orjson.loads(raw)
        return Answer(response.status, found, response.headers)


@asynccontextmanager
async def proxy(kind: str, folder: Path, nexhb_port: int, nexmdm_port: int, *without: str) -> AsyncIterator[Proxy]:
    """Provide a proxy with the packaged files; only addresses, ports and paths differ. Lines that match `without`
    are commented out first."""
    port, places = _places(nexhb_port, nexmdm_port)
    command = _nginx(folder, places) if kind == "nginx" else _haproxy(folder, places)
    if kind == "nginx":
        for name, there in NGINX_PLACES.items():
            shutil.copy(folder / "packaging" / "nginx" / name, folder / there)
    for lines in without:
        assert comment_out(folder, lines)
    async with _run(kind, folder, port, command) as made:
        await _listening(made, port)
        yield made


@asynccontextmanager
async def bare_nginx(folder: Path, nexhb_port: int, nexmdm_port: int) -> AsyncIterator[Proxy]:
    """Provide nginx as Debian installs it, without a site. The packaged files are in `folder`/packaging/nginx, with
    the test's addresses, and are not in use."""
    port, places = _places(nexhb_port, nexmdm_port)
    async with _run("nginx", folder, port, _nginx(folder, places)) as made:
        async with asyncio.timeout(SOON_S):
            while not workers(made):
                await asyncio.sleep(0.02)
        yield made


def _places(nexhb_port: int, nexmdm_port: int) -> tuple[int, dict[str, str]]:
    """Return the port for devices, and the replacements of the addresses in the packaged files."""
    port = free_port()
    return port, {
        "127.0.0.1:8080": f"127.0.0.1:{nexhb_port}", "127.0.0.1:8000": f"127.0.0.1:{nexmdm_port}",
        "127.0.0.1:8091": f"127.0.0.1:{free_port()}", "127.0.0.1:8092": f"127.0.0.1:{free_port()}",
        "listen 443": f"listen 127.0.0.1:{port}", "bind :443": f"bind 127.0.0.1:{port}",
    }  # fmt: skip


@asynccontextmanager
async def _run(kind: str, folder: Path, port: int, command: list[str]) -> AsyncIterator[Proxy]:
    log = folder / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    try:
        yield Proxy(kind, f"https://127.0.0.1:{port}", folder, process, log)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait_for(process.wait(), SOON_S)


async def _listening(made: Proxy, port: int) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            assert made.process.returncode is None, made.log.read_text()
            with suppress(OSError, ssl.SSLError):
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=accept_any_certificate())
                writer.close()
                return
            await asyncio.sleep(0.02)


def _replaced(text: str, places: dict[str, str]) -> str:
    for there, here in places.items():
        text = text.replace(there, here)
    return text


def _nginx(folder: Path, places: dict[str, str]) -> list[str]:
    """Write the packaged files, their folders and a main file like Debian's; return the command."""
    folder.mkdir()
    cert, key = certificate(folder, "mdm.example.com")
    places = places | {"/etc/ssl/mdm.example.com.pem": str(cert), "/etc/ssl/private/mdm.example.com.key": str(key)}
    (folder / "packaging" / "nginx").mkdir(parents=True)
    for name, place in NGINX_PLACES.items():
        (folder / place).mkdir()
        text = _replaced((PACKAGING / "nginx" / name).read_text(), places)
        (folder / "packaging" / "nginx" / name).write_text(text)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} worker_processes 2; pid {folder}/pid; daemon off; error_log stderr warn;\n"
        "events { worker_connections 768; }\n"
        f"http {{ access_log off; {temporary} include conf.d/*.conf; include sites-enabled/*; }}\n"
    )
    assert NGINX is not None
    return [NGINX, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def _haproxy(folder: Path, places: dict[str, str]) -> list[str]:
    folder.mkdir()
    cert, key = certificate(folder, "mdm.example.com")
    both = folder / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    places = places | {
        "/etc/haproxy/mdm.example.com.pem": str(both), "/etc/haproxy/nexhb-copy.lua": str(folder / "nexhb-copy.lua"),
        "log /dev/log local0": "log stderr format raw local0", "user haproxy": "", "group haproxy": "",
    }  # fmt: skip
    shutil.copy(PACKAGING / "haproxy" / "nexhb-copy.lua", folder)
    (folder / "haproxy.cfg").write_text(_replaced((PACKAGING / "haproxy" / "haproxy.cfg").read_text(), places))
    assert HAPROXY is not None
    return [HAPROXY, "-W", "-f", str(folder / "haproxy.cfg")]
