"""The settings. Other packages import them from here."""

from nexhb.config.load import load
from nexhb.config.sections import (
    ArchiveSettings,
    AuthSettings,
    DatabaseSettings,
    EventsSettings,
    HeartbeatSettings,
    IngestSettings,
    JobsSettings,
    LegacySettings,
    MatchSettings,
    NotifySettings,
    PartitionsSettings,
    ReadsSettings,
    RouteSettings,
    ServerSettings,
    UptimeSettings,
    WatchSettings,
)
from nexhb.config.settings import Settings, default_data_dir
from nexhb.config.sources import ALIASES, CREDENTIALS
from nexhb.config.values import parse_duration

__all__ = [
    "ALIASES",
    "CREDENTIALS",
    "ArchiveSettings",
    "AuthSettings",
    "DatabaseSettings",
    "EventsSettings",
    "HeartbeatSettings",
    "IngestSettings",
    "JobsSettings",
    "LegacySettings",
    "MatchSettings",
    "NotifySettings",
    "PartitionsSettings",
    "ReadsSettings",
    "RouteSettings",
    "ServerSettings",
    "Settings",
    "UptimeSettings",
    "WatchSettings",
    "default_data_dir",
    "load",
    "parse_duration",
]
