"""The address of the client that sent a request."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp import web

Network = IPv4Network | IPv6Network


def address_of(request: web.Request, trusted: Sequence[Network]) -> str:
    """Return the client's address: the peer's, or if the peer is a trusted proxy, the last address in X-Forwarded-For
    that is not a trusted proxy.

    The addresses before that one may be invented by the client. For an IPv6 address the /64 network is returned,
    because a client usually controls all addresses in it.
    """
    peer = request.remote or ""
    hops = [peer]
    if trusted and _is_trusted(peer, trusted):
        # A proxy appends to the header, or adds another header after it: the last address was added last.
        forwarded_for = ",".join(request.headers.getall("X-Forwarded-For", []))
        hops = [*(hop.strip() for hop in forwarded_for.split(",")), peer]
    while len(hops) > 1 and _is_trusted(hops[-1], trusted):
        hops.pop()
    return _grouped(hops[-1]) or _grouped(peer) or "unknown"


def _is_trusted(text: str, trusted: Sequence[Network]) -> bool:
    address = _parsed(text)
    return address is not None and any(address in network for network in trusted)


def _grouped(text: str) -> str:
    address = _parsed(text)
    if address is None:
        return ""
    return str(ip_network((address, 64), strict=False)) if isinstance(address, IPv6Address) else str(address)


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address as proxies write it, with or without a port or mapped to IPv6; return None if it is not
    valid."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
