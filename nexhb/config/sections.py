"""The sections of the settings: each key with its default, its limits and its description.

This file is long because it is a table: config.example.toml is generated from it."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from croniter import CroniterBadDateError, croniter
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nexhb.config import database_url, values
from nexhb.config.values import Duration


class Section(BaseModel):
    """A section of the settings. `may_be_empty` names the keys that an empty text turns off."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    may_be_empty: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _check_before_conversion(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name in cls.may_be_empty and isinstance(value, str) and not value.strip():
            return ""
        return values.check(value, cls.model_fields[str(info.field_name)].annotation)


class ServerSettings(Section):
    """The HTTP server."""

    host: str = Field(default="127.0.0.1", description="address to listen on; the default is loopback")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port; 0 selects a free one")
    reuse_port: bool = Field(
        default=False,
        description="several daemons share server.port (SO_REUSEPORT), one database.url and one admin key",
    )
    instance_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="a second TCP port, of this daemon alone: on a shared port, any daemon may answer /metrics",
    )
    body_max_bytes: int = Field(
        default=65536,
        ge=1024,
        le=2**24,
        description="bytes; largest body of one heartbeat (the agent's is about 1,200)",
    )
    batch_body_max_bytes: int = Field(
        default=2**26,
        ge=1024,
        le=2**40,
        description="bytes; largest body of POST /v1/heartbeats (500 heartbeats are 0.6 MB); it is read in blocks",
    )
    body_timeout_seconds: float = Field(
        default=10,
        gt=0,
        le=60,
        description="seconds; a body, or 256 kB of a queue, that takes longer is rejected (408)",
    )
    shutdown_timeout_seconds: float = Field(
        default=10, gt=0, le=60, description="seconds; how long running requests may take when the daemon stops"
    )
    head_timeout_seconds: float = Field(
        default=10,
        gt=0,
        le=300,
        description="seconds; timeout for a TLS handshake, a request's headers, and a client's reading of a response",
    )
    connections_max: int = Field(
        default=20_000,
        ge=10,
        le=1_000_000,
        description="limit of open connections (lower if open files are limited); beyond it, the oldest without a "
        "valid key is closed",
    )
    tls_cert_file: Path | None = Field(
        default=None, description="PEM; with tls_key_file the daemon serves HTTPS; read again on SIGHUP"
    )
    tls_key_file: Path | None = Field(default=None, description="PEM, not encrypted")
    trusted_proxies: list[IPvAnyNetwork] = Field(
        default=[], description="addresses or networks whose X-Forwarded-For is trusted"
    )

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if ":" in value:
            with suppress(ValueError):
                ipaddress.IPv6Address(value.strip("[]"))
                return value
        elif re.fullmatch(r"[\w.-]+", value):
            return value
        raise ValueError("must be one address or host name, without scheme or port; 0.0.0.0 is every address")

    @model_validator(mode="after")
    def _check_tls_files(self) -> ServerSettings:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file must be set together")
        return self

    def url(self, port: int) -> str:
        """Return the URL at which a program on this host reaches the daemon if it listens on `port`."""
        host = self.host.strip("[]")
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"http{'s' if self.tls_cert_file else ''}://{shown}:{port}"


