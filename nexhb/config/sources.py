"""Where settings come from, besides NEXHB_… variables: a file, the old system's variables, systemd's credentials."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from nexhb.config.sections import Section
from nexhb.errors import ConfigError

# The old system's variables, and the keys that they set.
ALIASES = {
    "DATABASE_URL": ("database", "url"),
    "ADMIN_KEY": ("auth", "admin_key"),
    "READ_FROM_LAST_STATUS": ("reads", "from_last_status"),
    "PERF_DIFF_ENABLED": ("reads", "perf_diff"),
}
# Files in $CREDENTIALS_DIRECTORY (systemd's LoadCredential), and the keys that they set unless another source does.
CREDENTIALS = {"database_url": ("database", "url"), "admin_key": ("auth", "admin_key")}


def keys_of(settings_cls: type[BaseSettings]) -> Iterator[tuple[str, str, Any]]:
    """Yield section, name and field of every key in a section."""
    for section, outer in settings_cls.model_fields.items():
        if isinstance(outer.annotation, type) and issubclass(outer.annotation, Section):
            for key, field in outer.annotation.model_fields.items():
                yield section, key, field


class _WholeSource(PydanticBaseSettingsSource):
    """A source that returns all of its values at once. pydantic also requires the method for single fields."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False


class WithoutEmptySecrets(_WholeSource):
    """A source without its empty secrets, so that `DATABASE_URL=` does not hide the URL in a file."""

    def __init__(self, settings_cls: type[BaseSettings], source: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._source = source

    def __call__(self) -> dict[str, Any]:
        values_by_section = self._source()
        for section, key, field in keys_of(self.settings_cls):
            values = values_by_section.get(section)
            if SecretStr in get_args(field.annotation) and isinstance(values, dict):
                value = values.get(key)
                if isinstance(value, str) and not value.strip():
                    del values[key]
        return values_by_section


class FileSource(_WholeSource):
    """The values of the configuration file. Raises ConfigError if the credential of a route cannot be read."""

    def __call__(self) -> dict[str, Any]:
        values = copy.deepcopy(getattr(self.settings_cls, "file_values", {}))
        _route_credentials(values)
        return values


def _route_credentials(values: dict[str, Any]) -> None:
    """Add the credentials of routes that have no url or no secret of their own."""
    routes = values.get("notify", {}).get("routes") if isinstance(values.get("notify"), dict) else None
    for route in routes if isinstance(routes, list) else ():
        name = route.get("name") if isinstance(route, dict) else None
        if isinstance(name, str) and re.fullmatch(r"[a-z0-9_-]{1,50}", name):
            for key in ("url", "secret"):
                if not route.get(key) and (value := _credential(f"route_{name}_{key}", f"notify.routes.{name}.{key}")):
                    route[key] = value


def _credential(name: str, key: str) -> str:
    """Return the content of a file that systemd provides; empty if there is none. Raise ConfigError if it cannot be
    read."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return ""
    path = Path(folder, name)
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {type(error).__name__}.") from None


class AliasSource(_WholeSource):
    """The values of the old system's environment variables."""

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (section, key) in ALIASES.items():
            if value := os.environ.get(name):
                values.setdefault(section, {})[key] = value
        return values


class CredentialsSource(_WholeSource):
    """The values of files that systemd provides. Raises ConfigError if such a file cannot be read."""

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (section, key) in CREDENTIALS.items():
            # The unit provides an empty credential in place of a missing file.
            if value := _credential(name, f"{section}.{key}"):
                values[section] = {key: value}
        return values
