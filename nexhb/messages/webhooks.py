"""Send messages to webhooks by the Standard Webhooks convention: JSON, one id, and a signature for each attempt."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
from standardwebhooks import Webhook

from nexhb.errors import DeliveryFailed
from nexhb.messages.message import Message

TIMEOUT_S = 15.0
MAX_RESPONSE = 65_536  # bytes of a response that are read; the connection is closed then
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address within an IPv6 address


class NotPublic(OSError):
    """The address is private, local or reserved."""


class Webhooks:
    """The HTTP client for webhooks. Each request has a connection of its own, whose address is checked: a name may have
    another address each time that it is resolved."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        """Close every connection."""
        for session in self._sessions.values():
            await session.close()

    async def send(self, url: str, secret: str, message: Message, *, allow_private: bool) -> None:
        """Send a message. Raise DeliveryFailed unless the response is 2xx."""
        body, now = message.body(), self._now().astimezone(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message.message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret).sign(message.message_id, now, body.decode()),
        }
        await self._request("POST", url, allow_private=allow_private, data=body, headers=headers)

    async def ping(self, url: str) -> None:
        """Fetch an address. Raise DeliveryFailed unless the response is 2xx."""
        await self._request("GET", url, allow_private=True)

    async def _request(self, method: str, url: str, *, allow_private: bool, **options: Any) -> None:
        try:
            request = self._session(allow_private).request(method, url, allow_redirects=False, **options)
            async with request as response:
                await _read_some(response)
                response.close()
        except TimeoutError:
            raise DeliveryFailed(f"There was no response within {TIMEOUT_S:g} s.") from None
        except aiohttp.ClientConnectorError as error:
            raise DeliveryFailed(_reason(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The message may repeat the URL, which may contain a secret.
            raise DeliveryFailed(f"The request failed: {type(error).__name__}.") from None
        if 300 <= response.status < 400:
            raise DeliveryFailed(f"The response is {response.status}, a redirect, which is not followed.")
        if not 200 <= response.status < 300:
            raise DeliveryFailed(f"The response is {response.status}.")

    def _session(self, allow_private: bool) -> aiohttp.ClientSession:
        session = self._sessions.get(allow_private)
        if session is None:
            connector = aiohttp.TCPConnector(
                force_close=True, limit=0, use_dns_cache=False, socket_factory=None if allow_private else public_socket
            )
            session = self._sessions[allow_private] = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"User-Agent": "nexhb", "Accept-Encoding": "identity"},
            )
        return session


async def _read_some(response: aiohttp.ClientResponse) -> None:
    """Read the response, but not more than MAX_RESPONSE: some receivers count a response that is not read as failed."""
    size = 0
    with suppress(aiohttp.ClientPayloadError):
        while size < MAX_RESPONSE and (chunk := await response.content.read(MAX_RESPONSE - size)):
            size += len(chunk)


def _reason(error: aiohttp.ClientConnectorError) -> str:
    cause: BaseException | None = error.os_error
    if isinstance(cause, NotPublic) or NotPublic.__name__ in repr(cause):
        return "The address is private or local; the route needs allow_private = true."
    return f"The connection failed: {str(cause)[:200] or type(cause).__name__}."


def public_socket(info: tuple[Any, ...]) -> socket.socket:
    """Return a socket for a connection to this address (a result of getaddrinfo). Raise NotPublic."""
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise NotPublic("NotPublic")
    return socket.socket(family=family, type=kind, proto=protocol)


def is_public(text: str) -> bool:
    """Return whether this address belongs to the public Internet. An IPv4 address within an IPv6 address counts as
    itself."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        within = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if within is None and address in _NAT64:
            within = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = within or address
    return address.is_global and not address.is_multicast
