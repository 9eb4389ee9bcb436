"""Settings: where a value comes from, and the error messages for values that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, SecretStr

from nexhb import config
from nexhb.cli.config import toml_lines
from nexhb.config import Settings
from nexhb.config import file as config_file
from nexhb.errors import ConfigError

SECRET = "xk7-very-secret-0123456789"  # in small letters, as messages are


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the settings of this machine, and a nexhb.toml in the current folder."""
    for name in list(os.environ):
        if name.upper().startswith("NEXHB_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


Loaded = Callable[[str], Settings]


@pytest.fixture
def load(tmp_path: Path) -> Loaded:
    """Return a function that loads the settings from TOML."""

    def load(text: str) -> Settings:
        file = tmp_path / "given.toml"
        file.write_text(text)
        return config.load(file)

    return load


def refusal(text: str, load: Loaded) -> str:
    """Return the error message for this TOML."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    return str(caught.value)


def url_of(settings: Settings) -> str | None:
    """Return database.url in plain text."""
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


def test_an_empty_alias_counts_as_unset(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("ADMIN_KEY", "")
    assert (load("").database.url, load("").auth.admin_key) == (None, None)


def test_the_file_is_the_named_one_else_the_environments_else_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for port, name in ((1, "argument.toml"), (2, "environment.toml"), (3, "nexhb.toml")):
        (tmp_path / name).write_text(f"[server]\nport = {port}\n")
    assert config.load().server.port == 3
    monkeypatch.setenv("NEXHB_CONFIG", str(tmp_path / "environment.toml"))
    assert config.load().server.port == 2
    assert config.load(tmp_path / "argument.toml").server.port == 1


def test_without_any_file_the_defaults_hold() -> None:
    if config_file.find_file(None) is not None:
        pytest.skip("this machine has an /etc/nexhb/nexhb.toml")
    found = config.load()
    assert (found.server.host, found.server.port, found.ingest.bucket_seconds) == ("127.0.0.1", 8080, 10)
    assert (found.heartbeat.interval_seconds, found.heartbeat.offline_after_seconds) == (60, 600)
    assert (found.ingest.accept_past, found.ingest.accept_future) == (timedelta(days=7), timedelta(minutes=5))


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_named_file_that_does_not_exist_is_an_error_and_no_other_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    (tmp_path / "nexhb.toml").write_text("[server]\nport = 3\n")
    missing = tmp_path / "missing.toml"
    if by_environment:
        monkeypatch.setenv("NEXHB_CONFIG", str(missing))
    with pytest.raises(ConfigError, match=r"missing\.toml does not exist"):
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


# ---- error messages --------------------------------------------------------------------


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
        ('[heartbeat]\nunity_package = ""', "heartbeat.unity_package", "must not be empty"),
        ("[ingest]\nbucket_seconds = 7", "bucket_seconds", "divide a day"),
        ('[ingest]\naccept_past = "61 days"', "accept_past", "0 to 60 days"),
        ('[ingest]\naccept_future = "2 days"', "accept_future", "0 to 1 day"),
    ],
)
def test_a_bad_key_or_value_is_named_with_the_allowed_ones(load: Loaded, text: str, path: str, says: str) -> None:
    message = refusal(text, load)
    assert path in message
    assert says in message


def test_every_bad_key_is_named_at_once(load: Loaded) -> None:
    message = refusal("[server]\nport = -1\nprot = 1\n[ingest]\nbatch_max = 0", load)
    assert all(path in message for path in ("server.port", "server.prot", "ingest.batch_max"))


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
    message = refusal("", load)
    assert path in message
    assert SECRET not in message


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


def test_printed_settings_contain_no_secret(load: Loaded) -> None:
    found = load(f'[auth]\nadmin_key = "{SECRET}"\n[database]\nurl = "postgresql://nexhb:{SECRET}@host/nexhb"\n')
    assert SECRET not in repr(found)
    assert SECRET not in json.dumps(found.model_dump(mode="json"))


def test_a_syntax_error_is_named_by_file_and_line(load: Loaded) -> None:
    message = refusal("[server]\nport == 8080\n", load)
    assert "given.toml" in message
    assert "line 2" in message


def test_settings_are_immutable(load: Loaded) -> None:
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
def test_a_duration_is_a_number_of_seconds_or_has_a_unit(value: object, duration: timedelta) -> None:
    assert config.parse_duration(value) == duration


@pytest.mark.parametrize(
    "value", ["", "days", "7 weeks", "-1 day", "7 days 3 hours", "1e3", "PT2H", "nan", float("inf")]
)
def test_the_error_for_a_bad_duration_shows_a_good_one(value: object) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        config.parse_duration(value)


def test_a_duration_may_come_from_the_file_and_from_the_environment(
    load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load('[ingest]\naccept_past = "36 hours"').ingest.accept_past == timedelta(hours=36)
    assert load("[ingest]\naccept_past = 60").ingest.accept_past == timedelta(minutes=1)
    monkeypatch.setenv("NEXHB_INGEST__ACCEPT_PAST", "2 days")
    assert load('[ingest]\naccept_past = "36 hours"').ingest.accept_past == timedelta(days=2)


# ---- errors found in an audit of the configuration -----------------------------------------------------------


def test_a_section_in_the_environment_that_is_no_json_is_an_error_by_name(
    load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXHB_DATABASE", f"postgresql://nexhb:{SECRET}@host/nexhb")
    message = refusal("", load)
    assert "NEXHB_DATABASE" in message
    assert SECRET not in message


def test_a_file_that_is_not_utf8_is_an_error_by_name(tmp_path: Path) -> None:
    file = tmp_path / "latin1.toml"
    file.write_bytes('[server]\nhost = "Zürich"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin1\.toml"):
        config.load(file)


def test_a_duration_that_overflows_is_an_error_by_name(load: Loaded) -> None:
    assert "ingest.accept_past" in refusal('[ingest]\naccept_past = "9999999999999 days"', load)


def test_a_value_that_breaks_a_rule_is_named_by_its_whole_path(load: Loaded) -> None:
    assert "ingest.bucket_seconds" in refusal("[ingest]\nbucket_seconds = 7", load)


@pytest.mark.parametrize("key", ["accept_past", "queue_items"])
def test_a_bool_is_not_a_number(load: Loaded, key: str) -> None:
    refusal(f"[ingest]\n{key} = true", load)


def test_an_empty_database_url_counts_as_unset(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXHB_DATABASE__URL", "")
    assert load("").database.url is None


def test_an_offline_threshold_that_is_too_long_is_rejected(load: Loaded) -> None:
    refusal("[heartbeat]\noffline_after_seconds = 99999999999999", load)


def test_config_check_is_a_command(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "nexhb", "config", "check", "--json"], capture_output=True, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["server"]["port"] == 8080


@pytest.mark.parametrize(
    ("interval", "offline_after", "doubtful"),
    [(60, 600, False), (600, 600, True), (600, 1_199, True), (600, 1_200, False)],
)
def test_config_check_warns_if_healthy_devices_would_count_as_offline(
    tmp_path: Path, interval: int, offline_after: int, doubtful: bool
) -> None:
    """A threshold of 600 s with an interval of 600 s needs a warning: each device counts as offline until its next
    heartbeat arrives."""
    rules = config.HeartbeatSettings(interval_seconds=interval, offline_after_seconds=offline_after)
    assert bool(rules.doubt()) is doubtful
    if (interval, offline_after) != (600, 600):
        return
    file = tmp_path / "nexhb.toml"
    file.write_text("[heartbeat]\ninterval_seconds = 600\n")
    words = [sys.executable, "-m", "nexhb", "--config", str(file), "config", "check", "--json"]
    found = subprocess.run(words, capture_output=True, check=False, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert b"warning: heartbeat.offline_after_seconds is 600, less than two intervals of 600 s" in found.stderr
    assert b"Hint: set heartbeat.offline_after_seconds to 1800, three intervals" in found.stderr
    assert json.loads(found.stdout)["heartbeat"]["interval_seconds"] == 600


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
def test_config_check_prints_valid_toml(load: Loaded, text: str) -> None:
    """Formerly, booleans were printed as in Python and durations as in ISO 8601, and neither could be pasted into a
    file."""
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


def test_an_error_message_keeps_the_case_of_names(load: Loaded) -> None:
    assert "AWS_ACCESS_KEY_ID" in refusal('[archive]\nurl = "s3://Key:geheim@Bucket/x"\n', load)


# ---- credentials that systemd provides
# ------------------------------------------------------------------------------------


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder $CREDENTIALS_DIRECTORY."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def test_a_credential_is_used_if_neither_file_nor_environment_has_the_key(
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


def test_an_empty_credential_counts_as_unset_and_an_unreadable_one_is_named_by_its_key(
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


# ---- one rule for every key of a type ---------------------------------------------------------------------------


def every_key() -> Iterator[tuple[str, set[Any]]]:
    """Yield path and types of every key."""
    for name, field in Settings.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            for key, one in inner.model_fields.items():
                yield f"{name}.{key}", {one.annotation, get_origin(one.annotation), *get_args(one.annotation)}
        else:
            yield name, {inner, get_origin(inner), *get_args(inner)}


KEYS = dict(every_key())
TEXTS = [path for path, types in KEYS.items() if types & {str, Path, SecretStr}]
SCHEDULES = {"jobs.nightly", "jobs.reconcile"}


def given(path: str, value: str, by: str, load: Loaded, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Load the settings with this key in a file or in the environment."""
    section, _, key = path.rpartition(".")
    if by == "file":
        return load((f"[{section}]\n" if section else "") + f"{key} = {json.dumps(value)}\n")
    monkeypatch.setenv("NEXHB_" + path.replace(".", "__").upper(), value)
    return load("")


def value_of(path: str, settings: Settings) -> object:
    section, _, key = path.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, key)


