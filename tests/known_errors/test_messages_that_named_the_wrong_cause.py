"""Found by somebody who read what nexhb says on a machine that is not as it should be: messages named another cause."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from pydantic import SecretStr

from nexhb import config, daemon, embedded
from nexhb.cli import config as config_command
from nexhb.cli import serve
from nexhb.config import Archive, Server, Settings
from nexhb.errors import CannotListen, ConfigError, EmbeddedPostgresError
from nexhb.http import listening


async def refusal_of_listening(**server: object) -> str:
    with pytest.raises((CannotListen, ConfigError)) as refused:
        await daemon._listen(None, Server.model_validate(server), "port")  # type: ignore[arg-type]
    return f"{type(refused.value).__name__} {refused.value}"


async def test_what_cannot_be_listened_on_says_why() -> None:
    """Each was "Is another nexhb running?"."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = await refusal_of_listening(host="127.0.0.1", port=port)
        assert f"server.port {port}: another process listens there. Is another nexhb running?" in said
        assert said.startswith("CannotListen")
    said = await refusal_of_listening(host="192.0.2.1", port=8080)
    assert "server.host 192.0.2.1, server.port 8080: this is not an address of this machine" in said
    assert "another nexhb" not in said
    assert "the name is not known" in await refusal_of_listening(host="no.such.host.invalid", port=8080)
    # root may listen anywhere
    refused = listening.refusal(PermissionError(errno.EACCES, "permission denied"), "0.0.0.0", "port", 80)  # noqa: S104
    assert isinstance(refused, ConfigError)
    assert "server.port 80: this user may not listen on a port below 1024" in str(refused)
    assert "CAP_NET_BIND_SERVICE" in str(refused)


def test_a_file_as_data_dir_is_said_to_be_one(tmp_path: Path) -> None:
    """It was a private folder that the user nexhb could not enter."""
    (tmp_path / "file").touch()
    for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EmbeddedPostgresError, match=r"a file where a folder should be.*Move the file away"):
            embedded.start(data_dir)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, r"data_dir /x: the file system is mounted read-only.*ReadWritePaths="),
        (errno.ENOSPC, r"data_dir /x: no space is left.*Make room"),
        (errno.EACCES, r"data_dir /x: .*Run nexhb as the user to whom data_dir belongs"),
    ],
)
def test_what_the_disk_refuses_says_why(number: int, says: str) -> None:
    """A read-only mount and a full disk were another user's folder."""
    with pytest.raises(EmbeddedPostgresError, match=says), embedded._os_errors_told(Path("/x")):
        raise OSError(number, os.strerror(number), "/x/embedded.lock")


@pytest.mark.parametrize(
    "words",
    [
        'FATAL:  could not open shared memory segment "/PostgreSQL.39": No such file or directory',
        'FATAL:  could not resize shared memory segment "/PostgreSQL.39" to 1048576 bytes: No space left on device',
    ],
)
def test_shared_memory_that_is_missing_or_full_is_said_to_be_dev_shm(words: str) -> None:
    """ "No space left on device" was looked for on the disk."""
    assert "mount a tmpfs of 64 MB or more there" in embedded.hint_of(words)
    assert embedded.hint_of("FATAL:  could not write file: No space left on device") == ""


def test_config_check_refuses_what_the_start_or_the_nightly_run_would_fail_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said yes to an archive folder below a file, and to a database.url whose certificate is not there."""
    (tmp_path / "file").touch()
    none = tmp_path / "no.pem"
    good = Settings(data_dir=tmp_path / "data")
    config_command.refuse_unusable(good)
    for update, says in (
        ({"data_dir": tmp_path / "file"}, r"data_dir: .*/file is not a folder"),
        ({"archive": Archive(url=f"file://{tmp_path}/file/archive")}, r"archive\.url: .*/file is not a folder"),
        ({"server": Server(tls_cert_file=none, tls_key_file=none)}, r"server\.tls_cert_file .*no\.pem"),
        ({"database": config.Database(url=SecretStr("postgresql://n@db/x?sslmode=verify-full&sslrootcert=/no"))},
         "database.url: db:5432: sslrootcert /no is not there"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            config_command.refuse_unusable(good.model_copy(update=update))
    monkeypatch.setattr(os, "access", lambda path, *_, **__: path != Path("/mnt"))  # root may write everywhere
    archive = Archive(url="file:///mnt/not-there/archive")
    with pytest.raises(ConfigError, match=r"archive\.url: /mnt/not-there/.* cannot be made: /mnt cannot be written"):
        config_command.refuse_unusable(good.model_copy(update={"archive": archive}))


def test_the_welcome_of_a_user_without_a_home_directory_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have ended a daemon that had started well."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    monkeypatch.delenv("HOME", raising=False)
    settings = Settings(data_dir=Path("/mnt/kiosks"))
    running = SimpleNamespace(url="http://127.0.0.1:8080", embedded=True, settings=settings)
    assert "NEXHB_DATA_DIR=/mnt/kiosks" in "\n".join(serve.welcome_lines(cast("daemon.Running", running)))
