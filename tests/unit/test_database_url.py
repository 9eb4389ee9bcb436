"""Parsing database.url, and the error messages for URLs that cannot be used."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from nexhb import config
from nexhb.config import database_url, libpq_files
from nexhb.errors import ConfigError
from nexhb.nexmdm import source
from nexhb.postgres.connections import Database

SECRET = "gEhEim-0123"
PARTS = "gEhEim", "0123"
NAMES = "$PGPASSWORD", "${PGPASSWORD}"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the files and variables of this machine that libpq would read."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("url", "hosts", "user", "password", "database"),
    [
        ("postgresql://db/x", [("db", 5432)], "", "", "x"),
        ("postgres://n:geheim@db:6000/x", [("db", 6000)], "n", "geheim", "x"),
        ("postgresql://n:p%40%2F%3F%23%5B%25%3A%2Bs+t:u@db/x", [("db", 5432)], "n", "p@/?#[%:+s+t:u", "x"),
        ("postgresql://n@db/x?password=a+b%26c", [("db", 5432)], "n", "a+b&c", "x"),
        ("postgresql://a:1,b,[::1]:3/x", [("a", 1), ("b", 5432), ("::1", 3)], "", "", "x"),
        ("postgresql://n@/x?host=%2Ftmp%2Fa%20b&port=7", [("/tmp/a b", 7)], "n", "", "x"),
        ("postgresql://%2Frun%2Fpg:7/x", [("/run/pg", 7)], "", "", "x"),
        ("postgresql://ignored/x?host=a,b&port=1,2", [("a", 1), ("b", 2)], "", "", "x"),
        ("postgresql://db/x?port=7", [("db", 7)], "", "", "x"),
        ("postgresql://db?user=n&dbname=x&options=-cgeqo%3Doff", [("db", 5432)], "n", "", "x"),
        ("postgresql:///x", [], "", "", "x"),
    ],
)
def test_the_parts_are_those_that_libpq_reads(
    url: str, hosts: list[tuple[str, int]], user: str, password: str, database: str
) -> None:
    address = database_url.parse(url)
    assert (list(address.hosts), address.user, address.password, address.database) == (hosts, user, password, database)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"postgresql://n:{SECRET}@x@db.example:5433/x", "db.example:5433: contains a raw @"),
        (f"postgresql://n:{SECRET}/x@db.example:5433/x", "db.example:5433: contains a raw /"),
        (f"postgresql://n:{SECRET}?x@db.example:5433/x", "db.example:5433: contains a raw ?"),
        (f"postgresql://n:{SECRET}#x@db.example:5433/x", "db.example:5433: contains a raw #"),
        (f"postgresql://n:{SECRET}[x@db.example:5433/x", "db.example:5433: contains a raw ["),
        (f"postgresql://n:{SECRET}]x@db.example/x", "db.example:5432: contains a raw ["),
        (f"postgresql://n:1#{SECRET}@db.example:5433/x", "contains a raw #"),
        (f"postgresql://n:1/{SECRET}@db.example:5433/x", "contains a raw /"),
        (f"postgresql://n:1#{SECRET}/x", "contains a raw #"),
        (f"postgresql://n:a?b={SECRET}@db/x", "contains a raw @"),
        (f"postgresql://db/x?password={SECRET}@0123", "contains a raw @"),
        (f"postgresql://n:{SECRET}%x@db.example:5433/x", "db.example:5433: contains a raw %"),
        (f"postgresql://n:{SECRET}%ff@db.example:5433/x", "db.example:5433: contains a percent-encoded byte"),
        (f"postgresql://n:{SECRET} @db.example:5433/x", "db.example:5433: contains a space"),
        (f"postgresql://n:{SECRET}\n@db.example/x", "contains a space or a line break"),
        (f"postgresql://n:{NAMES[0]}@db.example:5433/x", "db.example:5433: contains a variable"),
        (f"postgresql://n:{NAMES[1]}@db.example:5433/x", "db.example:5433: contains a variable"),
        (f"postgresql://n:{SECRET}@$HOST:5433/x", "contains a variable"),
        (f"postgresql://n:{SECRET}/x", "needs a port from 1 to 65535"),
        (f"postgresql://n:{SECRET}@db.example:99999/x", "db.example: needs a port from 1 to 65535"),
        (f"postgresql://n:{SECRET}@[::1/x", "needs a host name or an address"),
        (f"postgresql://n:{SECRET}@a,,b/x", "needs a host name or an address"),
        (f"postgresql+asyncpg://n:{SECRET}@db/x", "not postgresql+asyncpg://"),
        (f"host=db password={SECRET}", "expected postgresql://user:password@host:port/database"),
        (
            f"postgresql://n:{SECRET}@db:6/x?sslmode=verify",
            "db:6: does not support sslmode verify; allowed: disable, allow, ",
        ),
        (f"postgresql://n:{SECRET}@db:6/x?sslmode=", "db:6: does not support sslmode"),
        (f"postgresql://n:{SECRET}@db:6/x?connect_timeout=3", "db:6: does not support connect_timeout: nexhb uses"),
        (f"postgresql://n:{SECRET}@db:6/x?service=x", "db:6: does not support service: write"),
        (f"postgresql://n:{SECRET}@db:6/x?keepalives=1", "db:6: does not support keepalives; supported: database, "),
        (
            f"postgresql://n:{SECRET}@db:6/x?target_session_attrs=standby",
            "db:6: does not support target_session_attrs standby",
        ),
        (f"postgresql://n:{SECRET}@db:6/x?{SECRET}", "db:6: needs KEY=VALUE"),
        (
            f"postgresql://n:{SECRET}@db:6/x?sslnegotiation=x",
            "db:6: does not support sslnegotiation x; allowed: postgres, direct",
        ),
        (
            f"postgresql://n:{SECRET}@db:6/x?ssl_min_protocol_version=1.2",
            "db:6: does not support ssl_min_protocol_version 1.2",
        ),
    ],
)
def test_each_cause_has_its_own_message_with_host_and_port_and_never_the_password(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        database_url.parse(url)
    assert not [part for part in PARTS if part in str(raised.value)]
    with pytest.raises(ValidationError) as refused:
        config.DatabaseSettings(url=SecretStr(url))
    shown = str(refused.value) + repr(refused.value.errors())
    assert not [part for part in PARTS if part in shown]


def test_an_address_or_a_database_that_is_logged_shows_no_password() -> None:
    database = Database(f"postgresql://n:{SECRET}@db/x?sslpassword={SECRET}")
    shown = repr(database) + repr(database.address) + database.address.where
    assert not [part for part in PARTS if part in shown]


# ---- password files ---------------------------------------------------------------------------------------------


@pytest.fixture
def pgpass(tmp_path: Path) -> Callable[[str], Path]:
    """Write a private password file."""

    def write(text: str) -> Path:
        path = tmp_path / ".pgpass"
        path.write_bytes(text.encode())
        path.chmod(0o600)
        return path

    return write


@pytest.mark.parametrize(
    ("line", "password"),
    [
        (r"db:5432:x:n:a\:b\\c", r"a:b\c"),
        (r"db:5432:x:n:a:b", "a:b"),
        (r"*:*:*:*:\\\\", r"\\"),
        (r"*:*:*:*:blank at the end ", "blank at the end "),
        ("*:*:*:*:öffne\r", "öffne"),
        ("db:5433:x:n:wrong\n*:*:*:*:right", "right"),
        ("# db:5432:x:n:comment\n\nnonsense\ndb:5432:x:n:right\n*:*:*:*:later", "right"),
        (r"d\b:5432:x:n:right", "right"),
    ],
)
def test_a_password_file_is_unescaped_as_libpq_does(pgpass: Callable[[str], Path], line: str, password: str) -> None:
    """asyncpg 0.32 keeps `\\:` as it is, doubles backslashes, and strips spaces: each gives a wrong password."""
    pgpass(line)
    assert libpq_files.password(database_url.parse("postgresql://n@db/x")) == password


def test_the_other_fields_are_unescaped_too(pgpass: Callable[[str], Path]) -> None:
    pgpass("db:5432:a\\:b:c\\\\d:right\nlocalhost:5432:x:n:local\n")
    assert libpq_files.password(database_url.parse("postgresql://c%5Cd@db/a%3Ab")) == "right"
    assert libpq_files.password(database_url.parse("postgresql://n@/x?host=/run/postgresql")) == "local"
    assert libpq_files.password(database_url.parse("postgresql://n@other/x")) is None


def test_a_password_file_that_others_may_read_is_ignored_and_an_error_if_it_was_named(
    pgpass: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pgpass("*:*:*:*:secret")
    path.chmod(0o640)
    default, named = (
        database_url.parse("postgresql://n@db/x"),
        database_url.parse(f"postgresql://n@db/x?passfile={path}"),
    )
    assert libpq_files.password(default) is None
    libpq_files.check(default, "database.url")
    with pytest.raises(
        ConfigError, match=r"db:5432: passfile .*\.pgpass is ignored, since other users may read it.*chmod"
    ):
        libpq_files.check(named, "database.url")
    path.chmod(0o600)
    libpq_files.check(named, "database.url")
    monkeypatch.setenv("PGPASSFILE", "/not/there")
    with pytest.raises(ConfigError, match="PGPASSFILE /not/there does not exist"):
        libpq_files.check(default, "database.url")
    monkeypatch.setenv("PGPASSFILE", str(pgpass("other:*:*:*:secret")))
    with pytest.raises(ConfigError, match="has no line for this host, port, database and user"):
        libpq_files.check(default, "database.url")


# ---- certificates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("sslmode=verify-full", "db:5432: sslmode=verify-full needs the CA certificate"),
        ("sslmode=verify-ca", "db:5432: sslmode=verify-ca needs the CA certificate"),
        ("sslmode=verify-full&sslrootcert=/not/there.crt", "sslrootcert /not/there.crt does not exist"),
        ("sslmode=verify-full&sslrootcert=~/ca.crt", "sslrootcert ~/ca.crt does not exist. Paths are absolute"),
        ("sslmode=require&sslrootcert=/not/there.crt", "sslrootcert /not/there.crt does not exist"),
        ("sslmode=verify-full&sslrootcert=system", "sslrootcert system is not supported"),
        ("sslmode=verify-full&sslrootcert=/", "sslrootcert / cannot be read: Is a directory"),
        ("sslmode=verify-full&sslrootcert=/etc/passwd", "sslrootcert /etc/passwd cannot be used"),
        ("sslcert=/not/there.crt", "sslcert /not/there.crt does not exist"),
        ("sslkey=/not/there.key", "sslkey /not/there.key does not exist"),
        ("sslcert=/etc/passwd", "sslcert /etc/passwd, sslkey None cannot be used"),
    ],
)
async def test_an_unusable_certificate_is_named(query: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        await Database(f"postgresql://n@db/x?{query}").connect(application="test")
    off = database_url.parse(f"postgresql://n@db/x?{query}&sslmode=disable")
    libpq_files.check(off, "database.url")


async def test_an_unusable_certificate_in_the_home_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ".postgresql"
    folder.mkdir()
    (folder / "root.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"sslrootcert .*/\.postgresql/root\.crt cannot be used"):
        await Database("postgresql://n@db/x?sslmode=require").connect(application="test")


# ---- variables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("PGSSLMODE", "always", "db:5432: does not support PGSSLMODE always; allowed: disable, allow"),
        ("PGTARGETSESSIONATTRS", "standby", "db:5432: does not support PGTARGETSESSIONATTRS standby; nexhb writes"),
        ("PGSSLNEGOTIATION", "direct", "db:5432: sslnegotiation=direct needs sslmode=require"),
        ("PGSSLROOTCERT", "/not/there", "sslrootcert /not/there does not exist"),
    ],
)
async def test_an_unusable_variable_of_libpq_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    """Formerly, asyncpg's error for the variable was reported as an error in the form of the URL."""
    monkeypatch.setenv(variable, value)
    query = "?sslmode=require" if variable == "PGSSLROOTCERT" else ""
    with pytest.raises(ConfigError, match=re.escape(says)):
        await Database(f"postgresql://n@db/x{query}").connect(application="test")


async def test_the_port_of_the_environment_is_checked_if_the_url_has_no_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPORT", "five")
    with pytest.raises(ConfigError, match="PGPORT needs a port"):
        await Database("postgresql:///x").connect(application="test")


async def test_tls_is_not_used_on_a_socket(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formerly, PGSSLMODE in the environment prevented nexhb from connecting to its embedded PostgreSQL."""
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLNEGOTIATION", "direct")
    database = Database(cluster)
    if database.address.is_local:  # the address is not local if $TEST_DATABASE_URL names a server
        conn = await database.connect(application="test")
        await conn.close()


async def test_the_source_of_an_import_is_checked_alike() -> None:
    with pytest.raises(ConfigError, match="--source: old:5432: contains a raw @"):
        async with source.opened(f"postgresql://n:{SECRET}@x@old/x"):
            pass