@pytest.mark.parametrize("by", ["file", "environment"])
@pytest.mark.parametrize("path", KEYS)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_is_rejected_except_for_a_secret_or_a_schedule(
    path: str, value: str, by: str, load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, nexhb listened on every interface with `NEXHB_SERVER__HOST=`, and took an empty tls_cert_file for the
    current folder."""
    if SecretStr in KEYS[path]:
        assert value_of(path, given(path, value, by, load, monkeypatch)) is None
    elif path in SCHEDULES:
        assert value_of(path, given(path, value, by, load, monkeypatch)) == ""
    else:
        with pytest.raises(ConfigError, match=rf"{path}: .*must (not )?be"):
            given(path, value, by, load, monkeypatch)


@pytest.mark.parametrize("by", ["file", "environment"])
@pytest.mark.parametrize("path", TEXTS)
def test_a_text_with_a_variable_a_control_character_or_surrounding_spaces_is_rejected(
    path: str, by: str, load: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("$NAME", "${NAME}", "/srv/\x07x", "/srv/x\n", " /srv/x", "/srv/x "):
        with pytest.raises(ConfigError, match=rf"^[^:]*{path}: ") as refused:
            given(path, value, by, load, monkeypatch)
        assert value.strip() not in str(refused.value).replace("such as $NAME", "")


@pytest.mark.parametrize("by", ["file", "environment"])
@pytest.mark.parametrize("path", [path for path, types in KEYS.items() if Path in types])
def test_a_path_must_be_absolute(path: str, by: str, load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("relative", "./x", "~/nexhb", "$HOME/nexhb", "${STATE}/x", "file:///srv/x"):
        with pytest.raises(ConfigError, match=rf"{path}: "):
            given(path, value, by, load, monkeypatch)
    if path == "data_dir":
        assert value_of(path, given(path, "/mnt/my kiosks", by, load, monkeypatch)) == Path("/mnt/my kiosks")


def test_an_empty_secret_does_not_hide_another_source(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an empty variable that overrides database.url would start an embedded PostgreSQL."""
    for name in ("NEXHB_DATABASE__URL", "DATABASE_URL"):
        monkeypatch.setenv(name, "")
        assert url_of(load('[database]\nurl = "postgresql://file/x"\n')) == "postgresql://file/x"
    monkeypatch.setenv("DATABASE_URL", "postgresql://alias/x")
    assert url_of(load("")) == "postgresql://alias/x"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('[server]\nhost = "http://127.0.0.1"', "server.host"),
        ('[server]\nhost = "127.0.0.1:8080"', "server.host"),
        ('[server]\nhost = "[::1]:8080"', "server.host"),
        ('[server]\nhost = "*"', "server.host"),
        ('[server]\nhost = "a b"', "server.host"),
        ('[archive]\nurl = "file://relative/folder"', "archive.url"),
        ('[archive]\nurl = "file:///"', "archive.url"),
        ('[archive]\nurl = "/srv/archive"', "archive.url"),
        ('[archive]\nurl = "file://~/archive"', "archive.url"),
        ('[archive]\nurl = "s3:///prefix"', "archive.url"),
        ('[archive]\nurl = "s3://"', "archive.url"),
        ('[archive]\nurl = "s3://my bucket/prefix"', "archive.url"),
        ('[archive]\nendpoint_url = "store.example"', "archive.endpoint_url"),
        ('[archive]\nendpoint_url = "store.example:9000"', "archive.endpoint_url"),
        ('[archive]\nendpoint_url = "ftp://store.example"', "archive.endpoint_url"),
        ('[archive]\nendpoint_url = "https://"', "archive.endpoint_url"),
        ('[archive]\nendpoint_url = "https://store.example:port"', "archive.endpoint_url"),
        ('[archive]\nendpoint_url = "https://store .example"', "archive.endpoint_url"),
        ('[archive]\nregion = "eu central"', "archive.region"),
        ('[heartbeat]\nunity_package = "a b"', "heartbeat.unity_package"),
    ],
)
def test_an_address_that_a_job_could_not_use_is_rejected_at_the_start(load: Loaded, text: str, path: str) -> None:
    assert f"{path}: " in refusal(text, load)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("server", "host", "::1"), ("server", "host", "[::1]"), ("server", "host", "kiosks.example"),
     ("archive", "url", "file:///mnt/my archive"), ("archive", "url", "s3://bucket"), ("archive", "url", "s3://a_B.c/x/y"),
     ("archive", "endpoint_url", "http://127.0.0.1:9000"), ("archive", "endpoint_url", "https://[::1]:9000/"),
     ("archive", "endpoint_url", "https://account.r2.cloudflarestorage.com")],
)  # fmt: skip
def test_usual_addresses_are_accepted(load: Loaded, section: str, key: str, value: str) -> None:
    assert value_of(f"{section}.{key}", load(f'[{section}]\n{key} = "{value}"\n')) == value


