"""Settings: where a value comes from, and what is said of one that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb import config
from nexhb.cli.config import toml_lines
from nexhb.config import Settings
from nexhb.errors import ConfigError

SECRET = "xk7-very-secret-0123456789"  # in small letters, as messages are


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine, and no nexhb.toml in the present folder."""
    for name in list(os.environ):
        if name.upper().startswith("NEXHB_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


Loaded = Callable[[str], Settings]


@pytest.fixture
def load(tmp_path: Path) -> Loaded:
    """The settings out of this TOML."""

    def load(text: str) -> Settings:
        file = tmp_path / "given.toml"
        file.write_text(text)
        return config.load(file)

    return load


def refusal(text: str, load: Loaded) -> str:
    """What is said of this TOML."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    return str(caught.value)


def url_of(settings: Settings) -> str | None:
    """database.url, readable."""
    return settings.database.url.get_secret_value() if settings.database.url else None


# ---- where a value comes from -----------------------------------------------------------------------------------


def test_environment_over_alias_over_file_over_default(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[database]\nurl = "postgresql://file/x"\n[server]\nport = 1111\n'
    assert (url_of(load("")), load("").server.port) == (None, 8080)
    assert (url_of(load(text)), load(text).server.port) == ("postgresql://file/x", 1111)
    monkeypatch.setenv("DATABASE_URL", "postgresql://alias/x")
    assert url_of(load(text)) == "postgresql://alias/x"
    monkeypatch.setenv("NEXHB_DATABASE__URL", "postgresql://environment/x")
    monkeypatch.setenv("NEXHB_SERVER__PORT", "2222")
    assert (url_of(load(text)), load(text).server.port) == ("postgresql://environment/x", 2222)


def test_one_key_from_the_environment_leaves_the_rest_of_its_section(
    load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://alias/x")
    monkeypatch.setenv("NEXHB_DATABASE__READ_POOL_SIZE", "7")
    found = load("[database]\nread_timeout_seconds = 3\nread_pool_size = 2\n")
    assert (url_of(found), found.database.read_pool_size, found.database.read_timeout_seconds) == (
        "postgresql://alias/x", 7, 3,
    )  # fmt: skip


def test_a_whole_section_may_come_as_json(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXHB_SERVER", '{"port": 3333}')
    found = load('[server]\nhost = "0.0.0.0"\n')
    assert (found.server.host, found.server.port) == ("0.0.0.0", 3333)  # noqa: S104 - nothing listens


def test_the_seeds_names_are_aliases(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://alias/x")
    monkeypatch.setenv("ADMIN_KEY", SECRET)
    found = load("")
    assert url_of(found) == "postgresql://alias/x"
    assert found.auth.admin_key
    assert found.auth.admin_key.get_secret_value() == SECRET


def test_an_empty_alias_is_as_good_as_none(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("ADMIN_KEY", "")
    assert (load("").database.url, load("").auth.admin_key) == (None, None)


def test_the_file_is_the_named_one_else_the_environments_else_the_one_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for port, name in ((1, "argument.toml"), (2, "environment.toml"), (3, "nexhb.toml")):
        (tmp_path / name).write_text(f"[server]\nport = {port}\n")
    assert config.load().server.port == 3
    monkeypatch.setenv("NEXHB_CONFIG", str(tmp_path / "environment.toml"))
    assert config.load().server.port == 2
    assert config.load(tmp_path / "argument.toml").server.port == 1


def test_without_any_file_the_defaults_hold() -> None:
    if config.find_file(None) is not None:
        pytest.skip("this machine has an /etc/nexhb/nexhb.toml")
    found = config.load()
    assert (found.server.host, found.server.port, found.ingest.bucket_seconds) == ("127.0.0.1", 8080, 10)
    assert (found.heartbeat.interval_seconds, found.heartbeat.offline_after_seconds) == (60, 600)
    assert (found.ingest.accept_past, found.ingest.accept_future) == (timedelta(days=7), timedelta(minutes=5))


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_named_file_that_is_not_there_is_an_error_and_no_other_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    (tmp_path / "nexhb.toml").write_text("[server]\nport = 3\n")
    missing = tmp_path / "missing.toml"
    if by_environment:
        monkeypatch.setenv("NEXHB_CONFIG", str(missing))
    with pytest.raises(ConfigError, match=r"no file .*missing\.toml"):
        config.load(None if by_environment else missing)


def test_data_dir_is_systemds_else_roots_else_the_users_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> str:
        return str(config.load().data_dir)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/kim")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert found() == "/home/kim/.local/state/nexhb"
    monkeypatch.setenv("XDG_STATE_HOME", "/home/kim/state")
    assert found() == "/home/kim/state/nexhb"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found() == "/var/lib/nexhb"
    monkeypatch.setenv("STATE_DIRECTORY", "/srv/nexhb")
    assert found() == "/srv/nexhb"
    monkeypatch.setenv("STATE_DIRECTORY", "/srv/one:/srv/two")
    assert found() == "/srv/one"
    monkeypatch.setenv("NEXHB_DATA_DIR", "/elsewhere")
    assert found() == "/elsewhere"


# ---- what is said of one that cannot be used --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("[server]\nprot = 1", "server.prot", "no such setting"),
        ("[servr]\nport = 1", "servr", "no such setting"),
        ("verbose = true", "verbose", "no such setting"),
        ("[server]\nport = 65536", "server.port", "65535"),
        ('[server]\nport = "eighty"', "server.port", "integer"),
        ("server = 8080", "server", "dictionary"),
        ('[auth]\nenrolment = "closed"', "auth.enrolment", "'token' or 'open'"),
        ('log_level = "loud"', "log_level", "'debug', 'info', 'warning' or 'error'"),
        ('[database]\naccept_unsafe_settings = "perhaps"', "database.accept_unsafe_settings", "boolean"),
        ("[ingest]\nbatch_max = 0", "ingest.batch_max", "greater than or equal to 1"),
        ("[ingest]\nanswer_within_seconds = 26", "ingest.answer_within_seconds", "25"),
        ("[server]\nbody_timeout_seconds = 0", "server.body_timeout_seconds", "greater than 0"),
        ('[ingest]\naccept_past = "a week"', "ingest.accept_past", '"7 days"'),
        ('[ingest]\naccept_past = "7 fortnights"', "ingest.accept_past", '"7 days"'),
        ('[ingest]\naccept_past = "-7 days"', "ingest.accept_past", '"7 days"'),
        ('[heartbeat]\nunity_package = ""', "heartbeat.unity_package", "at least 1"),
        ("[ingest]\nbucket_seconds = 7", "bucket_seconds", "divide a day"),
        ('[ingest]\naccept_past = "61 days"', "accept_past", "0 to 60 days"),
        ('[ingest]\naccept_future = "2 days"', "accept_future", "0 to 1 day"),
    ],
)
def test_a_bad_key_or_value_is_named_with_what_it_takes(load: Loaded, text: str, path: str, says: str) -> None:
    said = refusal(text, load)
    assert path in said
    assert says in said


def test_every_bad_key_is_named_at_once(load: Loaded) -> None:
    said = refusal("[server]\nport = -1\nprot = 1\n[ingest]\nbatch_max = 0", load)
    assert all(path in said for path in ("server.port", "server.prot", "ingest.batch_max"))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("NEXHB_SERVR__PORT", "NEXHB_SERVR__PORT"),
        ("NEXHB_PORT", "NEXHB_PORT"),
        ("NEXHB_ADMIN_KEY", "NEXHB_ADMIN_KEY"),
        ("NEXHB_SERVER__PROT", "server.prot"),
        ("NEXHB_SERVER__PORT__X", "server.port"),
        ("NEXHB_SERVER__PORT", "server.port"),
    ],
)
def test_a_bad_name_or_value_in_the_environment_is_named(
    load: Loaded, monkeypatch: pytest.MonkeyPatch, name: str, path: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    said = refusal("", load)
    assert path in said
    assert SECRET not in said


@pytest.mark.parametrize(
    "text",
    [
        f'[auth]\nadmin_key = ["{SECRET}"]',
        f'[auth]\nadmin_key = {{ value = "{SECRET}" }}',
        f'auth = "{SECRET}"',
        f'[auth]\nadmin_kye = "{SECRET}"',
        f'[database]\nurl = ["postgresql://nexhb:{SECRET}@host/nexhb"]',
        f'[server]\nport = "{SECRET}"',
        f"[auth]\nadmin_key = {SECRET}",
        f'[auth]\nadmin_key = "{SECRET}',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_repeated(load: Loaded, text: str) -> None:
    assert SECRET not in refusal(text, load)


def test_settings_shown_or_logged_show_no_secret(load: Loaded) -> None:
    found = load(f'[auth]\nadmin_key = "{SECRET}"\n[database]\nurl = "postgresql://nexhb:{SECRET}@host/nexhb"\n')
    assert SECRET not in repr(found)
    assert SECRET not in json.dumps(found.model_dump(mode="json"))


def test_what_is_not_toml_is_named_by_file_and_line(load: Loaded) -> None:
    said = refusal("[server]\nport == 8080\n", load)
    assert "given.toml" in said
    assert "line 2" in said


def test_settings_do_not_change(load: Loaded) -> None:
    found = load("")
    with pytest.raises(ValueError, match="frozen"):
        found.server.port = 1


# ---- durations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "duration"),
    [
        ("7 days", timedelta(days=7)),
        ("1 day", timedelta(days=1)),
        ("1d", timedelta(days=1)),
        ("36h", timedelta(hours=36)),
        ("1.5 hours", timedelta(minutes=90)),
        ("90 minutes", timedelta(minutes=90)),
        ("90m", timedelta(minutes=90)),
        ("90 Min", timedelta(minutes=90)),
        ("90 seconds", timedelta(seconds=90)),
        ("90s", timedelta(seconds=90)),
        (" 90 ", timedelta(seconds=90)),
        (90, timedelta(seconds=90)),
        (0.5, timedelta(milliseconds=500)),
        (0, timedelta(0)),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_says_its_unit(value: object, duration: timedelta) -> None:
    assert config.parse_duration(value) == duration


@pytest.mark.parametrize(
    "value", ["", "days", "7 weeks", "-1 day", "7 days 3 hours", "1e3", "PT2H", "nan", float("inf")]
)
def test_what_is_no_duration_says_what_one_is(value: object) -> None:
    with pytest.raises(ValueError, match="takes a duration like"):
        config.parse_duration(value)


def test_a_duration_may_come_from_the_file_and_from_the_environment(
    load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load('[ingest]\naccept_past = "36 hours"').ingest.accept_past == timedelta(hours=36)
    assert load("[ingest]\naccept_past = 60").ingest.accept_past == timedelta(minutes=1)
    monkeypatch.setenv("NEXHB_INGEST__ACCEPT_PAST", "2 days")
    assert load('[ingest]\naccept_past = "36 hours"').ingest.accept_past == timedelta(days=2)


# ---- found by looking for it ---------------------------------------------------------------------------------


def test_a_section_in_the_environment_that_is_no_json_is_an_error_by_name(
    load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXHB_DATABASE", f"postgresql://nexhb:{SECRET}@host/nexhb")
    said = refusal("", load)
    assert "NEXHB_DATABASE" in said
    assert SECRET not in said


def test_a_file_that_is_not_utf8_is_an_error_by_name(tmp_path: Path) -> None:
    file = tmp_path / "latin1.toml"
    file.write_bytes('[server]\nhost = "Zürich"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin1\.toml"):
        config.load(file)


def test_a_duration_beyond_all_measure_is_an_error_by_name(load: Loaded) -> None:
    assert "ingest.accept_past" in refusal('[ingest]\naccept_past = "9999999999999 days"', load)


def test_a_value_that_breaks_a_rule_is_named_by_its_whole_path(load: Loaded) -> None:
    assert "ingest.bucket_seconds" in refusal("[ingest]\nbucket_seconds = 7", load)


@pytest.mark.parametrize("key", ["accept_past", "queue_items"])
def test_a_bool_is_no_number(load: Loaded, key: str) -> None:
    refusal(f"[ingest]\n{key} = true", load)


def test_an_empty_database_url_is_as_good_as_none(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXHB_DATABASE__URL", "")
    assert load("").database.url is None


def test_an_offline_threshold_beyond_all_measure_is_refused(load: Loaded) -> None:
    refusal("[heartbeat]\noffline_after_seconds = 99999999999999", load)


def test_config_check_is_a_command(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "nexhb", "config", "check", "--json"], capture_output=True, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["server"]["port"] == 8080


EVERYTHING = """
data_dir = "/mnt/Kiosks \\"7\\""
[server]
host = "::"
port = 9443
trusted_proxies = ["10.0.0.0/8", "2001:db8::1"]
tls_cert_file = "/etc/Cert.pem"
tls_key_file = "/etc/Key.pem"
[database]
url = "postgresql://user:geheim@host/x"
[auth]
admin_key = "Geheim"
[ingest]
accept_past = "36h"
accept_future = 90.5
[archive]
url = "s3://Bucket/Prefix"
region = "eu-central-1"
[jobs]
nightly = ""
jitter_seconds = 0.5
"""


@pytest.mark.parametrize("text", ["", EVERYTHING])
def test_config_check_prints_what_the_file_takes(load: Loaded, text: str) -> None:
    """Booleans came as Python's and durations as ISO 8601, and neither could be pasted."""
    found = load(text)
    printed = "\n".join(toml_lines(found))
    again = load("\n".join(line for line in printed.splitlines() if not line.startswith("#")))
    shown = {"url": found.database.url, "admin_key": found.auth.admin_key}
    assert again.model_dump(exclude={"database", "auth"}) == found.model_dump(exclude={"database", "auth"})
    assert "geheim" not in printed.lower()
    assert printed.count("is set, and not shown") == (2 if any(shown.values()) else 0)
    if text:
        assert 'ingest.accept_past = "36 hours"' in printed
        assert 'ingest.accept_future = "90.500000 seconds"' in printed


def test_a_refusal_keeps_the_case_of_what_it_names(load: Loaded) -> None:
    assert "AWS_ACCESS_KEY_ID" in refusal('[archive]\nurl = "s3://Key:Secret@Bucket/x"\n', load)


# ---- what systemd hands over ------------------------------------------------------------------------------------


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CREDENTIALS_DIRECTORY."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def test_a_credential_counts_where_neither_file_nor_environment_has_the_key(
    load: Loaded, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (credentials / "database_url").write_text("postgresql://credential/x\n")
    (credentials / "admin_key").write_text("key-of-the-credential\n")
    found = load("[database]\nread_pool_size = 7\n")
    assert (url_of(found), found.database.read_pool_size) == ("postgresql://credential/x", 7)
    assert found.auth.admin_key is not None
    assert found.auth.admin_key.get_secret_value() == "key-of-the-credential"

    text = '[database]\nurl = "postgresql://file/x"\n[auth]\nadmin_key = "of-the-file"\n'
    assert url_of(load(text)) == "postgresql://file/x"
    monkeypatch.setenv("DATABASE_URL", "postgresql://alias/x")
    monkeypatch.setenv("NEXHB_AUTH__ADMIN_KEY", "of-the-environment")
    found = load("")
    assert url_of(found) == "postgresql://alias/x"
    assert found.auth.admin_key is not None
    assert found.auth.admin_key.get_secret_value() == "of-the-environment"


def test_an_empty_credential_is_none_and_one_that_cannot_be_read_is_told_by_its_key(
    load: Loaded, credentials: Path
) -> None:
    (credentials / "database_url").write_text("\n")
    (credentials / "aws").write_text("[default]\n")  # another's
    assert url_of(load("")) is None
    (credentials / "admin_key").mkdir()
    assert "auth.admin_key: " in refusal("", load)


def test_daemons_that_share_a_port_share_a_database(load: Loaded) -> None:
    assert "server.reuse_port needs database.url" in refusal("[server]\nreuse_port = true\n", load)
    assert load('[server]\nreuse_port = true\n[database]\nurl = "postgresql://file/x"\n').server.reuse_port