class DatabaseSettings(Section):
    """The PostgreSQL that stores the heartbeats."""

    url: SecretStr | None = Field(
        default=None, description="postgresql://…, PostgreSQL 14 or newer; unset: the embedded PostgreSQL in data_dir"
    )
    schema_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        description="schema of nexhb's tables; unset: the schema that has them, whatever the role's search_path is",
    )
    read_pool_size: int = Field(
        default=4,
        ge=1,
        le=100,
        description="connections; reads have their own pool, so they never delay ingest",
    )
    read_timeout_seconds: float = Field(
        default=10, gt=0, le=300, description="seconds; a read that takes longer is cancelled"
    )
    disk_reserve_bytes: int = Field(
        default=2**28,
        ge=2**24,
        description="bytes; if less is free on the embedded PostgreSQL's disk, heartbeats receive 503",
    )
    disk_reserve_inodes: int = Field(
        default=10_000,
        ge=0,
        description="inodes; if fewer are free on the embedded PostgreSQL's disk, heartbeats receive 503; on a small "
        "disk the limit is a twentieth of its inodes",
    )
    accept_unsafe_settings: bool = Field(
        default=False,
        description="serve although fsync or full_page_writes is off: a crash may then lose acknowledged heartbeats",
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            database_url.parse(value.get_secret_value())
        return value


class AuthSettings(Section):
    """Keys and tokens."""

    admin_key: SecretStr | None = Field(
        default=None,
        description="key for reads and operations; unset: generated at the first start, in data_dir/admin_key (0600)",
    )
    enrolment: Literal["token", "open"] = Field(
        default="token",
        description='"token": only known tokens; "open": a device may register itself with an enrolment key',
    )
    refresh_seconds: float = Field(
        default=300,
        ge=1,
        le=86400,
        description="seconds; how often to reload the token store, in case a notification was lost",
    )
    failures_per_minute: int = Field(
        default=60,
        ge=1,
        le=100_000,
        description="limit of requests a minute with a wrong key from one address (burst: five times that); "
        "valid keys are not limited",
    )


class IngestSettings(Section):
    """Ingest, from the socket to the commit."""

    queue_items: int = Field(
        default=10_000,
        ge=1,
        description="limit of admitted, unanswered heartbeats: 5 s of work at 2,000/s, half of answer_within_seconds",
    )
    queue_bytes: int = Field(
        default=16_777_216,
        ge=65536,
        description="limit of bytes in the bodies of admitted, unanswered requests: 10,000 bodies of the "
        "agent's 1,200 bytes, and a margin",
    )
    batch_max: int = Field(
        default=2_000,
        ge=1,
        le=50_000,
        description="limit of heartbeats in one transaction: about 50 ms of commit on 2 cores",
    )
    bucket_seconds: int = Field(
        default=10, ge=1, le=3600, description="seconds; a bucket has one row per device; must divide a day"
    )
    answer_within_seconds: float = Field(
        default=10,
        ge=1,
        le=25,
        description="seconds; a heartbeat not committed within this time receives 503; the agent gives up after 30",
    )
    device_per_minute: int = Field(
        default=120,
        ge=1,
        le=1_000_000,
        description="limit of one device's heartbeats a minute, on average (429 beyond it); a healthy device sends one",
    )
    device_burst: int = Field(
        default=1_500,
        ge=500,
        le=1_000_000,
        description="limit of heartbeats from one device at once: an agent's full queue has 500, and may be sent again",
    )
    accept_past: Duration = Field(
        default=timedelta(days=7),
        description="maximum age of a heartbeat by its own time; older ones are stored at the time of receipt",
    )
    accept_future: Duration = Field(
        default=timedelta(minutes=5),
        description="how far a device's clock may be ahead",
    )

    @field_validator("bucket_seconds")
    @classmethod
    def _check_divides_a_day(cls, value: int) -> int:
        if 86400 % value:
            raise ValueError("must divide a day (86,400 s)")
        return value

    @field_validator("accept_past")
    @classmethod
    def _check_at_most_60_days(cls, value: timedelta) -> timedelta:
        if value > timedelta(days=60):
            raise ValueError("must be 0 to 60 days")
        return value

    @field_validator("accept_future")
    @classmethod
    def _check_at_most_a_day(cls, value: timedelta) -> timedelta:
        if value > timedelta(days=1):
            raise ValueError("must be 0 to 1 day")
        return value


class HeartbeatSettings(Section):
    """The interval of heartbeats, and when a device counts as offline."""

    interval_seconds: int = Field(
        default=60, ge=1, le=86400, description="seconds; sent back as next_heartbeat_seconds"
    )
    offline_after_seconds: int = Field(
        default=600, ge=1, le=366 * 86400, description="seconds of silence after which a device counts as offline"
    )
    unity_package: str = Field(
        default="io.unitynodes.unityapp",
        min_length=1,
        max_length=200,
        pattern=r"^\S+$",
        description="Android package of the Unity app",
    )

    def doubt(self) -> str:
        """Return why healthy devices may count as offline with these settings; empty if they cannot."""
        if self.offline_after_seconds >= 2 * self.interval_seconds:
            return ""
        return (
            f"heartbeat.offline_after_seconds is {self.offline_after_seconds}, less than two intervals of "
            f"{self.interval_seconds} s: a device counts as offline after one late or lost heartbeat"
        )

    def remedy(self) -> str:
        """Return the setting that resolves the problem that `doubt` returns."""
        return f"set heartbeat.offline_after_seconds to {3 * self.interval_seconds}, three intervals"


class PartitionsSettings(Section):
    """The partitions of the history, one per day."""

    days_ahead: int = Field(default=14, ge=1, le=366, description="how many days ahead to create partitions")
    retention_days: int = Field(
        default=90,
        ge=1,
        le=3660,
        description="past days kept in the database; older ones are archived, verified and dropped",
    )


# Bucket names of S3 and of compatible stores, and the ARN of an access point.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,255}|arn:aws[\w-]*:s3[\w:./-]*", re.ASCII)


def _refuse_credentials(address: str) -> None:
    # Credentials would be visible there: the address appears in errors, job_runs and hb_partitions.
    if "@" in address.split("/", maxsplit=1)[0]:
        raise ValueError(
            "must not contain credentials; set them as for any AWS client: AWS_ACCESS_KEY_ID, a profile, a role"
        )


class ArchiveSettings(Section):
    """The archive of days older than partitions.retention_days. S3 credentials are set as for any AWS client."""

    url: str | None = Field(
        default=None, description="file:///an/absolute/folder or s3://bucket/prefix; unset: data_dir/archive"
    )
    endpoint_url: str | None = Field(default=None, description="address of an S3-compatible store; unset: AWS")
    region: str | None = Field(
        default=None, pattern=r"^[\w-]+$", description="the bucket's region; unset: from the AWS configuration"
    )
    addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description='where a request names the bucket; "auto": in the path if endpoint_url is set, else in the host',
    )
    timeout_seconds: float = Field(
        default=600, ge=1, le=86400, description="seconds; timeout for writing or reading one object"
    )

    @field_validator("url")
    @classmethod
    def _check_archive_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, _, rest = value.partition("://")
        if scheme == "file" and rest.startswith("/") and rest.strip("/"):
            return value
        if scheme == "s3" and rest:
            _refuse_credentials(rest)
            _refuse_bucket(rest.partition("/")[0])
            return value
        raise ValueError("must be file:///an/absolute/folder or s3://bucket/prefix")

    @field_validator("endpoint_url")
    @classmethod
    def _check_endpoint_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        _refuse_credentials(value.rpartition("://")[2])
        if not _is_http_address(value):
            raise ValueError("must be https://host or http://host:port")
        return value