def test_a_list_in_the_environment_must_be_json(load: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("10.0.0.0/8", "10.0.0.0/8,127.0.0.1", "", '{"a": 1}', '"10.0.0.0/8"'):
        monkeypatch.setenv("NEXHB_SERVER__TRUSTED_PROXIES", value)
        message = refusal("", load)
        assert "server.trusted_proxies: NEXHB_SERVER__TRUSTED_PROXIES must be a JSON list" in message
        assert '["10.0.0.0/8", "127.0.0.1"]' in message
    monkeypatch.setenv("NEXHB_SERVER__TRUSTED_PROXIES", '["10.0.0.0/8", "::1"]')
    assert [str(one) for one in load("").server.trusted_proxies] == ["10.0.0.0/8", "::1/128"]


# ---- a file that exists but cannot be read -------------------------------------------------------------------


def test_an_unreadable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formerly, a dangling link, a folder or a file without permission was ignored, so that the daemon served another
    database."""
    place = tmp_path / "etc" / "nexhb.toml"
    monkeypatch.setattr(config_file, "DEFAULT_PATHS", (Path("nexhb.toml"), place))
    assert config_file.find_file(None) is None
    place.parent.mkdir()
    for here in (tmp_path / "nexhb.toml", place):
        here.symlink_to(tmp_path / "gone.toml")
        with pytest.raises(ConfigError, match=r"nexhb\.toml is a link to a file that does not exist"):
            config.load()
        here.unlink()
        here.mkdir()
        with pytest.raises(
            ConfigError, match=r"nexhb\.toml cannot be read: Is a directory.*--config or \$NEXHB_CONFIG"
        ):
            config.load()
        here.rmdir()
        here.symlink_to(here)
        with pytest.raises(ConfigError, match=r"nexhb\.toml cannot be read: Too many levels"):
            config.load()
        here.unlink()
    place.parent.rmdir()
    place.parent.touch()
    with pytest.raises(ConfigError, match=r"Cannot determine whether .*nexhb\.toml exists: Not a directory"):
        config.load()


@pytest.mark.parametrize("closed", ["nexhb.toml", "."])
def test_a_file_without_permission_is_an_error_for_an_ordinary_user(tmp_path: Path, closed: str) -> None:
    house = Path(config.__file__).parents[1]
    become = "os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.geteuid() == 0 else ""
    tmp_path.chmod(0o755)
    place = tmp_path / "etc" / "nexhb.toml"
    place.parent.mkdir()
    place.write_text("[server]\nport = 1\n")
    (place.parent / closed).chmod(0)
    code = (
        "import os; from pathlib import Path; from nexhb import config; from nexhb.config import file as configfile\n"
        "from nexhb.errors import ConfigError\n"
        f"configfile.DEFAULT_PATHS = (Path({str(place)!r}),); os.chdir('/'); {become}\n"
        "for given in (None, configfile.DEFAULT_PATHS[0]):\n"
        "    try:\n        config.load(given)\n"
        "    except ConfigError as error:\n        print(error)\n"
    )
    for folder in [*tmp_path.parents][: len(tmp_path.parents) - len(Path("/tmp").parents) - 1]:
        folder.chmod(folder.stat().st_mode | 0o011)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=house)
    assert found.stdout.count(str(place)) == 2, found.stdout
    assert found.stdout.count("Permission denied") == 2


@pytest.mark.parametrize("content", [b"a folder", None])
def test_a_named_file_that_is_a_folder_or_a_dangling_link_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    named = tmp_path / "named.toml"
    if content:
        named.mkdir()
    else:
        named.symlink_to("gone")
    monkeypatch.setenv("NEXHB_CONFIG", str(named))
    for argument in (None, named):
        with pytest.raises(ConfigError, match=r"named\.toml (cannot be read|is a link)"):
            config.load(argument)
    monkeypatch.setenv("NEXHB_CONFIG", " ")
    with pytest.raises(ConfigError, match="NEXHB_CONFIG is set, but empty"):
        config.load()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[server]\n".encode("utf-8-sig"), "begins with a byte order mark"),
        ("[server]\n".encode("utf-16"), "is UTF-16"),
        ("[server]\n".encode("utf-32"), "is UTF-32"),
        ("[server]\n".encode("utf-16-be"), "is not text"),
        ("[server]\n# Caf\u00e9\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 2"),
        (b"#" * (2**20 + 1), "is larger than 1 MiB"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    """Formerly, a byte order mark was reported as an invalid statement in line 1, column 1."""
    file = tmp_path / "given.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"given\.toml {says}"):
        config.load(file)


# ---- where data_dir comes from ----------------------------------------------------------------------------------


def test_without_a_home_directory_data_dir_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formerly, nexhb ended with a traceback of pathlib's RuntimeError."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for name in ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"data_dir: user id 54321 has no home directory\. Set data_dir, or NEXHB_DATA_DIR"
    ):
        config.load()
    for name in ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"):
        monkeypatch.setenv(name, "relative")
        with pytest.raises(ConfigError, match=rf"data_dir: \${name} must be an absolute path"):
            config.load()
    monkeypatch.setenv("NEXHB_DATA_DIR", "/srv/nexhb")
    assert config.load().data_dir == Path("/srv/nexhb")


def test_the_settings_know_where_data_dir_comes_from(
    load: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert load("").data_dir_from == "the default for user id 1000"
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/state")
    assert load("").data_dir_from == "the default for user id 1000 with $XDG_STATE_HOME"
    monkeypatch.setenv("STATE_DIRECTORY", "/srv/state")
    assert load("").data_dir_from == "the default for user id 1000 with $STATE_DIRECTORY"
    assert load('data_dir = "/srv/x"').data_dir_from == f"data_dir in {tmp_path / 'given.toml'}"
    monkeypatch.setenv("NEXHB_DATA_DIR", "/srv/y")
    assert load('data_dir = "/srv/x"').data_dir_from == "NEXHB_DATA_DIR"
