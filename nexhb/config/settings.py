"""All settings as one immutable value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from nexhb.config import sources, values
from nexhb.config.sections import (
    ArchiveSettings,
    AuthSettings,
    DatabaseSettings,
    EventsSettings,
    HeartbeatSettings,
    IngestSettings,
    JobsSettings,
    LegacySettings,
    NotifySettings,
    PartitionsSettings,
    ReadsSettings,
    ServerSettings,
    UptimeSettings,
    WatchSettings,
)
from nexhb.errors import ConfigError


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """Return the default of data_dir, which depends on these environment variables. Raises ConfigError if there is no
    home directory, or a variable is not an absolute path."""
    if state := environment.get("STATE_DIRECTORY"):
        return _absolute(state.split(":", maxsplit=1)[0], "STATE_DIRECTORY")
    if os.geteuid() == 0:
        return Path("/var/lib/nexhb")
    if base := environment.get("XDG_STATE_HOME"):
        return _absolute(base, "XDG_STATE_HOME") / "nexhb"
    try:
        home = str(Path.home())
    except RuntimeError:
        raise ConfigError(
            f"data_dir: user id {os.geteuid()} has no home directory.", hint="Set data_dir, or NEXHB_DATA_DIR."
        ) from None
    return _absolute(home, "HOME") / ".local" / "state" / "nexhb"


def _absolute(folder: str, variable: str) -> Path:
    if not folder.startswith("/"):
        raise ConfigError(
            f"data_dir: ${variable} must be an absolute path.", hint="Correct the variable, or set NEXHB_DATA_DIR."
        )
    return Path(folder)


class Settings(BaseSettings):
    """All settings: immutable, and loaded once at the start."""

    model_config = SettingsConfigDict(env_prefix="NEXHB_", env_nested_delimiter="__", extra="forbid", frozen=True)
    file_values: ClassVar[dict[str, Any]] = {}  # the content of the configuration file, for FileSource
    _file: Path | None = PrivateAttr(default=None)

    data_dir: Path = Field(
        default_factory=lambda: default_data_dir(os.environ),
        description="folder for all state: $STATE_DIRECTORY, else /var/lib/nexhb as root, else $XDG_STATE_HOME/nexhb, "
        "else ~/.local/state/nexhb",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="log lines below this level are dropped"
    )
    server: ServerSettings = Field(default=ServerSettings())
    database: DatabaseSettings = Field(default=DatabaseSettings())
    auth: AuthSettings = Field(default=AuthSettings())
    ingest: IngestSettings = Field(default=IngestSettings())
    heartbeat: HeartbeatSettings = Field(default=HeartbeatSettings())
    partitions: PartitionsSettings = Field(default=PartitionsSettings())
    archive: ArchiveSettings = Field(default=ArchiveSettings())
    jobs: JobsSettings = Field(default=JobsSettings())
    reads: ReadsSettings = Field(default=ReadsSettings())
    watch: WatchSettings = Field(default=WatchSettings())
    events: EventsSettings = Field(default=EventsSettings())
    notify: NotifySettings = Field(default=NotifySettings())
    uptime: UptimeSettings = Field(default=UptimeSettings())
    legacy: LegacySettings = Field(default=LegacySettings())

    @property
    def archive_url(self) -> str:
        """Return archive.url, else the URL of the folder in data_dir."""
        return self.archive.url or f"file://{self.data_dir.absolute()}/archive"

    @model_validator(mode="after")
    def _check_retention_covers_accept_past(self) -> Settings:
        if self.ingest.accept_past > timedelta(days=self.partitions.retention_days):
            raise ValueError("ingest.accept_past must not exceed partitions.retention_days: older days are archived")
        return self

    @model_validator(mode="after")
    def _check_shared_port_has_shared_database(self) -> Settings:
        if self.server.reuse_port and self.database.url is None:
            raise ValueError("server.reuse_port needs database.url: the embedded PostgreSQL belongs to one daemon")
        return self

    @field_validator("data_dir", "log_level", mode="before")
    @classmethod
    def _check_before_conversion(cls, value: object, info: ValidationInfo) -> object:
        return values.check(value, cls.model_fields[str(info.field_name)].annotation)

    @property
    def file(self) -> Path | None:
        """Return the configuration file of these settings."""
        return self._file

    @property
    def data_dir_from(self) -> str:
        """Return where the value of data_dir comes from, for messages."""
        if any(name.upper() == "NEXHB_DATA_DIR" for name in os.environ):
            return "NEXHB_DATA_DIR"
        if "data_dir" in self.model_fields_set:
            return f"data_dir in {self._file}"
        variable = next((name for name in ("STATE_DIRECTORY", "XDG_STATE_HOME") if os.environ.get(name)), "")
        if variable == "XDG_STATE_HOME" and os.geteuid() == 0:
            variable = ""
        return f"the default for user id {os.geteuid()}" + (f" with ${variable}" if variable else "")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of settings by precedence: arguments, NEXHB_…, old variables, the file, credentials."""
        ordered = (
            env_settings,
            sources.AliasSource(settings_cls),
            sources.FileSource(settings_cls),
            sources.CredentialsSource(settings_cls),
        )
        return (init_settings, *(sources.WithoutEmptySecrets(settings_cls, source) for source in ordered))
