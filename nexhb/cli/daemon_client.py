"""Query the daemon of this configuration over HTTP.

It uses the standard library's client: importing aiohttp's would cost a command 0.15 s of CPU.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import unquote, urlsplit

from nexhb import keys
from nexhb.config import Settings
from nexhb.errors import BadInput, NexhbError
from nexhb.threads import in_daemon_thread

TIMEOUT_S = 10.0  # the limit for each request, from connecting to the last byte of the response
DOWNLOAD_TIMEOUT_S = 60.0  # the limit for each piece of a long response
PIECE_BYTES = 2**16
PORT_UNKNOWN = "server.port is 0, so the port is not known here"
_END = "-----END CERTIFICATE-----\n"


class DaemonUnreachable(NexhbError):
    sentence = "The daemon does not answer."


class RequestRefused(NexhbError):
    sentence = "The daemon refused the request."

    def __init__(self, detail: str, status: int) -> None:
        super().__init__(detail)
        self.status = status


async def call(settings: Settings, method: str, path: str, body: object = None, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Send a request to the daemon with the admin key, and return the JSON of its response; None if it is empty.

    Raise DaemonUnreachable, BadInput if the daemon says that the request is not valid, and RequestRefused for any other
    error.
    """
    data = None if body is None else json.dumps(body).encode()
    with _with_key(settings, timeout_s) as (connection, headers):
        async with asyncio.timeout(timeout_s):
            status, raw = await in_daemon_thread(lambda: _send(connection, method, path, data, headers))
    return _answer(settings, status, raw)


async def download(
    settings: Settings, path: str, write: Callable[[bytes], object], *, timeout_s: float = DOWNLOAD_TIMEOUT_S
) -> None:
    """Pass the response to a GET request on to `write`, piece by piece. `timeout_s` limits the wait for each piece. The
    exceptions are those of `call`, and the OSError of `write`; a response that breaks off raises DaemonUnreachable."""
    failures: list[OSError] = []  # of `write`: not raised where errors of the connection are expected

    def copy(connection: HTTPConnection, headers: dict[str, str]) -> tuple[int, bytes]:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status >= 400:
            return response.status, response.read()
        while not failures and (piece := response.read(PIECE_BYTES)):
            try:
                write(piece)
            except OSError as error:
                failures.append(error)
        return response.status, b""

    with _with_key(settings, timeout_s) as (connection, headers):
        status, raw = await in_daemon_thread(lambda: copy(connection, headers))
    if failures:
        raise failures[0]
    _answer(settings, status, raw)


@contextmanager
def _with_key(settings: Settings, timeout_s: float) -> Iterator[tuple[HTTPConnection, dict[str, str]]]:
    """Provide a connection to the daemon, not opened yet, and headers with the admin key. Raise DaemonUnreachable in
    place of errors of the connection."""
    url = settings.server.url(settings.server.port)
    if settings.server.port == 0:
        raise DaemonUnreachable(f"{PORT_UNKNOWN}.")
    [trust] = _trusted(settings, elsewhere=False)
    connection, headers = _connection(url, trust)
    connection.timeout = timeout_s
    headers |= {"x-admin": keys.read(settings) or "", "Content-Type": "application/json"}
    try:
        with closing(connection):
            yield connection, headers
    except TimeoutError:
        raise DaemonUnreachable(f"{url}: no response within {timeout_s:g} s.") from None
    except IncompleteRead as error:
        raise DaemonUnreachable(f"{url}: the response broke off, and is not complete.") from error
    except (HTTPException, OSError, ValueError) as error:
        hint = "`nexhb serve` runs it."
        raise DaemonUnreachable(f"{url}: {error or type(error).__name__}.", hint=hint) from error


def _answer(settings: Settings, status: int, raw: bytes) -> Any:
    try:
        answer = json.loads(raw) if raw else None
    except ValueError:
        url = settings.server.url(settings.server.port)
        raise RequestRefused(f"{url} is not nexhb: its response is not JSON.", status) from None
    if status < 400:
        return answer
    detail = str(answer.get("detail", status)) if isinstance(answer, dict) else str(status)
    if status == 400 and isinstance(answer, dict) and answer.get("errors"):
        detail = "; ".join(f"{each['path']} {each['message']}" for each in answer["errors"]) + "."
    if status in (400, 422):
        raise BadInput(detail.removeprefix(f"{BadInput.sentence} "))
    raise RequestRefused(detail, status)


