"""config.example.toml shows every key of the settings with its unit and its default.

`python -m tests.promises.test_config_example` writes it anew from the model.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from nexhb import config
from nexhb.config import Settings

FILE = Path(__file__).parents[2] / "config.example.toml"
HEAD = """\
# The file that --config names, else $NEXHB_CONFIG, else ./nexhb.toml, else /etc/nexhb/nexhb.toml, else none at all.
#
# Every key is here, commented out (`#key = …`), with its default. The environment comes before the file:
# server.port is NEXHB_SERVER__PORT, data_dir is NEXHB_DATA_DIR. DATABASE_URL, ADMIN_KEY, READ_FROM_LAST_STATUS and
# PERF_DIFF_ENABLED stand for database.url, auth.admin_key, reads.from_last_status and reads.perf_diff. An unknown key
# or a bad value stops the start. `nexhb config check` shows what it all comes to.
"""
# Keys that are unset unless somebody sets them: what one might look like.
EXAMPLES = {
    "database.url": "postgresql://nexhb@db.example/nexhb",
    "database.schema_name": "nexhb",
    "auth.admin_key": "at-least-32-random-characters-please",
    "server.instance_port": 9101,
    "server.tls_cert_file": "/etc/nexhb/cert.pem",
    "server.tls_key_file": "/etc/nexhb/key.pem",
    "legacy.source": "postgresql://nexhb_import@old-host/nexmdm",
    "archive.url": "s3://bucket/prefix",
    "archive.endpoint_url": "https://s3.example",
    "archive.region": "eu-central-1",
}
NO_DEFAULT = "Unset by default; for example:"
DATA_DIR = "/var/lib/nexhb"  # of a daemon that runs as root, or under the unit that comes with it


def fields(model: type[BaseModel] = Settings, path: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Section, path and field of every key, those without a section first."""
    for name, field in model.model_fields.items():
        if not is_section(field):
            yield path, f"{path}.{name}" if path else name, field
    for name, field in model.model_fields.items():
        if is_section(field):
            assert isinstance(field.annotation, type)
            yield from fields(field.annotation, name)


def is_section(field: FieldInfo) -> bool:
    """True where the field is a table of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def default_of(path: str, field: FieldInfo) -> Any:
    """The default as TOML has it; None where the key is unset."""
    value = DATA_DIR if path == "data_dir" else field.default
    if isinstance(value, timedelta):
        size, unit = next((s, u) for s, u in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
                          if not value % timedelta(seconds=s))  # fmt: skip
        number = value // timedelta(seconds=size)
        return f"{number} {unit}{'s' if number != 1 else ''}"
    return value


def comment(text: str) -> str:
    """As comment lines."""
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 116, break_on_hyphens=False))


def render() -> str:
    """The whole file."""
    text, shown = HEAD, ""
    for section, path, field in fields():
        if section != shown:
            about = Settings.model_fields[section].annotation
            text += f"\n{comment(str(about and about.__doc__))}[{section}]\n"
            shown = section
        default = default_of(path, field)
        text += "\n" + comment(str(field.description))
        if default is None:
            text += comment(NO_DEFAULT)
        value = EXAMPLES[path] if default is None else default
        text += f"#{path.rpartition('.')[2]} = {orjson.dumps(value).decode()}\n"
    return text


def uncommented() -> str:
    """The file with every key in force."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] if line[:1] == "#" and line[1:2].isalpha() else line for line in lines)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the daemon makes of the file once every key is in force."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.toml").write_text(uncommented())
    return config.load(tmp_path / "all.toml")


def test_the_file_is_what_the_model_says() -> None:
    assert FILE.read_text(encoding="utf-8") == render(), "python -m tests.promises.test_config_example writes it anew"


def test_as_it_stands_it_sets_nothing() -> None:
    values = tomllib.loads(FILE.read_text(encoding="utf-8"))
    assert all(section == {} for section in values.values())
    assert set(values) == {name for name, field in Settings.model_fields.items() if is_section(field)}


def test_with_every_key_in_force_nothing_changes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", DATA_DIR)
    found, defaults = settings.model_dump(), Settings().model_dump()
    for path, example in EXAMPLES.items():
        section, _, key = path.partition(".")
        assert defaults[section].pop(key) is None
        value = found[section].pop(key)
        assert str(value.get_secret_value() if isinstance(value, SecretStr) else value) == str(example)
    assert found == defaults


def test_it_shows_every_key_and_no_other() -> None:
    shown = tomllib.loads(uncommented())
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in shown.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert flat == {path for _, path, _ in fields()}


def test_each_key_stands_under_its_description() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    section = ""
    described: dict[str, str] = {}
    above: list[str] = []
    for line in lines:
        if line.startswith("["):
            section = line.strip("[]") + "."
        if line.startswith("# "):
            above.append(line[2:])
            continue
        if line[:1] == "#" and line[1:2].isalpha():
            described[section + line[1:].partition(" =")[0]] = " ".join(above)
        above = []
    for _, path, field in fields():
        assert field.description, f"{path} has no description"
        assert field.description in described[path]


def test_each_number_says_its_unit() -> None:
    units = (
        "second",
        "bytes",
        "day",
        "connections",
        "heartbeats",
        "TCP port",
        "inodes",
        "calls a minute",
        "percent",
        "comparisons",
    )
    for _, path, field in fields():
        if field.annotation in (int, float):
            assert any(unit in str(field.description) for unit in units), path


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
