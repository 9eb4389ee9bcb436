"""The entry of the Unity app is decoded separately. Formerly, if it had bytes that are not UTF-8, the code that
explains a refusal received a msgspec.Raw, which has no strip(), and the device received 500 instead of 400. A fuzzer
found this."""

from __future__ import annotations

from datetime import datetime

from tests.conftest import Nexhb, timestamp


async def test_bytes_that_are_not_utf_8_inside_the_unity_entry_are_refused(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    body = b'{"timestamp_utc":"%s","app_versions":{"io.unitynodes.unityapp":{"version_name":"\x802"}}}'
    answer = await agent.post(body % timestamp(now).encode())
    assert (answer.status, answer.paths) == (422, ["app_versions.io.unitynodes.unityapp"])
