"""A small S3 of a run's own, which can be told to be hostile: what it answers then is anything but what was asked."""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from nexhb.archive.marker import CONTENT, PREFIX
from nexhb.config import Archive

TIMEOUT_S = 2.0  # how long who archives there has patience for an object; the hostile store has more
URL = "s3://faults/archive"
KEYS = "faults/archive/"  # how keys begin, as their paths have them
_BOMB = bytes(1 << 20)
_BOMB_TIMES = 32

_DAY = re.compile(r"device_heartbeats_\d{8}")


@dataclass
class Unmarked:
    """A time in which the marker is gone; false until then."""

    during: str | None = None  # the day that was on its way just then: it is finished, and may not be dropped
    written: set[str] = field(default_factory=set)  # since then, of other days
    markers: dict[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.markers)


Answer = Callable[["Bucket", web.Request, bytes], Awaitable[web.StreamResponse]]


class Bucket:
    """Objects by key, over HTTP on loopback."""

    def __init__(self, rng: random.Random) -> None:
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""
        self.played = 0  # hostile answers so far
        self._rng = rng
        self._hostile = False
        self._unmarked: Unmarked | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a command archives there with."""
        return {
            "NEXHB_ARCHIVE__URL": URL,
            "NEXHB_ARCHIVE__ENDPOINT_URL": self.endpoint,
            "NEXHB_ARCHIVE__REGION": "us-east-1",
            "NEXHB_ARCHIVE__TIMEOUT_SECONDS": f"{TIMEOUT_S:.0f}",
            **CREDENTIALS,
        }

    @property
    def reading(self) -> dict[str, str]:
        """What a command that archives elsewhere reads there with."""
        there = {"NEXHB_ARCHIVE__URL", "NEXHB_ARCHIVE__TIMEOUT_SECONDS"}
        return {name: value for name, value in self.environment.items() if name not in there}

    @property
    def settings(self) -> Archive:
        """The same for whoever reads."""
        return Archive(url=URL, endpoint_url=self.endpoint, region="us-east-1")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Bucket]:
        """Listen for the block; from then on this process has the credentials, to read what lies there."""
        os.environ |= CREDENTIALS
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{key:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    @contextmanager
    def hostile(self) -> Iterator[None]:
        """For the block every other answer is one of those below."""
        self._hostile = True
        try:
            yield
        finally:
            self._hostile = False

    @contextmanager
    def unmarked(self, *, another: bool, later: bool) -> Iterator[Unmarked]:
        """For the block its marker is missing, or another database's is there in its place; `later`: only from the
        moment on at which something is written."""
        self._unmarked = state = Unmarked()
        foreign = {f"{KEYS}{PREFIX}{'0' * 16}": CONTENT} if another else {}
        if not later:
            self._unmark(state)
            self.objects |= foreign
        try:
            yield state
        finally:
            self._unmarked = None
            for key in foreign:
                self.objects.pop(key, None)
            self.objects |= state.markers

    @property
    def markers(self) -> set[str]:
        """The names of the markers that lie there."""
        return {key.removeprefix(KEYS) for key in self.objects if key.startswith(KEYS + PREFIX)}

    def _unmark(self, state: Unmarked) -> None:
        state.markers = {KEYS + name: self.objects.pop(KEYS + name) for name in self.markers}

    def put(self, key: str, body: bytes) -> None:
        """Keep it."""
        state, day = self._unmarked, _DAY.search(key)
        if state is not None and not state and day:
            state.during = day[0]
            self._unmark(state)
        elif state is not None and (day is None or day[0] != state.during):
            state.written.add(key)
        self.objects[key] = body

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self._hostile and self._rng.random() < 0.5:
            self.played += 1
            return await self._rng.choice(_HOSTILE[request.method])(self, request, body)
        return await _honest(self, request, body)

    def some(self) -> bytes:
        """Anything."""
        return self._rng.randbytes(self._rng.randint(1, 5000))

    def other(self, key: str) -> bytes:
        """Another object than that."""
        return next((data for other, data in self.objects.items() if other != key), b"")


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "faults", "AWS_SECRET_ACCESS_KEY": "faults", "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}  # fmt: skip


def _error(status: int, code: str) -> web.Response:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


async def _honest(bucket: Bucket, request: web.Request, body: bytes) -> web.StreamResponse:
    key = request.match_info["key"]
    if request.method == "PUT":
        if request.headers.get("If-None-Match") and key in bucket.objects:
            return _error(412, "PreconditionFailed")
        bucket.put(key, body)
        return web.Response(headers={"ETag": '"x"'})
    if key not in bucket.objects:
        return _error(404, "NoSuchKey")
    return web.Response(body=bucket.objects[key], content_type="application/octet-stream")


async def _busy(_bucket: Bucket, _request: web.Request, _body: bytes) -> web.StreamResponse:
    return _error(503, "SlowDown")


async def _internal(_bucket: Bucket, _request: web.Request, _body: bytes) -> web.StreamResponse:
    return _error(500, "InternalError")


async def _slow(bucket: Bucket, request: web.Request, body: bytes) -> web.StreamResponse:
    await asyncio.sleep(TIMEOUT_S + 1.0)
    return await _honest(bucket, request, body)


async def _garbage(bucket: Bucket, request: web.Request, _body: bytes) -> web.StreamResponse:
    if request.method == "PUT":  # said to be stored, and is something else
        bucket.objects[request.match_info["key"]] = bucket.some()
        return web.Response(headers={"ETag": '"x"'})
    return web.Response(body=bucket.some())


async def _truncated(bucket: Bucket, request: web.Request, body: bytes) -> web.StreamResponse:
    key = request.match_info["key"]
    if request.method == "PUT":
        bucket.objects[key] = body[: len(body) // 2]
        return web.Response(headers={"ETag": '"x"'})
    data = bucket.objects.get(key, b"")
    return web.Response(body=data[: len(data) // 2])


async def _cut_off(bucket: Bucket, request: web.Request, _body: bytes) -> web.StreamResponse:
    data = bucket.objects.get(request.match_info["key"], b"") + b"more"
    answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
    await answer.prepare(request)
    await answer.write(data[: len(data) // 2])
    if request.transport is not None:
        request.transport.abort()
    return answer


async def _oversized(bucket: Bucket, request: web.Request, _body: bytes) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": str(len(_BOMB) * _BOMB_TIMES)})
    await answer.prepare(request)
    for _ in range(_BOMB_TIMES):
        await answer.write(_BOMB)
    return answer


async def _other(bucket: Bucket, request: web.Request, _body: bytes) -> web.StreamResponse:
    return web.Response(body=bucket.other(request.match_info["key"]))


async def _forgets(_bucket: Bucket, _request: web.Request, _body: bytes) -> web.StreamResponse:
    return web.Response(headers={"ETag": '"x"'}, text="<html>it works</html>", content_type="text/html")


_HOSTILE: dict[str, tuple[Answer, ...]] = {
    "PUT": (_garbage, _truncated, _forgets, _busy, _slow),  # most say that it is stored
    "HEAD": (_busy, _internal, _slow),
    "GET": (_busy, _internal, _slow, _garbage, _truncated, _cut_off, _oversized, _other, _forgets),
}
