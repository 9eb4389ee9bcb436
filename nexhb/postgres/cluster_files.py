"""The files of the embedded PostgreSQL's cluster: created by initdb, checked and configured at every start."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nexhb.errors import EmbeddedPostgresError
from nexhb.postgres.account import MAJOR, USER, Account, socket_dir
from nexhb.postgres.sharing import Deadline

# wal_compression stays off: this build has neither lz4 nor zstd. pglz, measured on 2 cores with a checkpoint every
# 100,000 upserts, writes a third less WAL, but needs 45 % more CPU per row and writes 30 % fewer rows a second.
SETTINGS = """\
# Written by nexhb at every start. Put your own settings into postgresql.conf, or use ALTER SYSTEM.
listen_addresses = ''             # no TCP: access only by a socket in a private folder, with peer authentication
port = 5432
unix_socket_directories = '{sockets}'
unix_socket_permissions = 0700
fsync = on                        # with the next two: a 2xx means that the heartbeat is on disk
full_page_writes = on
synchronous_commit = on
max_connections = 60
shared_buffers = 128MB            # holds the end of today's partition and the last status; the daemon needs memory too
max_wal_size = 2GB                # fewer checkpoints, so fewer full-page images in the WAL
checkpoint_timeout = 15min
timezone = 'UTC'
log_timezone = 'UTC'
logging_collector = on            # seven files, one per weekday, each overwritten after a week
log_directory = '../pg-log'
log_filename = 'postgresql-%a.log'
log_rotation_age = 1d
log_rotation_size = 0
log_truncate_on_rotation = on
log_min_error_statement = panic   # statements contain devices' data, and many errors would repeat them
cluster_name = 'nexhb'
"""
POSTGRESQL_CONF = "include_if_exists = 'nexhb.conf'\n# Settings below are yours and kept: they override nexhb.conf.\n"
HBA = "local all nexhb peer map=nexhb\nlocal replication nexhb peer map=nexhb\n"
IDENT = 'nexhb "{owner}" nexhb\nnexhb root nexhb\n'


@dataclass(frozen=True)
class Cluster:
    """A cluster during one start."""

    pgdata: Path
    bin_dir: Path
    account: Account
    deadline: Deadline

    @property
    def log_dir(self) -> Path:
        """Return the folder of PostgreSQL's log files."""
        return self.pgdata.parent / "pg-log"

    def run(self, program: str, *args: str | Path, stdin: str = "") -> None:
        """Run one of PostgreSQL's programs as the account, until the deadline. Raises EmbeddedPostgresError."""
        self.account.run(self.bin_dir / program, *args, stdin=stdin, timeout_s=self.deadline.left_s)


def create(cluster: Cluster) -> None:
    """Run initdb and create the database under a temporary name, so that `pg` is never an incomplete cluster."""
    new = cluster.account.new_folder(cluster.pgdata)
    try:
        cluster.run(
            "initdb", "-D", new, "-U", USER, "--no-sync", "--data-checksums", "--auth-local=peer",
            "--auth-host=reject", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        )  # fmt: skip
        single = ("--single", "-D", new, "-F", "-c", "exit_on_error=on", "postgres")
        cluster.run("postgres", *single, stdin=f"CREATE DATABASE {USER};\n")
        cluster.account.write(new / "postgresql.conf", POSTGRESQL_CONF)
        cluster.run("initdb", "--sync-only", "-D", new)  # the steps above ran without fsync: sync every file now
        new.rename(cluster.pgdata)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    folder = os.open(cluster.pgdata.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def check_owner_and_version(cluster: Cluster) -> None:
    """Raise EmbeddedPostgresError unless the account owns the cluster and this version of PostgreSQL created it."""
    owner, version = cluster.pgdata.stat().st_uid, cluster.pgdata / "PG_VERSION"
    if owner != cluster.account.uid:
        raise EmbeddedPostgresError(
            f"{cluster.pgdata} belongs to user id {owner}, "
            f"nexhb runs as {cluster.account.name} ({cluster.account.uid}).",
            hint="Run nexhb as the user who created it, or choose another data_dir.",
        )
    if not version.exists():
        raise EmbeddedPostgresError(f"{cluster.pgdata} is not a PostgreSQL cluster.", hint="Move it away.")
    if (major := version.read_text().strip()) != MAJOR:
        raise EmbeddedPostgresError(
            f"{cluster.pgdata} was created by PostgreSQL {major}, and this nexhb contains PostgreSQL {MAJOR}.",
            hint=f"Dump it with PostgreSQL {major}, move {cluster.pgdata} away, start nexhb, restore the dump.",
        )


def configure(cluster: Cluster) -> None:
    """Write nexhb's settings, and remove what interrupted starts and earlier versions have left."""
    cluster.account.own_folder(cluster.log_dir)
    sockets = socket_dir(cluster.pgdata.parent, cluster.account)
    cluster.account.write(cluster.pgdata / "nexhb.conf", SETTINGS.format(sockets=sockets))
    cluster.account.write(cluster.pgdata / "pg_hba.conf", HBA)
    cluster.account.write(cluster.pgdata / "pg_ident.conf", IDENT.format(owner=cluster.account.name))
    for pattern in ("pg*.new-*", f"postgresql-{MAJOR}-*"):  # incomplete folders, and copies of an earlier wheel
        for leftover in set(cluster.pgdata.parent.glob(pattern)).difference(cluster.bin_dir.parents):
            shutil.rmtree(leftover, ignore_errors=True)
