"""Wait for the response of a daemon that cannot commit for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.conftest import ADMIN_KEY, Answer, Nexhb


async def until_answered(send: Callable[[], Awaitable[Answer]]) -> tuple[Answer, set[int]]:
    """Send until the status is not 503. Return the last response and the statuses of the earlier ones."""
    before: set[int] = set()
    while (answer := await send()).status == 503:
        assert "Retry-After" in answer.headers
        before.add(answer.status)
        await asyncio.sleep(0.02)
    return answer, before


async def either(nexhb: Nexhb, path: str) -> int:
    """Return the status of the response, which must be 200 or 503."""
    async with nexhb.http.get(nexhb.url + path, headers={"x-admin": ADMIN_KEY}) as response:
        assert response.status in (200, 503)
        return response.status
