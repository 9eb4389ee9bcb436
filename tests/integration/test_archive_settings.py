"""Settings that were accepted but should not have been, found by trying to break the archive."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import ValidationError

from nexhb import config, partitions
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, StartDaemon


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", "s3://AKIAEXAMPLE:geheim@bucket/prefix"),
        ("endpoint_url", "https://AKIAEXAMPLE:geheim@store.example"),
        ("endpoint_url", "AKIAEXAMPLE:geheim@store.example"),
    ],
)
def test_an_archives_url_must_not_contain_credentials(key: str, value: str) -> None:
    """Other tools accept credentials in the URL.

    Formerly, nexhb did so, too. After the first failure, the credentials were in job_runs, hb_partitions.reason, the
    log and the response of POST /ops/nightly.
    """
    with pytest.raises(ValidationError) as refused:
        config.ArchiveSettings.model_validate({key: value})
    assert "geheim" not in str(refused.value.errors(include_input=False, include_url=False))


@pytest.mark.parametrize("value", ["s3://bucket", "s3://bucket/a@b/c", "file:///a@b"])
def test_an_at_sign_in_a_path_is_accepted(value: str) -> None:
    """An at sign in a path is not mistaken for the end of credentials."""
    assert config.ArchiveSettings(url=value).url == value


@pytest.mark.parametrize("cron", ["0 0 31 2 *", "R 3 * * *"])
def test_a_schedule_that_never_fires_or_is_random_is_refused(cron: str) -> None:
    """croniter considers both schedules valid.

    Formerly, the first schedule raised an error at every check, four times per minute. The second schedule resulted in
    a different minute at every check, so that another run was due soon after a run had started.
    """
    with pytest.raises(ValidationError):
        config.JobsSettings(nightly=cron)
    assert config.JobsSettings(nightly="0 3 * MAR fri", reconcile="").nightly


async def test_a_store_that_cannot_be_opened_stops_only_the_steps_that_need_it(
    start_daemon: StartDaemon, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing profile of ~/.aws fails while the client is created, before the first request.

    Formerly, the whole nightly run failed because of it: no day was created, counted or vacuumed. `archive list` needs
    no store, and so works without the profile.
    """
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    nexhb = await start_daemon(
        archive=config.ArchiveSettings(url="s3://bucket/prefix", endpoint_url="http://127.0.0.1:9")
    )
    day = nexhb.clock().date() - timedelta(days=95)
    old = partitions.table_name(day)
    await partitions.ensure(conn, [day])
    async with nexhb.http.post(f"{nexhb.url}/ops/nightly", headers={"x-admin": ADMIN_KEY}) as response:
        body = await response.json()
    assert (response.status, body["failed_steps"]) == (500, 1)
    assert body["counted"] > 0
    assert "not-there" in body["reason"]
    row = await conn.fetchrow("SELECT state, reason FROM hb_partitions WHERE partition_name = $1", old)
    assert row is not None
    assert row["state"] == "archive_failed"
