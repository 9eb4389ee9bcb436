"""Settings: a TOML file, the environment over it, defaults under it. Unknown keys and bad values stop the start."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from croniter import CroniterBadDateError, croniter
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
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
    TomlConfigSettingsSource,
)

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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("takes no true or false")
        return value


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
    accept_unsafe_settings: bool = Field(
        default=False,
        description="serve although fsync or full_page_writes is off: a crash may then lose acknowledged heartbeats",
    )

    @field_validator("url", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None


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
        default="io.unitynodes.unityapp", min_length=1, max_length=200, description="Android package of the Unity app"
    )


class Partitions(_Section):
    """The days."""

    days_ahead: int = Field(default=14, ge=1, le=366, description="days made ahead of today")
    retention_days: int = Field(
        default=90,
        ge=1,
        le=3660,
        description="past days kept in the database; older ones are archived, verified and dropped",
    )


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
    region: str | None = Field(default=None, description="the bucket's region; unset: as the AWS configuration says")
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
        if not value:
            return None
        scheme, _, rest = value.partition("://")
        if scheme == "file" and rest.startswith("/"):
            return value
        if scheme == "s3" and rest.strip("/"):
            _refuse_credentials(rest)
            return value
        raise ValueError("takes file:///an/absolute/folder or s3://bucket/prefix")

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        _refuse_credentials((value or "").rpartition("://")[2])
        return value


class Jobs(_Section):
    """When the daemon runs its jobs, in UTC. Missed runs are made up at the next start."""

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


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """Where state lies, of a daemon or command with these variables, unless it is told."""
    if state := environment.get("STATE_DIRECTORY"):
        return Path(state.split(":", maxsplit=1)[0])
    if os.geteuid() == 0:
        return Path("/var/lib/nexhb")
    base = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "nexhb"


class Settings(BaseSettings):
    """All settings; frozen, made once at the rim."""

    model_config = SettingsConfigDict(env_prefix="NEXHB_", env_nested_delimiter="__", extra="forbid", frozen=True)

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

    @field_validator("data_dir", mode="before")
    @classmethod
    def _some_folder(cls, value: object) -> object:
        if not str(value).strip():
            raise ValueError("takes a folder")
        return value

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
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings, _AliasSource(settings_cls)]
        file = settings_cls.model_config.get("toml_file")
        if file:
            sources.append(TomlConfigSettingsSource(settings_cls))
        return (*sources, _CredentialsSource(settings_cls))


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


def find_file(argument: Path | None) -> Path | None:
    """`--config`, else $NEXHB_CONFIG, else ./nexhb.toml, else /etc/nexhb/nexhb.toml, else none.

    Raises ConfigError where a named file is not there.
    """
    named = argument or (Path(os.environ["NEXHB_CONFIG"]) if os.environ.get("NEXHB_CONFIG") else None)
    if named:
        if not named.is_file():
            raise ConfigError(f"There is no file {named}.", hint="Name another with --config or $NEXHB_CONFIG.")
        return named
    return next((p for p in (Path("nexhb.toml"), Path("/etc/nexhb/nexhb.toml")) if p.is_file()), None)


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

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    try:
        return FromFile()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    except SettingsError as error:
        # Its message names the section; the value, which may hold a secret, is not repeated.
        section = re.search(r'field "(\w+)"', str(error))
        name = f"NEXHB_{section[1].upper()}" if section else "A section in the environment"
        raise ConfigError(f"{name} takes JSON.", hint=f"Set its keys one by one: {name}__KEY.") from None
    except ValidationError as error:
        lines = [f"{_key(e['loc'])}: {_reason(dict(e))}" for e in error.errors(include_url=False)]
        raise ConfigError("; ".join(lines) + ".", hint="See config.example.toml.") from None


def _key(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "settings"


def _reason(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "no such setting"
    # The value is not repeated: it may be a secret.
    said = str(error["msg"]).removeprefix("Value error, ")
    return said.replace("Input should", "input should", 1)  # names and values keep their case: AWS_ACCESS_KEY_ID