def _refuse_bucket(name: str) -> None:
    if not _BUCKET.fullmatch(name):
        raise ValueError("must be s3://bucket/prefix, with a bucket of 3 to 255 letters, digits, dots or hyphens")


def _is_http_address(value: str) -> bool:
    with suppress(ValueError):  # raised if the port is not a number, or a bracket is not closed
        parts = urlsplit(value)
        host = parts.hostname or ""
        plain = bool(re.fullmatch(r"[\w.-]+", host)) or (":" in host and bool(ipaddress.IPv6Address(host)))
        return parts.scheme in ("http", "https") and plain and parts.port != 0 and not (parts.query or parts.fragment)
    return False


class JobsSettings(Section):
    """The schedule of the daemon's jobs, in UTC. A missed run is made up for at the next start."""

    may_be_empty: ClassVar[frozenset[str]] = frozenset({"nightly", "reconcile"})

    nightly: str = Field(default="0 3 * * *", description="cron expression; empty turns the schedule off")
    reconcile: str = Field(default="5 * * * *", description="cron expression; empty turns the schedule off")
    jitter_seconds: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="seconds; each run is delayed at random by up to this time, so that hosts do not start together",
    )

    @field_validator("nightly", "reconcile")
    @classmethod
    def _check_cron(cls, value: str) -> str:
        if value.strip() and (len(value.split()) != 5 or not croniter.is_valid(value)):
            raise ValueError('must be a cron expression of five fields such as "0 3 * * *", or empty')
        if any(field[0] in "Rr" for field in value.split()):
            raise ValueError("must not contain random times, which would differ at each evaluation")
        try:
            if value.strip():
                croniter(value).get_prev()
        except CroniterBadDateError:
            raise ValueError("names a date that never comes") from None
        return value.strip()


