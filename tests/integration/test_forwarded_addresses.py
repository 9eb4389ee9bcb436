"""Formerly, if a proxy added a second X-Forwarded-For after the client's, as HAProxy does, both were read in the wrong
order: a forged header of the client was trusted, so that any client could evade limits per address, or direct them at
others. Addresses with a port, and IPv4 mapped to IPv6, were not read at all."""

from __future__ import annotations

from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict

from nexhb.http.transport.client import address_of

TRUSTED = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "headers", "address"),
    [
        ("10.0.0.1", ["6.6.6.6", "8.8.8.8"], "8.8.8.8"),
        ("10.0.0.1", ["6.6.6.6", "8.8.8.8, 10.0.0.2"], "8.8.8.8"),
        ("10.0.0.1", ["6.6.6.6, 8.8.8.8", "10.0.0.3"], "8.8.8.8"),
        ("::ffff:10.0.0.1", ["8.8.8.8"], "8.8.8.8"),
        ("10.0.0.1", ["::ffff:8.8.8.8"], "8.8.8.8"),
        ("10.0.0.1", ["8.8.8.8:4711"], "8.8.8.8"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::/64"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::/64"),
        ("10.0.0.1", ["8.8.8.8, unknown"], "10.0.0.1"),
        ("10.0.0.1", [",,,"], "10.0.0.1"),
        ("10.0.0.1", [", ".join(["6.6.6.6"] * 2000 + ["8.8.8.8"])], "8.8.8.8"),
        ("9.9.9.9", ["6.6.6.6"], "9.9.9.9"),
    ],
)
def test_the_last_address_that_is_not_a_trusted_proxy_counts(peer: str, headers: list[str], address: str) -> None:
    request: Any = SimpleNamespace(
        remote=peer, headers=CIMultiDict([("X-Forwarded-For", header) for header in headers])
    )
    assert address_of(request, TRUSTED) == address
