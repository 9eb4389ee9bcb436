"""No key or token appears in a log, a response, a metric, a process list or a file that other users may read."""

from __future__ import annotations

import json
import signal
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.conftest import example
from tests.support.site import Site

S3_KEY, S3_SECRET = "key id of this test", "the other half of it"
PASSWORD = "wordofatest"


def every_answer(site: Site, token: str) -> str:
    """Return the daemon's responses to valid and invalid requests of every kind."""
    enrolment = site.call("/ops/enrolment-keys", body={})[1]["enrolment_key"]
    wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
    asked: list[tuple[str, str, Any]] = [
        ("/v1/heartbeat", token, example(datetime.now(UTC))),
        ("/v1/heartbeat", token, example(datetime.now(UTC), device_id=token)),  # a token in the place of an id
        ("/v1/heartbeat", token, {"battery": token}),
        ("/v1/heartbeat", wrong, {}),
        ("/v1/heartbeat", enrolment, {}),
        ("/v1/heartbeats", token, [1, token]),
        ("/v1/register", enrolment, {"device_id": "other"}),
        ("/v1/register", wrong, {}),
        ("/ops/nightly", "", {}),
        ("/ops/reconcile", "", {}),
        *((path, "", None) for path in ("/v1/fleet", "/v1/devices", "/ops/jobs", "/readyz", "/healthz", "/nothing")),
        ("/v1/fleet", token, None),
        ("/v1/devices/offline?minutes=x", "", None),
    ]
    answers = [(path, site.call(path, key, body)) for path, key, body in asked]
    # The response to a registration must contain the new token; no other response may.
    return json.dumps([answer for path, answer in answers if path != "/v1/register"])


def test_no_secret_leaves_the_daemon(site: Site, tmp_path: Path) -> None:
    site.settings |= {
        "NEXHB_LOG_LEVEL": "debug", "NEXHB_AUTH__ENROLMENT": "open", "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET, "NEXHB_ARCHIVE__URL": "s3://bucket/x",
        "NEXHB_ARCHIVE__ENDPOINT_URL": "http://127.0.0.1:9", "NEXHB_ARCHIVE__REGION": "eu-central-1",
    }  # fmt: skip
    daemon = site.start("--welcome")
    token = site.nexhb("devices", "add", "kiosk-1").stdout.strip()
    admin = (site.folder / "data" / "admin_key").read_text().strip()
    said = every_answer(site, token)
    commands = [("status",), ("doctor",), ("config", "check"), ("config", "check", "--json"), ("devices", "list"),
                ("archive", "list"), ("archive", "verify", "--all"), ("nightly", "--json")]  # fmt: skip
    ran = [site.nexhb(*command, check=False) for command in commands]
    said += "".join(one.stdout + one.stderr for one in ran)
    said += Path(f"/proc/{daemon.pid}/cmdline").read_text()
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(20)
    log = site.log_path.read_text()
    assert len(log.splitlines()) > 10
    for name, secret in {"token": token, "admin key": admin, "S3 key": S3_KEY, "S3 secret": S3_SECRET}.items():
        assert secret not in said, f"the {name} is in an answer"
        assert secret not in log, f"the {name} is in the log"


def test_no_command_prints_the_password_of_database_url(site: Site) -> None:
    for url in (
        f"postgresql://nexhb:{PASSWORD}@127.0.0.1:1/x",
        f"postgresql://nexhb:{PASSWORD}@127.0.0.1:port/x",
        f"postgresql://nexhb:{PASSWORD}@[::1/x",
        f"postgres//{PASSWORD}",
    ):
        site.settings["NEXHB_DATABASE__URL"] = url
        for command in (("migrate",), ("config", "check"), ("doctor",), ("config", "check", "--json")):
            found = site.nexhb(*command, check=False)
            assert PASSWORD not in found.stdout + found.stderr, (url, command)


def test_only_the_owner_can_read_files_with_secrets_or_heartbeats(site: Site) -> None:
    site.start()
    data = site.folder / "data"
    site.nexhb("nightly")
    for path in [data / "admin_key", *(data / "spool").glob("*"), *(data / "archive").rglob("*")]:
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path
    assert not (data / "pg").stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
