"""Settings: a TOML file, the environment over it, defaults under it. Unknown keys and bad values stop the start."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin
from urllib.parse import urlsplit

from croniter import CroniterBadDateError, croniter
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from nexhb import configfile, dburl
from nexhb.configfile import find_file
from nexhb.errors import ConfigError

# The seed's names, and the keys they stand for.
ALIASES = {
    "DATABASE_URL": ("database", "url"),
    "ADMIN_KEY": ("auth", "admin_key"),
    "READ_FROM_LAST_STATUS": ("reads", "from_last_status"),
    "PERF_DIFF_ENABLED": ("reads", "perf_diff"),
}
# Files in $CREDENTIALS_DIRECTORY (systemd's LoadCredential), and the keys they stand for where nothing else sets them.
CREDENTIALS = {"database_url": ("database", "url"), "admin_key": ("auth", "admin_key")}

_UNITS = {
    "s": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")


def parse_duration(value: object) -> object:
    """`7 days`, `5 minutes`, `90s` or a number of seconds → timedelta; anything else is left to be refused."""
    if not isinstance(value, int | float | str):
        return value
    match = _DURATION.fullmatch(str(value).lower())
    unit = match and (match[2] or "s")
    if not match or unit not in _UNITS:
        raise ValueError('takes a duration like "7 days", "5 minutes" or a number of seconds')
    try:
        return timedelta(seconds=float(match[1]) * _UNITS[str(unit)])
    except OverflowError:
        raise ValueError("is longer than can be counted") from None


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]


_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\}|\([^)]*\))")


def _checked(value: object, annotation: Any) -> object:
    """What somebody wrote for a key of this type, before it is converted: one rule for every key of the type, whether
    it stands in the environment or in a file. An empty secret counts as unset. Raises ValueError."""
    types = {annotation, *get_args(annotation)}
    if isinstance(value, bool) and bool not in types:
        raise ValueError("takes no true or false")
    if not isinstance(value, str):
        return value
    if not value.strip():
        if SecretStr in types:
            return None
        raise ValueError("takes at least 1 character that is not a blank")
    return _checked_text(value, types) if types & {str, Path, SecretStr} else value


def _checked_text(value: str, types: set[Any]) -> str:
    if value != value.strip():
        raise ValueError("begins or ends with a blank or a line end")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError("contains a control character")
    # A secret may contain a dollar sign, but is hardly ever the name of a variable.
    if (_VARIABLE.fullmatch if SecretStr in types else _VARIABLE.search)(value):
        raise ValueError("contains a variable such as $NAME, which is not expanded: write the value itself")
    if Path in types and not value.startswith("/"):
        raise ValueError("takes an absolute path" + ("; ~ is not expanded" if value.startswith("~") else ""))
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    may_be_empty: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _one_rule_by_type(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name in cls.may_be_empty and isinstance(value, str) and not value.strip():
            return ""
        return _checked(value, cls.model_fields[str(info.field_name)].annotation)


class Server(_Section):
    """The HTTP side."""

    host: str = Field(default="127.0.0.1", description="address to listen on; loopback unless told otherwise")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port; 0 takes a free one")
    reuse_port: bool = Field(
        default=False,
        description="several daemons share server.port (SO_REUSEPORT), one database.url and one admin key",
    )
    instance_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="a second TCP port, of this daemon alone: behind a shared port any of them answers /metrics",
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
        description="bytes; largest body of POST /v1/heartbeats (500 are 0.6 MB); read in blocks, it costs no memory",
    )
    body_timeout_seconds: float = Field(
        default=10, gt=0, le=60, description="seconds; a body, or 256 kB of a queue, that takes longer is refused (408)"
    )
    shutdown_timeout_seconds: float = Field(
        default=10, gt=0, le=60, description="seconds; how long requests under way may take when the daemon stops"
    )
    head_timeout_seconds: float = Field(
        default=10,
        gt=0,
        le=300,
        description="seconds; a TLS handshake, a request's headers or an answer's reading that take longer are cut off",
    )
    connections_max: int = Field(
        default=20_000,
        ge=10,
        le=1_000_000,
        description="open connections at most (fewer where files are); beyond, the oldest without a key is cut off",
    )
    tls_cert_file: Path | None = Field(
        default=None, description="PEM; with tls_key_file the daemon speaks HTTPS; read again on SIGHUP"
    )
    tls_key_file: Path | None = Field(default=None, description="PEM, not encrypted")
    trusted_proxies: list[IPvAnyNetwork] = Field(
        default=[], description="addresses or networks whose X-Forwarded-For is believed"
    )

    @field_validator("host")
    @classmethod
    def _address_or_name(cls, value: str) -> str:
        if ":" in value:
            with suppress(ValueError):
                ipaddress.IPv6Address(value.strip("[]"))
                return value
        elif re.fullmatch(r"[\w.-]+", value):
            return value
        raise ValueError("takes one address or host name, without scheme or port; 0.0.0.0 is every address")

    @model_validator(mode="after")
    def _both_or_none(self) -> Server:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file are set together or not at all")
        return self


class Database(_Section):
    """Where the heartbeats go."""

    url: SecretStr | None = Field(
        default=None, description="postgresql://…, PostgreSQL 14 or newer; unset: the embedded PostgreSQL in data_dir"
    )
    schema_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        description="schema of nexhb's tables; unset: the one that holds them, whatever the role's search_path says",
    )
    read_pool_size: int = Field(
        default=4,
        ge=1,
        le=100,
        description="connections; reads have a pool of their own, so they never hold up ingest",
    )
    read_timeout_seconds: float = Field(
        default=10, gt=0, le=300, description="seconds; a read that takes longer is cancelled"
    )
    disk_reserve_bytes: int = Field(
        default=2**28,
        ge=2**24,
        description="bytes; with less free on the embedded PostgreSQL's disk, heartbeats are answered 503",
    )
    disk_reserve_inodes: int = Field(
        default=10_000,
        ge=0,
        description="inodes; with fewer free there (or than a twentieth of all, if that is less), likewise",
    )
    accept_unsafe_settings: bool = Field(
        default=False,
        description="serve although fsync or full_page_writes is off: a crash may then lose acknowledged heartbeats",
    )

    @field_validator("url")
    @classmethod
    def _an_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            dburl.parse(value.get_secret_value())
        return value


class Auth(_Section):
    """Keys."""

    admin_key: SecretStr | None = Field(
        default=None,
        description="key for reads and operations; unset: made at first start, kept in data_dir/admin_key (0600)",
    )
    enrolment: Literal["token", "open"] = Field(
        default="token",
        description='"token": only known tokens; "open": a device may register itself with an enrolment key',
    )
    refresh_seconds: float = Field(
        default=300,
        ge=1,
        le=86400,
        description="seconds; the token store is read again this often, should a notification be lost",
    )
    failures_per_minute: int = Field(
        default=60,
        ge=1,
        le=100_000,
        description="calls a minute with a wrong key from one address; five times as many at once; valid keys pass",
    )


class Ingest(_Section):
    """From the socket to the commit."""

    queue_items: int = Field(
        default=10_000,
        ge=1,
        description="heartbeats admitted and unanswered at most: 5 s of work at 2,000/s, half of answer_within_seconds",
    )
    queue_bytes: int = Field(
        default=16_777_216,
        ge=65536,
        description="bytes of bodies admitted and unanswered at most: 10,000 of the agent's 1,200 bytes, and a margin",
    )
    batch_max: int = Field(
        default=2_000,
        ge=1,
        le=50_000,
        description="heartbeats in one transaction at most: about 50 ms of commit on 2 cores",
    )
    bucket_seconds: int = Field(
        default=10, ge=1, le=3600, description="seconds; one row per device and bucket; divides a day"
    )
    answer_within_seconds: float = Field(
        default=10,
        ge=1,
        le=25,
        description="seconds; a heartbeat not committed by then is answered 503; the agent gives up at 30",
    )
    device_per_minute: int = Field(
        default=120,
        ge=1,
        le=1_000_000,
        description="heartbeats a minute of one device in the long run (429 beyond); a healthy one sends one",
    )
    device_burst: int = Field(
        default=1_500,
        ge=500,
        le=1_000_000,
        description="heartbeats of one device at once: an agent's whole queue is 500, and may come again",
    )
    accept_past: Duration = Field(
        default=timedelta(days=7),
        description="how old a heartbeat's own time may be; older ones are stored at the time of receipt",
    )
    accept_future: Duration = Field(
        default=timedelta(minutes=5),
        description="how far ahead a device's clock may be",
    )

    @field_validator("bucket_seconds")
    @classmethod
    def _divides_a_day(cls, value: int) -> int:
        if 86400 % value:
            raise ValueError("must divide a day (86,400 s)")
        return value

    @field_validator("accept_past")
    @classmethod
    def _at_most_60_days(cls, value: timedelta) -> timedelta:
        if value > timedelta(days=60):
            raise ValueError("takes 0 to 60 days")
        return value

    @field_validator("accept_future")
    @classmethod
    def _at_most_a_day(cls, value: timedelta) -> timedelta:
        if value > timedelta(days=1):
            raise ValueError("takes 0 to 1 day")
        return value


class HeartbeatRules(_Section):
    """What is asked of devices, and when they count as gone."""

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
        """Why healthy devices would count as offline; empty where they do not."""
        if self.offline_after_seconds >= 2 * self.interval_seconds:
            return ""
        return (
            f"heartbeat.offline_after_seconds is {self.offline_after_seconds}, less than two intervals of "
            f"{self.interval_seconds} s: a device whose heartbeat is late or lost counts as offline"
        )

    def remedy(self) -> str:
        """What to set instead."""
        return f"set heartbeat.offline_after_seconds to {3 * self.interval_seconds}, three intervals"


class Partitions(_Section):
    """The days."""

    days_ahead: int = Field(default=14, ge=1, le=366, description="days made ahead of today")
    retention_days: int = Field(
        default=90,
        ge=1,
        le=3660,
        description="past days kept in the database; older ones are archived, verified and dropped",
    )


# The names of S3 and of the stores that are like it, and the ARN of an access point.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,255}|arn:aws[\w-]*:s3[\w:./-]*", re.ASCII)


def _refuse_credentials(address: str) -> None:
    # Addresses stand in errors, job_runs and hb_partitions.
    if "@" in address.split("/", maxsplit=1)[0]:
        raise ValueError("takes no credentials; they come the AWS way: AWS_ACCESS_KEY_ID, a profile, a role")


class Archive(_Section):
    """Where days go when they are older than partitions.retention_days. Credentials for S3 come the AWS way."""

    url: str | None = Field(
        default=None, description="file:///an/absolute/folder or s3://bucket/prefix; unset: data_dir/archive"
    )
    endpoint_url: str | None = Field(default=None, description="the S3-compatible store's address; unset: AWS's own")
    region: str | None = Field(
        default=None, pattern=r"^[\w-]+$", description="the bucket's region; unset: as the AWS configuration says"
    )
    addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description='how the bucket is named; "auto": in the path where endpoint_url is set',
    )
    timeout_seconds: float = Field(
        default=600, ge=1, le=86400, description="seconds; longest that one object's way there or back may take"
    )

    @field_validator("url")
    @classmethod
    def _file_or_s3(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, _, rest = value.partition("://")
        if scheme == "file" and rest.startswith("/") and rest.strip("/"):
            return value
        if scheme == "s3" and rest:
            _refuse_credentials(rest)
            _refuse_bucket(rest.partition("/")[0])
            return value
        raise ValueError("takes file:///an/absolute/folder or s3://bucket/prefix")

    @field_validator("endpoint_url")
    @classmethod
    def _an_http_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        _refuse_credentials(value.rpartition("://")[2])
        if not _is_http_address(value):
            raise ValueError("takes https://host or http://host:port")
        return value


def _refuse_bucket(name: str) -> None:
    if not _BUCKET.fullmatch(name):
        raise ValueError("takes s3://bucket/prefix, where the bucket is 3 to 255 letters, digits, dots or hyphens")


def _is_http_address(value: str) -> bool:
    with suppress(ValueError):  # of a port that is not a number, or of a bracket that is not closed
        parts = urlsplit(value)
        host = parts.hostname or ""
        plain = bool(re.fullmatch(r"[\w.-]+", host)) or (":" in host and bool(ipaddress.IPv6Address(host)))
        return parts.scheme in ("http", "https") and plain and parts.port != 0 and not (parts.query or parts.fragment)
    return False


class Jobs(_Section):
    """When the daemon runs its jobs, in UTC. Missed runs are made up at the next start."""

    may_be_empty: ClassVar[frozenset[str]] = frozenset({"nightly", "reconcile"})

    nightly: str = Field(default="0 3 * * *", description="cron expression; empty turns the schedule off")
    reconcile: str = Field(default="5 * * * *", description="cron expression; empty turns the schedule off")
    jitter_seconds: float = Field(
        default=30, ge=0, le=3600, description="seconds; each run starts up to so much later: hosts do not march"
    )

    @field_validator("nightly", "reconcile")
    @classmethod
    def _cron(cls, value: str) -> str:
        if value.strip() and (len(value.split()) != 5 or not croniter.is_valid(value)):
            raise ValueError('takes a cron expression of five fields like "0 3 * * *", or nothing')
        if any(field[0] in "Rr" for field in value.split()):
            raise ValueError("takes no random times: each look would find another")
        try:
            if value.strip():
                croniter(value).get_prev()
        except CroniterBadDateError:
            raise ValueError("names a date that never comes") from None
        return value.strip()


class Reads(_Section):
    """Whether lists and statuses come from device_last_status, or from the history as the old system read it. The first
    three are what the flags are at the very first start; from then on `nexhb flags` switches them."""

    from_last_status: bool = Field(default=True, description="false: every such read is answered from the history")
    rollout_percent: int = Field(
        default=100, ge=0, le=100, description="percent of devices and lists that are answered from device_last_status"
    )
    perf_diff: bool = Field(default=False, description="true: a share of the reads is asked both ways, and compared")
    perf_diff_percent: int = Field(
        default=10,
        ge=1,
        le=100,
        description="percent of reads that perf_diff compares, one at a time; what comes meanwhile is only counted",
    )
    perf_diff_budget: int = Field(
        default=3,
        ge=1,
        le=10_000,
        description="comparisons within an hour, of all daemons, that may differ; with this many, perf_diff turns "
        "read_from_last_status off",
    )
    legacy_pool_size: int = Field(
        default=2,
        ge=1,
        le=20,
        description="connections for reads from the history: each keeps a core busy for seconds, and a third one waits",
    )
    legacy_timeout_seconds: float = Field(
        default=120,
        ge=1,
        le=3600,
        description="seconds; a read from the history that takes longer is cancelled (503); a week of 500 devices "
        "takes 2 to 6, and 90 days thirteen times as long",
    )


class Legacy(_Section):
    """Moving over from NexMDM (docs/moving.md)."""

    source: SecretStr | None = Field(
        default=None,
        description="postgresql://…, NexMDM's database, which is only read: unknown tokens are looked up in it, and "
        "import-legacy takes from it",
    )

    @field_validator("source")
    @classmethod
    def _an_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            dburl.parse(value.get_secret_value())
        return value


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """The data_dir of a daemon or command with these variables that no setting names. Raises ConfigError where there is
    no home directory, or where a variable does not name an absolute path."""
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
            f"data_dir: ${variable} takes an absolute path.", hint="Correct the variable, or set NEXHB_DATA_DIR."
        )
    return Path(folder)


class Settings(BaseSettings):
    """All settings; frozen, made once at the rim."""

    model_config = SettingsConfigDict(env_prefix="NEXHB_", env_nested_delimiter="__", extra="forbid", frozen=True)
    file_values: ClassVar[dict[str, Any]] = {}
    _file: Path | None = PrivateAttr(default=None)

    data_dir: Path = Field(
        default_factory=lambda: default_data_dir(os.environ),
        description="where state lies: $STATE_DIRECTORY, else /var/lib/nexhb as root, else $XDG_STATE_HOME/nexhb, "
        "else ~/.local/state/nexhb",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="log lines below this are dropped"
    )
    server: Server = Field(default=Server())
    database: Database = Field(default=Database())
    auth: Auth = Field(default=Auth())
    ingest: Ingest = Field(default=Ingest())
    heartbeat: HeartbeatRules = Field(default=HeartbeatRules())
    partitions: Partitions = Field(default=Partitions())
    archive: Archive = Field(default=Archive())
    jobs: Jobs = Field(default=Jobs())
    reads: Reads = Field(default=Reads())
    legacy: Legacy = Field(default=Legacy())

    @property
    def archive_url(self) -> str:
        """archive.url, else the folder in data_dir."""
        return self.archive.url or f"file://{self.data_dir.absolute()}/archive"

    @model_validator(mode="after")
    def _days_that_take_heartbeats_stay(self) -> Settings:
        if self.ingest.accept_past > timedelta(days=self.partitions.retention_days):
            raise ValueError("ingest.accept_past is longer than partitions.retention_days: those days are archived")
        return self

    @model_validator(mode="after")
    def _daemons_that_share_a_port_share_a_database(self) -> Settings:
        if self.server.reuse_port and self.database.url is None:
            raise ValueError("server.reuse_port needs database.url: the embedded PostgreSQL belongs to one daemon")
        return self

    @field_validator("data_dir", "log_level", mode="before")
    @classmethod
    def _one_rule_by_type(cls, value: object, info: ValidationInfo) -> object:
        return _checked(value, cls.model_fields[str(info.field_name)].annotation)

    @property
    def file(self) -> Path | None:
        """The configuration file that these settings were read from."""
        return self._file

    @property
    def data_dir_from(self) -> str:
        """Where data_dir comes from, for messages."""
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
        """Arguments, then NEXHB_…, then the seed's names, then the file, then systemd's credentials."""
        sources = (
            env_settings,
            _AliasSource(settings_cls),
            _FileSource(settings_cls),
            _CredentialsSource(settings_cls),
        )
        return (init_settings, *(_NoEmptySecrets(settings_cls, source) for source in sources))


class _NoEmptySecrets(PydanticBaseSettingsSource):
    """Another source without its empty secrets, so that `DATABASE_URL=` does not hide the url of a file."""

    def __init__(self, settings_cls: type[BaseSettings], source: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._source = source

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = self._source()
        for section, key, field in _keys():
            values = found.get(section)
            if SecretStr in get_args(field.annotation) and isinstance(values, dict):
                value = values.get(key)
                if isinstance(value, str) and not value.strip():
                    del values[key]
        return found


class _FileSource(PydanticBaseSettingsSource):
    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(getattr(self.settings_cls, "file_values", {}))


class _AliasSource(PydanticBaseSettingsSource):
    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (section, key) in ALIASES.items():
            if value := os.environ.get(name):
                found.setdefault(section, {})[key] = value
        return found


class _CredentialsSource(PydanticBaseSettingsSource):
    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        for name, (section, key) in CREDENTIALS.items() if folder else ():
            path = Path(str(folder), name)
            try:
                value = path.read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{section}.{key}: {path} cannot be read: {type(error).__name__}.") from None
            if value:  # empty: the unit's own, in place of a file that is not there
                found[section] = {key: value}
        return found


def _keys() -> Iterator[tuple[str, str, Any]]:
    """Section, name and field of every key that stands in a section."""
    for section, outer in Settings.model_fields.items():
        if isinstance(outer.annotation, type) and issubclass(outer.annotation, _Section):
            for key, field in outer.annotation.model_fields.items():
                yield section, key, field


def _refuse_lists() -> None:
    """pydantic-settings would name the section, not the key, of a list in the environment that is not JSON."""
    written = {name.upper(): value for name, value in os.environ.items()}
    for section, key, field in _keys():
        name = f"NEXHB_{section}__{key}".upper()
        if get_origin(field.annotation) is list and name in written:
            with suppress(ValueError):
                if isinstance(json.loads(written[name]), list):
                    continue
            raise ConfigError(f'{section}.{key}: {name} takes a JSON list such as ["10.0.0.0/8", "127.0.0.1"].')


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
    """The settings from `file` (see find_file) and the environment. Raises ConfigError naming each bad key."""
    path = find_file(file)
    if unknown := _unknown_environment():
        raise ConfigError(f"{', '.join(sorted(unknown))}: no such setting.", hint="See config.example.toml.")

    _refuse_lists()

    class FromFile(Settings):
        file_values: ClassVar[dict[str, Any]] = configfile.read(path) if path else {}

    try:
        found = FromFile()
    except SettingsError as error:
        # Its message names the section; the value, which may hold a secret, is not repeated.
        section = re.search(r'field "(\w+)"', str(error))
        name = f"NEXHB_{section[1].upper()}" if section else "A section in the environment"
        raise ConfigError(f"{name} takes JSON.", hint=f"Set its keys one by one: {name}__KEY.") from None
    except ValidationError as error:
        lines = [f"{_key(e['loc'])}: {_reason(dict(e))}" for e in error.errors(include_url=False)]
        raise ConfigError("; ".join(lines) + ".", hint="See config.example.toml.") from None
    found._file = path
    return found


def _key(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "settings"


def _reason(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "no such setting"
    # The value is not repeated: it may be a secret.
    said = str(error["msg"]).removeprefix("Value error, ")
    return said.replace("Input should", "input should", 1)  # names and values keep their case: AWS_ACCESS_KEY_ID
