"""Load the settings: the environment overrides a TOML file, which overrides the defaults. Unknown keys and
invalid values are errors."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, get_origin

from pydantic import ValidationError
from pydantic_settings import SettingsError

from nexhb.config import file as config_file
from nexhb.config import sources
from nexhb.config.file import find_file
from nexhb.config.settings import Settings
from nexhb.errors import ConfigError


def _check_lists() -> None:
    """Check the lists in the environment, because pydantic-settings does not name the key of a list that is not
    JSON."""
    environment = {name.upper(): value for name, value in os.environ.items()}
    for section, key, field in sources.keys_of(Settings):
        name = f"NEXHB_{section}__{key}".upper()
        if get_origin(field.annotation) is list and name in environment:
            with suppress(ValueError):
                if isinstance(json.loads(environment[name]), list):
                    continue
            raise ConfigError(f'{section}.{key}: {name} must be a JSON list such as ["10.0.0.0/8", "127.0.0.1"].')


def _unknown_environment() -> list[str]:
    sections = set(Settings.model_fields)
    known_whole = {"NEXHB_CONFIG"} | {f"NEXHB_{name.upper()}" for name in sections}
    return [
        name
        for name in os.environ
        if name.startswith("NEXHB_")
        and name not in known_whole
        and not ("__" in name and name.removeprefix("NEXHB_").split("__")[0].lower() in sections)
    ]


def load(file: Path | None = None) -> Settings:
    """Return the settings from the environment and a file (see find_file). Raises ConfigError, which names each bad
    key."""
    path = find_file(file)
    if unknown := _unknown_environment():
        raise ConfigError(f"{', '.join(sorted(unknown))}: no such setting.", hint="See config.example.toml.")

    _check_lists()

    class FromFile(Settings):
        file_values: ClassVar[dict[str, Any]] = config_file.read(path) if path else {}

    try:
        settings = FromFile()
    except SettingsError as error:
        # Only the section is taken from the message, because the value may contain a secret.
        section = re.search(r'field "(\w+)"', str(error))
        name = f"NEXHB_{section[1].upper()}" if section else "A section in the environment"
        raise ConfigError(f"{name} must be JSON.", hint=f"Set its keys one by one: {name}__KEY.") from None
    except ValidationError as error:
        lines = [f"{_key(e['loc'])}: {_reason(dict(e))}" for e in error.errors(include_url=False)]
        raise ConfigError("; ".join(lines) + ".", hint="See config.example.toml.") from None
    settings._file = path
    return settings


def _key(loc: tuple[int | str, ...]) -> str:
    """Return the place of an error as it is written in TOML: `notify.routes[2].secret`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:] or "settings"


def _reason(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "no such setting"
    # The value is not repeated: it may be a secret.
    message = str(error["msg"]).removeprefix("Value error, ")
    return message.replace("Input should", "input should", 1)  # the names of keys keep their case
