"""Found by somebody whose task was to break the archive: settings that were taken and should not have been."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from nexhb import config, partitions
from nexhb.db import Connection
from tests.conftest import ADMIN_KEY, StartDaemon


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", "s3://AKIAEXAMPLE:geheim@bucket/prefix"),
        ("endpoint_url", "https://AKIAEXAMPLE:geheim@store.example"),
        ("endpoint_url", "AKIAEXAMPLE:geheim@store.example"),
    ],
)
def test_an_archives_address_takes_no_credentials(key: str, value: str) -> None:
    """As other tools take them, in the address.

    They stood in job_runs, hb_partitions.reason, the log and the answer of POST /ops/nightly from the first failure on.
    """
    with pytest.raises(ValidationError) as refused:
        config.Archive.model_validate({key: value})
    assert "geheim" not in str(refused.value.errors(include_input=False, include_url=False))


@pytest.mark.parametrize("value", ["s3://bucket", "s3://bucket/a@b/c", "file:///a@b"])
def test_an_at_sign_in_a_path_is_none(value: str) -> None:
    """What is not refused with it."""
    assert config.Archive(url=value).url == value


@pytest.mark.parametrize("cron", ["0 0 31 2 *", "R 3 * * *"])
def test_a_schedule_that_never_comes_or_is_never_the_same_is_refused(cron: str) -> None:
    """croniter finds both valid.

    The first raised at every look, four times a minute; the second was another minute at every look, so that a run
    was due again after it had begun.
    """
    with pytest.raises(ValidationError):
        config.Jobs(nightly=cron)
    assert config.Jobs(nightly="0 3 * MAR fri", reconcile="").nightly


async def test_a_store_that_cannot_be_opened_stops_only_what_needs_it(
    start_daemon: StartDaemon, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile of ~/.aws that is not there fails while the client is made, before the first request.

    The whole nightly run failed with it: no day made, none counted, none vacuumed. `archive list` needs no store, too.
    """
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    nexhb = await start_daemon(archive=config.Archive(url="s3://bucket/prefix", endpoint_url="http://127.0.0.1:9"))
    old = partitions.name_of(datetime.now(UTC).date() - timedelta(days=95))
    await partitions.ensure(conn, [datetime.now(UTC).date() - timedelta(days=95)])
    async with nexhb.http.post(f"{nexhb.url}/ops/nightly", headers={"x-admin": ADMIN_KEY}) as response:
        body = await response.json()
    assert (response.status, body["failed_steps"]) == (500, 1)
    assert body["counted"] > 0
    assert "not-there" in body["reason"]
    row = await conn.fetchrow("SELECT state, reason FROM hb_partitions WHERE partition_name = $1", old)
    assert row is not None
    assert row["state"] == "archive_failed"
