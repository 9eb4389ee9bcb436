"""Messages that named a wrong cause. They were found by running nexhb on misconfigured machines."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from pydantic import SecretStr

from nexhb import config, daemon
from nexhb.cli import config as config_command
from nexhb.cli import serve
from nexhb.config import ArchiveSettings, ServerSettings, Settings
from nexhb.errors import CannotListen, ConfigError, EmbeddedPostgresError
from nexhb.http import server as http_server
from nexhb.http.transport import listening
from nexhb.postgres import embedded, postmaster


async def refusal_of_listening(**server: object) -> str:
    with pytest.raises((CannotListen, ConfigError)) as refused:
        await http_server.listen(None, ServerSettings.model_validate(server), "port")  # type: ignore[arg-type]
    return f"{type(refused.value).__name__} {refused.value}"


async def test_a_listen_error_names_its_cause() -> None:
    """Formerly, the message for each of these errors asked "Is another nexhb running?"."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = await refusal_of_listening(host="127.0.0.1", port=port)
        assert f"server.port {port}: the port is in use by another process. Run `ss -ltnp`" in said
        assert said.startswith("CannotListen")
    said = await refusal_of_listening(host="192.0.2.1", port=8080)
    assert "server.host 192.0.2.1, server.port 8080: this machine does not have this address" in said
    assert "another nexhb" not in said
    assert "the name cannot be resolved" in await refusal_of_listening(host="no.such.host.invalid", port=8080)
    # The test constructs this error, because root may listen on any port.
    refused = listening.listen_error(PermissionError(errno.EACCES, "permission denied"), "0.0.0.0", "port", 80)  # noqa: S104
    assert isinstance(refused, ConfigError)
    assert "server.port 80: this user may not listen on a port below 1024" in str(refused)
    assert "CAP_NET_BIND_SERVICE" in str(refused)


def test_the_error_for_a_data_dir_that_is_a_file_says_so(tmp_path: Path) -> None:
    """Formerly, the message claimed that the user nexhb could not enter a private folder."""
    (tmp_path / "file").touch()
    for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EmbeddedPostgresError, match=r"a file where a folder should be.*Move the file away"):
            embedded.start(data_dir)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, r"data_dir /x: the file system is mounted read-only.*ReadWritePaths="),
        (errno.ENOSPC, r"data_dir /x: no space is left.*Free space"),
        (errno.EACCES, r"data_dir /x: .*Run nexhb as the user who owns data_dir"),
    ],
)
def test_the_error_for_an_unwritable_disk_names_the_cause(number: int, says: str) -> None:
    """Formerly, for a read-only mount or a full disk, the message blamed another user's folder."""
    with pytest.raises(EmbeddedPostgresError, match=says), embedded._translated_os_errors(Path("/x")):
        raise OSError(number, os.strerror(number), "/x/embedded.lock")


@pytest.mark.parametrize(
    "words",
    [
        'FATAL:  could not open shared memory segment "/PostgreSQL.39": No such file or directory',
        'FATAL:  could not resize shared memory segment "/PostgreSQL.39" to 1048576 bytes: No space left on device',
    ],
)
def test_the_error_for_missing_or_full_shared_memory_names_dev_shm(words: str) -> None:
    """Formerly, the message was "No space left on device", so that the operator examined the disk."""
    assert "mount a tmpfs of 64 MB or more there" in postmaster.hint_for(words)
    assert postmaster.hint_for("FATAL:  could not write file: No space left on device") == ""


def test_config_check_reports_errors_that_would_stop_the_start_or_the_nightly_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, `config check` accepted an archive folder below a file, and a database.url whose certificate does not
    exist."""
    (tmp_path / "file").touch()
    none = tmp_path / "no.pem"
    good = Settings(data_dir=tmp_path / "data")
    config_command.check_usable(good)
    for update, says in (
        ({"data_dir": tmp_path / "file"}, r"data_dir: .*/file is not a folder"),
        ({"archive": ArchiveSettings(url=f"file://{tmp_path}/file/archive")}, r"archive\.url: .*/file is not a folder"),
        ({"server": ServerSettings(tls_cert_file=none, tls_key_file=none)}, r"server\.tls_cert_file .*no\.pem"),
        ({"database": config.DatabaseSettings(url=SecretStr("postgresql://n@db/x?sslmode=verify-full&sslrootcert=/no"))},
         "database.url: db:5432: sslrootcert /no does not exist"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            config_command.check_usable(good.model_copy(update=update))
    monkeypatch.setattr(os, "access", lambda path, *_, **__: path != Path("/mnt"))  # root may write to every folder
    archive = ArchiveSettings(url="file:///mnt/not-there/archive")
    with pytest.raises(ConfigError, match=r"archive\.url: /mnt/not-there/.* cannot be created: /mnt cannot be written"):
        config_command.check_usable(good.model_copy(update={"archive": archive}))


def test_the_welcome_for_a_user_without_a_home_directory_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formerly, printing the welcome would have ended a daemon that had started successfully."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    monkeypatch.delenv("HOME", raising=False)
    settings = Settings(data_dir=Path("/mnt/kiosks"))
    running = SimpleNamespace(url="http://127.0.0.1:8080", embedded=True, settings=settings)
    assert "NEXHB_DATA_DIR=/mnt/kiosks" in "\n".join(serve.welcome_lines(cast("daemon.Running", running)))
