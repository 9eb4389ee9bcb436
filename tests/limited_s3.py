"""A minimal S3 store that does not support some headers, as some S3-compatible stores do not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web


def error(status: int, code: str, message: str = "the store's message") -> web.Response:
    """Return an error in S3's format."""
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


@dataclass
class LimitedS3:
    """Objects by path, in memory. A PUT with a header that is a key of `unsupported` receives that key's error (status
    and code), and its body is not read."""

    unsupported: dict[str, tuple[int, str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[tuple[str, int]] = field(default_factory=list)  # path, status
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Handle one request."""
        path = request.path
        if request.method == "PUT":
            response = await self._put(request)
            self.puts.append((path, response.status))
            return response
        if "list-type" in request.query:
            return self._list(path.strip("/"), request)
        if path not in self.objects:
            return web.Response(status=404) if request.method == "HEAD" else error(404, "NoSuchKey")
        return web.Response(body=self.objects[path])

    def _list(self, bucket: str, request: web.Request) -> web.Response:
        """List two keys per page; the continuation token is the page number."""
        prefix, page = f"/{bucket}/{request.query.get('prefix', '')}", int(request.query.get("continuation-token", "0"))
        keys = sorted(path.removeprefix(f"/{bucket}/") for path in self.objects if path.startswith(prefix))
        listed, more = keys[page * 2 : page * 2 + 2], len(keys) > page * 2 + 2
        contents = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in listed)
        after = f"<NextContinuationToken>{page + 1}</NextContinuationToken>" if more else ""
        text = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{contents}{after}</ListBucketResult>"
        return web.Response(text=text, content_type="application/xml")

    async def _put(self, request: web.Request) -> web.Response:
        for header, (status, code) in self.unsupported.items():
            if header in request.headers:
                return error(status, code, f"Unsupported header '{header}' received for this API call.")
        if "If-None-Match" in request.headers and request.path in self.objects:
            return error(412, "PreconditionFailed")
        self.objects[request.path] = await request.content.read()
        return web.Response()


@asynccontextmanager
async def limited_s3(**unsupported: tuple[int, str]) -> AsyncIterator[LimitedS3]:
    """Serve a store with these unsupported headers for the block."""
    store = LimitedS3(unsupported)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{tail:.*}", store.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        store.url = site.name
        yield store
    finally:
        await runner.cleanup()