class ReadsSettings(Section):
    """Whether reads use device_last_status, or the history as in the old system. The first three keys are the initial
    values of the flags at the very first start; afterwards, `nexhb flags` changes the flags."""

    from_last_status: bool = Field(
        default=True, description="false: offline, unity-down and a device's status are read from the history"
    )
    rollout_percent: int = Field(
        default=100,
        ge=0,
        le=100,
        description="percentage of the devices and lists that are read from device_last_status",
    )
    perf_diff: bool = Field(
        default=False, description="true: a share of the reads is made from both sources, and compared"
    )
    perf_diff_percent: int = Field(
        default=10,
        ge=1,
        le=100,
        description="percentage of reads that perf_diff compares; reads selected during a comparison are only counted",
    )
    perf_diff_budget: int = Field(
        default=3,
        ge=1,
        le=10_000,
        description="number of differing comparisons within an hour, of all daemons, at which perf_diff turns "
        "read_from_last_status off",
    )
    legacy_pool_size: int = Field(
        default=2,
        ge=1,
        le=20,
        description="connections for reads from the history: each keeps a core busy for seconds; further reads wait",
    )
    legacy_timeout_seconds: float = Field(
        default=120,
        ge=1,
        le=3600,
        description="seconds; a read from the history that takes longer is cancelled (503); a week of 500 devices "
        "takes 2 to 6 s, and 90 days thirteen times as long",
    )


class TagThresholds(Section):
    """Thresholds of the devices that have a tag. Of several such tags, the first by name counts."""

    tag: str = Field(min_length=1, max_length=50, description="the tag")
    offline_after_seconds: int | None = Field(
        default=None,
        ge=1,
        le=366 * 86400,
        description="seconds of silence after which such a device is offline; unset: heartbeat.offline_after_seconds",
    )
    battery_low_pct: int | None = Field(default=None, ge=1, le=90, description="percent; unset: watch.battery_low_pct")
    battery_ok_pct: int | None = Field(default=None, ge=2, le=100, description="percent; unset: watch.battery_ok_pct")


class WatchSettings(Section):
    """The watcher, which notices what changed in the fleet, and why."""

    interval_seconds: float = Field(
        default=10, ge=0.05, le=60, description="seconds between two rounds; an outage is noticed within this time"
    )
    battery_low_pct: int = Field(
        default=15, ge=1, le=90, description="percent; a battery is low at this charge or less"
    )
    battery_ok_pct: int = Field(
        default=20, ge=2, le=100, description="percent; a low battery is no longer low at this charge or more"
    )

    tags: list[TagThresholds] = Field(default=[], max_length=100, description="thresholds of devices with a tag")
    ping_url: SecretStr | None = Field(
        default=None,
        description="https://… or http://…, fetched after each good round, for a dead man's switch that notices if "
        "nexhb is gone; it may have a private address",
    )

    @field_validator("ping_url")
    @classmethod
    def _check_ping_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"https?://\S+", value.get_secret_value()):
            raise ValueError("must be https://… or http://…")
        if value is not None and not _is_web_address(value.get_secret_value()):
            raise ValueError("must be the address of a web server, without a user name")
        return value

    @model_validator(mode="after")
    def _check_hysteresis(self) -> WatchSettings:
        if self.battery_ok_pct <= self.battery_low_pct:
            raise ValueError("watch.battery_ok_pct must be greater than watch.battery_low_pct")
        for index, each in enumerate(self.tags):
            low, ok = each.battery_low_pct or self.battery_low_pct, each.battery_ok_pct or self.battery_ok_pct
            if ok <= low:
                raise ValueError(f"watch.tags[{index}].battery_ok_pct must be greater than battery_low_pct")
            if each.tag in {other.tag for other in self.tags[:index]}:
                raise ValueError(f'watch.tags[{index}].tag: "{each.tag}" is given twice')
        return self


class EventsSettings(Section):
    """The record of events."""

    retention_days: int = Field(default=400, ge=1, le=3650, description="days for which events and incidents are kept")


Kind = Literal["offline", "unity_down", "battery_low", "clock_wrong", "token_shared", "flapping"]
Severity = Literal["info", "warning", "critical"]


class MatchSettings(Section):
    """The incidents that a route receives messages about."""

    sites: list[str] = Field(default=[], description="sites; empty: every site, and devices without a site")
    tags: list[str] = Field(default=[], description="tags, of which a device of the incident has one; empty: any")
    kinds: list[Kind] = Field(
        default=["offline", "unity_down"],
        description='kinds; there are "offline", "unity_down", "battery_low", "clock_wrong", "token_shared" and '
        '"flapping"; empty: none, for a route that receives only what self = true adds',
    )
    severity: Severity = Field(
        default="info",
        description='the least severity: "info", "warning" (offline, unity_down), "critical" (a whole site, the fleet)',
    )


