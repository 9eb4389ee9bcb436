"""Where a request comes from."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp import web

Network = IPv4Network | IPv6Network


def address_of(request: web.Request, trusted: Sequence[Network]) -> str:
    """The client's address: the peer's, or where that is a trusted proxy, the last one in X-Forwarded-For that is not.

    Whoever is not trusted can write into that header what he likes. Of an IPv6 address the /64 counts: whoever has one
    address there has them all.
    """
    peer = request.remote or ""
    hops = [peer]
    if trusted and _is_trusted(peer, trusted):
        for header in request.headers.getall("X-Forwarded-For", []):
            hops[0:0] = [hop.strip() for hop in header.split(",")]
    while len(hops) > 1 and _is_trusted(hops[-1], trusted):
        hops.pop()
    return _grouped(hops[-1]) or _grouped(peer) or "unknown"


def _is_trusted(text: str, trusted: Sequence[Network]) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return any(address in network for network in trusted)


def _grouped(text: str) -> str:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return str(ip_network((address, 64), strict=False))
    return str(address)
