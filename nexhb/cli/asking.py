"""The daemon of this configuration, asked over HTTP."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from nexhb import daemon
from nexhb.config import Settings

TIMEOUT_S = 10.0
_END = "-----END CERTIFICATE-----\n"


@dataclass(frozen=True)
class Heard:
    """What it answered, or why it could not be asked."""

    url: str
    reachable: bool
    ready: bool
    reasons: list[str]
    version: str | None = None
    fleet: dict[str, Any] = field(default_factory=dict)  # empty where it was not asked for
    remarks: list[str] = field(default_factory=list)  # what an operator should look at although it is ready


async def ask(settings: Settings, url: str | None, admin_key: str | None = None) -> Heard:
    """How the daemon is, and with a key how its fleet is. `url` where it does not listen as configured."""
    if url is None and settings.server.port == 0:
        return Heard("", False, False, ["server.port is 0, so its port is not known here: name it with --url."])
    where = (url or daemon.url_of(settings.server, settings.server.port)).rstrip("/")
    reasons: list[str] = []
    for trust in _trusted(settings, elsewhere=url is not None):
        try:
            return await _ask(where, admin_key, trust)
        except aiohttp.ClientConnectorCertificateError as error:
            reasons = [f"Its certificate is not the one of server.tls_cert_file, or cannot be verified: {error}."]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            reasons = [f"{error or f'no answer within {TIMEOUT_S:g} s'}."]
    return Heard(where, False, False, reasons)


def _trusted(settings: Settings, *, elsewhere: bool) -> list[ssl.SSLContext | bool]:
    """Whom to believe, in turn: whoever has the daemon's own certificate, whatever name that is for; else, where
    another address is named, whoever an authority vouches for. A key is sent to nobody else."""
    own = settings.server.tls_cert_file
    if own is None:
        return [True]
    try:
        # The first is the daemon's own; whoever has another one of that authority is somebody else.
        leaf = own.read_text(encoding="ascii").partition(_END)[0] + _END
        made = ssl.create_default_context(cadata=leaf)
    except (OSError, ValueError, ssl.SSLError):  # not readable for this user: its authority may vouch for it
        return [True]
    made.check_hostname = False
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself, whoever signed it
    return [made, True] if elsewhere else [made]


async def _ask(url: str, admin_key: str | None, trust: ssl.SSLContext | bool) -> Heard:
    headers = {"x-admin": admin_key} if admin_key else {}
    timeout, connector = aiohttp.ClientTimeout(total=TIMEOUT_S), aiohttp.TCPConnector(ssl=trust)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as session:

        async def get(path: str) -> tuple[bool, dict[str, Any]]:
            async with session.get(path, allow_redirects=False) as response:
                # Errors are application/problem+json.
                return response.ok, dict(await response.json(content_type=None))

        _, alive = await get("/healthz")
        _, ready = await get("/readyz")
        fleet: dict[str, Any] = {}
        if admin_key:
            well, answer = await get("/v1/fleet")
            fleet = answer if well else {"error": answer.get("detail")}
        remarks = list(ready.get("remarks", []))
        return Heard(url, True, bool(ready["ready"]), list(ready["reasons"]), alive.get("version"), fleet, remarks)
