"""Where a request comes from."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

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
        # A proxy may append to the header or add one of its own below: what is last was written last.
        said = ",".join(request.headers.getall("X-Forwarded-For", []))
        hops = [*(hop.strip() for hop in said.split(",")), peer]
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
    """An address as proxies write it: with its port or without, IPv4 in IPv6's clothes; None where it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
