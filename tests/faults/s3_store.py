"""A small S3 server for one run. On demand it is faulty: about half of its responses are then errors, wrong or late."""

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
from nexhb.config import ArchiveSettings

TIMEOUT_S = 2.0  # the timeout of a command for an object; `_slow` takes longer
URL = "s3://faults/archive"
KEYS = "faults/archive/"  # the beginning of each key, as it stands in the request's path
_OVERSIZED_CHUNK = bytes(1 << 20)
_OVERSIZED_CHUNKS = 32

_DAY = re.compile(r"device_heartbeats_\d{8}")


@dataclass
class MarkerRemoval:
    """A period in which the store's marker is missing; false until the marker is removed."""

    # The day that was being uploaded when the marker was removed: its upload is finished, but it must not be dropped.
    during: str | None = None
    written: set[str] = field(
        default_factory=set
    )  # keys of other objects that were written while the marker was missing
    markers: dict[str, bytes] = field(default_factory=dict)  # the removed markers, to be restored later

    def __bool__(self) -> bool:
        return bool(self.markers)


Handler = Callable[["S3Store", web.Request, bytes], Awaitable[web.StreamResponse]]


class S3Store:
    """A store of objects by key, served over HTTP on the loopback interface."""

    def __init__(self, rng: random.Random) -> None:
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""
        self._rng = rng
        self._is_faulty = False
        self._removal: MarkerRemoval | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a command archives to this store."""
        return {
            "NEXHB_ARCHIVE__URL": URL,
            "NEXHB_ARCHIVE__ENDPOINT_URL": self.endpoint,
            "NEXHB_ARCHIVE__REGION": "us-east-1",
            "NEXHB_ARCHIVE__TIMEOUT_SECONDS": f"{TIMEOUT_S:.0f}",
            **CREDENTIALS,
        }

    @property
    def reading(self) -> dict[str, str]:
        """The environment variables with which a command that archives elsewhere can read from this store."""
        there = {"NEXHB_ARCHIVE__URL", "NEXHB_ARCHIVE__TIMEOUT_SECONDS"}
        return {name: value for name, value in self.environment.items() if name not in there}

    @property
    def settings(self) -> ArchiveSettings:
        """The settings with which this process reads from this store."""
        return ArchiveSettings(url=URL, endpoint_url=self.endpoint, region="us-east-1")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[S3Store]:
        """Serve requests for the block, and add the credentials to this process's environment, so that it can read what
        is stored."""
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
    def faulty(self) -> Iterator[None]:
        """For the block, respond to about every other request with one of the handlers in `_FAULTY`."""
        self._is_faulty = True
        try:
            yield
        finally:
            self._is_faulty = False

    @contextmanager
    def marker_removed(self, *, another: bool, later: bool) -> Iterator[MarkerRemoval]:
        """For the block, remove the store's marker. With `another`, put another database's marker in its place. With
        `later`, remove the marker only when the first object of a day is written, and do not replace it."""
        self._removal = state = MarkerRemoval()
        foreign = {f"{KEYS}{PREFIX}{'0' * 16}": CONTENT} if another else {}
        if not later:
            self._remove_marker(state)
            self.objects |= foreign
        try:
            yield state
        finally:
            self._removal = None
            for key in foreign:
                self.objects.pop(key, None)
            self.objects |= state.markers

    @property
    def markers(self) -> set[str]:
        """The names of the markers in the store."""
        return {key.removeprefix(KEYS) for key in self.objects if key.startswith(KEYS + PREFIX)}

    def _remove_marker(self, state: MarkerRemoval) -> None:
        state.markers = {KEYS + name: self.objects.pop(KEYS + name) for name in self.markers}

    def put(self, key: str, body: bytes) -> None:
        """Store an object, and record its key if the marker is missing."""
        state, day = self._removal, _DAY.search(key)
        if state is not None and not state and day:
            state.during = day[0]
            self._remove_marker(state)
        elif state is not None and (day is None or day[0] != state.during):
            state.written.add(key)
        self.objects[key] = body

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self._is_faulty and self._rng.random() < 0.5:
            return await self._rng.choice(_FAULTY[request.method])(self, request, body)
        return await _correct(self, request, body)

    def random_bytes(self) -> bytes:
        """Return random bytes."""
        return self._rng.randbytes(self._rng.randint(1, 5000))

    def other_object(self, key: str) -> bytes:
        """Return the content of an object whose key is not `key`; empty if there is none."""
        return next((data for other, data in self.objects.items() if other != key), b"")


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "faults", "AWS_SECRET_ACCESS_KEY": "faults", "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}  # fmt: skip


def _error(status: int, code: str) -> web.Response:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


async def _correct(store: S3Store, request: web.Request, body: bytes) -> web.StreamResponse:
    key = request.match_info["key"]
    if request.method == "PUT":
        if request.headers.get("If-None-Match") and key in store.objects:
            return _error(412, "PreconditionFailed")
        store.put(key, body)
        return web.Response(headers={"ETag": '"x"'})
    if key not in store.objects:
        return _error(404, "NoSuchKey")
    return web.Response(body=store.objects[key], content_type="application/octet-stream")


async def _slow_down(_store: S3Store, _request: web.Request, _body: bytes) -> web.StreamResponse:
    return _error(503, "SlowDown")


async def _internal_error(_store: S3Store, _request: web.Request, _body: bytes) -> web.StreamResponse:
    return _error(500, "InternalError")


async def _slow(store: S3Store, request: web.Request, body: bytes) -> web.StreamResponse:
    await asyncio.sleep(TIMEOUT_S + 1.0)
    return await _correct(store, request, body)


async def _garbage(store: S3Store, request: web.Request, _body: bytes) -> web.StreamResponse:
    if request.method == "PUT":  # the response confirms the object, but random bytes are stored
        store.objects[request.match_info["key"]] = store.random_bytes()
        return web.Response(headers={"ETag": '"x"'})
    return web.Response(body=store.random_bytes())


async def _truncated(store: S3Store, request: web.Request, body: bytes) -> web.StreamResponse:
    key = request.match_info["key"]
    if request.method == "PUT":
        store.objects[key] = body[: len(body) // 2]
        return web.Response(headers={"ETag": '"x"'})
    data = store.objects.get(key, b"")
    return web.Response(body=data[: len(data) // 2])


async def _cut_off(store: S3Store, request: web.Request, _body: bytes) -> web.StreamResponse:
    data = store.objects.get(request.match_info["key"], b"") + b"more"
    response = web.StreamResponse(headers={"Content-Length": str(len(data))})
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    if request.transport is not None:
        request.transport.abort()
    return response


async def _oversized(store: S3Store, request: web.Request, _body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(_OVERSIZED_CHUNK) * _OVERSIZED_CHUNKS)})
    await response.prepare(request)
    for _ in range(_OVERSIZED_CHUNKS):
        await response.write(_OVERSIZED_CHUNK)
    return response


async def _other(store: S3Store, request: web.Request, _body: bytes) -> web.StreamResponse:
    return web.Response(body=store.other_object(request.match_info["key"]))


async def _discarded(_store: S3Store, _request: web.Request, _body: bytes) -> web.StreamResponse:
    return web.Response(headers={"ETag": '"x"'}, text="<html>it works</html>", content_type="text/html")


_FAULTY: dict[str, tuple[Handler, ...]] = {
    "PUT": (_garbage, _truncated, _discarded, _slow_down, _slow),  # the first three handlers claim success
    "HEAD": (_slow_down, _internal_error, _slow),
    "GET": (_slow_down, _internal_error, _slow, _garbage, _truncated, _cut_off, _oversized, _other, _discarded),
}
