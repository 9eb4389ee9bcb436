"""The Unity app's entry is decoded by itself. Bytes that are not UTF-8 inside it reached the code that explains a
refusal as msgspec.Raw, which has no strip(): the device heard 500 instead of 400. A mutating fuzzer found it."""

from __future__ import annotations

from datetime import datetime

from tests.conftest import Nexhb, timestamp


async def test_bytes_that_are_not_utf_8_inside_the_unity_entry_are_refused(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    body = b'{"timestamp_utc":"%s","app_versions":{"io.unitynodes.unityapp":{"version_name":"\x802"}}}'
    answer = await agent.post(body % timestamp(now).encode())
    assert (answer.status, answer.paths) == (422, ["app_versions.io.unitynodes.unityapp"])
