"""config.example.toml shows every key of the settings with its unit and its default.

`python -m tests.promises.test_config_example` generates the file from the model.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from nexhb import config
from nexhb.config import Settings
from nexhb.config.sections import Section

FILE = Path(__file__).parents[2] / "config.example.toml"
HEAD = """\
# nexhb reads the file of --config, else $NEXHB_CONFIG, else ./nexhb.toml, else /etc/nexhb/nexhb.toml, else none.
#
# Every key is here, commented out (`#key = …`), with its default. The environment overrides the file:
# server.port is NEXHB_SERVER__PORT, data_dir is NEXHB_DATA_DIR. DATABASE_URL, ADMIN_KEY, READ_FROM_LAST_STATUS and
# PERF_DIFF_ENABLED set database.url, auth.admin_key, reads.from_last_status and reads.perf_diff. An unknown key or a
# bad value is an error. `nexhb config check` prints the resulting settings.
"""
# Examples for keys without a default.
EXAMPLES = {
    "database.url": "postgresql://nexhb@db.example/nexhb",
    "database.schema_name": "nexhb",
    "auth.admin_key": "at-least-32-random-characters-please",
    "server.instance_port": 9101,
    "server.tls_cert_file": "/etc/nexhb/cert.pem",
    "server.tls_key_file": "/etc/nexhb/key.pem",
    "watch.ping_url": "https://ping.example/3f2b",
    "legacy.source": "postgresql://nexhb_import@old-host/nexmdm",
    "archive.url": "s3://bucket/prefix",
    "archive.endpoint_url": "https://s3.example",
    "archive.region": "eu-central-1",
}
# Values in the example of an array of tables; its other keys show their defaults.
TABLE_EXAMPLES: dict[str, dict[str, Any]] = {
    "notify.routes": {
        "name": "on-call",
        "url": "https://hooks.example/nexhb",
        "secret": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
        "quiet_hours": "22:00-06:00",
    },
    "watch.tags": {"tag": "night", "offline_after_seconds": 3600, "battery_low_pct": 25, "battery_ok_pct": 30},
}
TABLE = "#  "  # what the lines of such an example begin with
NO_DEFAULT = "Unset by default; for example:"
DATA_DIR = "/var/lib/nexhb"  # data_dir of a daemon that runs as root, or by the packaged systemd unit


def fields(model: type[BaseModel] = Settings, path: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield section, path and field of every key, those without a section first."""
    for name, field in model.model_fields.items():
        if not is_section(field):
            yield path, f"{path}.{name}" if path else name, field
    for name, field in model.model_fields.items():
        if is_section(field):
            assert isinstance(field.annotation, type)
            yield from fields(field.annotation, name)


def is_section(field: FieldInfo) -> bool:
    """Return whether the field is a section."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def default_of(path: str, field: FieldInfo) -> Any:
    """Return the default as written in TOML; None if the key is unset."""
    value = DATA_DIR if path == "data_dir" else field.default
    if isinstance(value, timedelta):
        size, unit = next((s, u) for s, u in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
                          if not value % timedelta(seconds=s))  # fmt: skip
        number = value // timedelta(seconds=size)
        return f"{number} {unit}{'s' if number != 1 else ''}"
    return value


def comment(text: str) -> str:
    """Return the text as comment lines."""
    return "".join(f"# {line}\n" for line in textwrap.wrap(" ".join(text.split()), 116, break_on_hyphens=False))


def table_of(field: FieldInfo) -> type[Section] | None:
    """Return the model of the tables if the field is an array of tables."""
    model = next(iter(get_args(field.annotation)), None)
    return model if isinstance(model, type) and issubclass(model, Section) else None


def render_table(path: str, model: type[Section], examples: Mapping[str, Any], heading: str) -> Iterator[str]:
    """Yield the lines of one table."""
    yield heading
    sections = {name: field for name, field in model.model_fields.items() if is_section(field)}
    for name, field in model.model_fields.items():
        if name not in sections:
            yield from comment(str(field.description)).splitlines()
            value = examples.get(name, field.get_default())
            yield f"{name} = {orjson.dumps(value).decode()}"
    for name, field in sections.items():
        yield from ("", *comment(str(field.description)).splitlines())
        assert isinstance(field.annotation, type)
        yield from render_table(f"{path}.{name}", field.annotation, {}, f"[{path}.{name}]")


def render() -> str:
    """Return the whole file."""
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
        if table := table_of(field):
            text += "\n# Such a table, with the default or an example of every key:\n"
            lines = render_table(path, table, TABLE_EXAMPLES[path], f"[[{path}]]")
            text += "".join(f"{TABLE}{line}".rstrip() + "\n" for line in lines)
    return text


def uncommented() -> str:
    """Return the file with every key uncommented."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] if line[:1] == "#" and line[1:2].isalpha() else line for line in lines)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings from the file with every key uncommented."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.toml").write_text(uncommented())
    return config.load(tmp_path / "all.toml")


def test_the_file_is_generated_from_the_model() -> None:
    assert FILE.read_text(encoding="utf-8") == render(), "python -m tests.promises.test_config_example generates it"


def test_the_example_file_changes_no_setting() -> None:
    values = tomllib.loads(FILE.read_text(encoding="utf-8"))
    assert all(section == {} for section in values.values())
    assert set(values) == {name for name, field in Settings.model_fields.items() if is_section(field)}


def test_with_every_key_uncommented_nothing_changes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", DATA_DIR)
    found, defaults = settings.model_dump(), Settings().model_dump()
    for path, example in EXAMPLES.items():
        section, _, key = path.partition(".")
        assert defaults[section].pop(key) is None
        value = found[section].pop(key)
        assert str(value.get_secret_value() if isinstance(value, SecretStr) else value) == str(example)
    assert found == defaults


def test_the_tables_in_the_example_are_valid_and_show_the_defaults(tmp_path: Path) -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    (tmp_path / "tables.toml").write_text(
        "\n".join(line.removeprefix(TABLE) for line in lines if line.startswith(TABLE))
    )
    found = config.load(tmp_path / "tables.toml")
    for path, examples in TABLE_EXAMPLES.items():
        section, _, key = path.partition(".")
        (table,) = getattr(getattr(found, section), key)
        expected = type(table).model_validate(examples)
        assert table == expected


def test_the_example_file_has_every_key_and_no_other() -> None:
    shown = tomllib.loads(uncommented())
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in shown.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert flat == {path for _, path, _ in fields()}


def test_each_key_follows_its_description() -> None:
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


def test_each_number_has_a_unit() -> None:
    units = (
        "second",
        "bytes",
        "day",
        "connections",
        "heartbeats",
        "TCP port",
        "inodes",
        "requests a minute",
        "percent",
        "comparisons",
    )
    for _, path, field in fields():
        if field.annotation in (int, float):
            assert any(unit in str(field.description) for unit in units), path


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
