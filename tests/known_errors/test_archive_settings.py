"""Found by somebody whose task was to break the archive: settings that were taken and should not have been."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nexhb import config


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