class RouteSettings(Section):
    """A route: which messages are sent, and where."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,49}$",
        description="name in metrics and commands: lower-case letters, digits, hyphens and underscores",
    )
    url: SecretStr | None = Field(
        default=None,
        description="with a secret: the https:// address of a webhook; else an Apprise URL such as discord://… or "
        "mailto://…, for which nexhb[notify] has to be installed; unset: the credential route_NAME_url",
    )
    secret: SecretStr | None = Field(
        default=None,
        description='signs the requests to a webhook (Standard Webhooks): "whsec_" and 24 to 64 bytes as base64; '
        "unset: the credential route_NAME_secret",
    )
    match: MatchSettings = Field(
        default=MatchSettings(), description="which incidents this route receives messages about"
    )
    self: bool = Field(
        default=False,
        description="true: also send what concerns nexhb itself, such as an outage or a failed nightly run",
    )
    quiet_hours: str | None = Field(
        default=None,
        description="hours in OpenStreetMap's notation in which nothing is sent; messages about incidents that are "
        "still open are sent at their end",
    )
    quiet_zone: str = Field(default="UTC", description="IANA time zone of quiet_hours")
    reminder_seconds: int = Field(
        default=0,
        ge=0,
        le=30 * 86400,
        description="seconds between two reminders of an incident that nobody has acknowledged; 0: none",
    )
    allow_private: bool = Field(
        default=False,
        description="true: the webhook may have a private, local or loopback address, and may be http://",
    )

    @field_validator("secret")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            size = len(base64.b64decode(value.get_secret_value().removeprefix("whsec_"), validate=True))
        except (binascii.Error, ValueError):
            size = 0
        if not 24 <= size <= 64:
            raise ValueError('must be "whsec_" and 24 to 64 bytes as base64, such as `openssl rand -base64 32` prints')
        return value

    @field_validator("reminder_seconds")
    @classmethod
    def _check_reminder(cls, value: int) -> int:
        if 0 < value < 60:
            raise ValueError("must be 0, or at least 60 seconds")
        return value

    @model_validator(mode="after")
    def _check_url(self) -> RouteSettings:
        if self.url is None:
            raise ValueError("url is required")
        scheme, _, rest = self.url.get_secret_value().partition("://")
        if not (re.fullmatch(r"[a-z0-9]{2,30}", scheme, re.IGNORECASE) and rest):
            raise ValueError("url must be https://…, or an Apprise URL such as discord://…")
        if self.secret is None:
            return self
        if scheme != "https" and not (scheme == "http" and self.allow_private):
            raise ValueError("url must be https://… for a webhook; http:// requires allow_private = true")
        if not _is_web_address(self.url.get_secret_value()):
            raise ValueError("url must be the address of a web server, without a user name")
        return self


def _is_web_address(value: str) -> bool:
    with suppress(ValueError):  # raised if the port is not a number, or a bracket is not closed
        parts = urlsplit(value)
        return bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    return False


class NotifySettings(Section):
    """Messages about incidents (docs/decisions/0015-messages.md)."""

    routes: list[RouteSettings] = Field(default=[], max_length=50, description="where messages are sent, and which")

    @field_validator("routes")
    @classmethod
    def _check_names_differ(cls, value: list[RouteSettings]) -> list[RouteSettings]:
        first: dict[str, int] = {}
        for index, route in enumerate(value):
            if first.setdefault(route.name, index) != index:
                raise ValueError(
                    f'routes[{index}].name: "{route.name}" is also the name of routes[{first[route.name]}]'
                )
        return value


class UptimeSettings(Section):
    """The uptimes of devices."""

    retention_days: int = Field(default=731, ge=31, le=3660, description="days for which uptimes are kept")


class LegacySettings(Section):
    """Migration from NexMDM (docs/moving.md)."""

    source: SecretStr | None = Field(
        default=None,
        description="postgresql://…, NexMDM's database, which nexhb only reads: to look up unknown tokens, and for "
        "import-legacy",
    )

    @field_validator("source")
    @classmethod
    def _check_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            database_url.parse(value.get_secret_value())
        return value