@dataclass(frozen=True)
class DaemonStatus:
    """The daemon's answer, or why there is none."""

    url: str
    reachable: bool
    ready: bool
    reasons: list[str]
    version: str | None = None
    fleet: dict[str, Any] = field(default_factory=dict)  # empty if the query had no admin key
    remarks: list[str] = field(default_factory=list)  # problems to look at although the daemon is ready


async def query_daemon(settings: Settings, url: str | None, admin_key: str | None = None) -> DaemonStatus:
    """Return the state of the daemon and, given a key, of its fleet. `url` overrides the configured address."""
    if url is None and settings.server.port == 0:
        return DaemonStatus("", False, False, [f"{PORT_UNKNOWN}: name it with --url."])
    base_url = (url or settings.server.url(settings.server.port)).rstrip("/")
    reasons: list[str] = []
    for trust in _trusted(settings, elsewhere=url is not None):
        try:
            return await _query(base_url, admin_key, trust)
        except ssl.SSLCertVerificationError as error:
            reasons = [f"The certificate is not the one in server.tls_cert_file, or cannot be verified: {error}."]
        except TimeoutError:
            reasons = [f"no response within {TIMEOUT_S:g} s."]
        except (HTTPException, OSError, ValueError, KeyError, TypeError) as error:
            reasons = [f"{error or type(error).__name__}."]
    return DaemonStatus(base_url, False, False, reasons)


def _trusted(settings: Settings, *, elsewhere: bool) -> list[ssl.SSLContext | None]:
    """Return the TLS contexts to try, in this order: the first trusts only the daemon's own certificate, whatever host
    name it contains; the second (None), for a URL given on the command line, trusts certificates of known CAs. No other
    server receives the key."""
    cert_file = settings.server.tls_cert_file
    if cert_file is None:
        return [None]
    try:
        # Only the first certificate in the file is the daemon's: the CA in it also signs certificates of other servers.
        leaf = cert_file.read_text(encoding="ascii").partition(_END)[0] + _END
        context = ssl.create_default_context(cadata=leaf)
    except (OSError, ValueError, ssl.SSLError):  # this user cannot read the certificate; a known CA may have signed it
        return [None]
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself, whoever signed it
    return [context, None] if elsewhere else [context]


async def _query(url: str, admin_key: str | None, trust: ssl.SSLContext | None) -> DaemonStatus:
    connection, headers = _connection(url, trust)
    if admin_key:
        headers["x-admin"] = admin_key

    async def get(path: str) -> tuple[bool, dict[str, Any]]:
        async with asyncio.timeout(TIMEOUT_S):
            return await in_daemon_thread(lambda: _get(connection, path, headers))

    with closing(connection):
        _, health = await get("/healthz")
        _, readiness = await get("/readyz")
        fleet: dict[str, Any] = {}
        if admin_key:
            ok, answer = await get("/v1/fleet")
            fleet = answer if ok else {"error": answer.get("detail")}
    return DaemonStatus(
        url, True, bool(readiness["ready"]), list(readiness["reasons"]), health.get("version"), fleet,
        list(readiness.get("remarks", [])),
    )  # fmt: skip


def _connection(url: str, trust: ssl.SSLContext | None) -> tuple[HTTPConnection, dict[str, str]]:
    """Return a connection to the server of this URL, not opened yet, and the headers for the user name in the URL, if
    any. Raise ValueError if `url` is not the URL of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path:
        raise ValueError("expected a URL such as http://127.0.0.1:8080, without a path")
    headers: dict[str, str] = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    if parts.scheme == "https":
        return HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT_S, context=trust), headers
    return HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S), headers


def _get(connection: HTTPConnection, path: str, headers: dict[str, str]) -> tuple[bool, dict[str, Any]]:
    """Return whether the request succeeded, and the JSON object of the response; errors are JSON too
    (application/problem+json). A redirect is not followed, so that its target does not receive the key."""
    status, raw = _send(connection, "GET", path, None, headers)
    return status < 400, dict(json.loads(raw))


def _send(
    connection: HTTPConnection, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, bytes]:
    connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()
