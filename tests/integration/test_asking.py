"""`nexhb status` and `nexhb doctor` reach the daemon of their configuration, whatever it listens on, and say what they
found in the same shape where they do not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from aiohttp import web
from pydantic import SecretStr

from nexhb import __version__, cli, daemon
from nexhb.cli import asking
from nexhb.cli.doctor import daemon_line
from nexhb.config import Database as DatabaseSettings
from nexhb.config import Server, Settings
from nexhb.errors import CannotListen, ConfigError
from tests.conftest import ADMIN_KEY, Nexhb, StartDaemon
from tests.tls import certificate


def settings_of(nexhb: Nexhb, **server: object) -> Settings:
    """The daemon's, with the port that it was given."""
    port = int(nexhb.url.rpartition(":")[2])
    return nexhb.settings.model_copy(
        update={"server": nexhb.settings.server.model_copy(update={"port": port, **server})}
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "[::1]", "localhost"])  # noqa: S104
async def test_the_daemon_is_reached_where_it_listens(start_daemon: StartDaemon, host: str) -> None:
    """`http://::1:8080` is no URL, and nobody answers on `http://:::8080`."""
    nexhb = await start_daemon(server=Server(host=host, port=0))
    heard = await asking.ask(settings_of(nexhb), None, ADMIN_KEY)
    assert (heard.reachable, heard.ready, heard.version, heard.reasons) == (True, True, __version__, [])
    assert heard.fleet["devices"] == 0
    assert daemon_line(heard, configured=True).good


async def test_the_daemons_own_certificate_is_enough_whatever_its_name_and_another_is_not(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    cert, key = certificate(tmp_path / "own", "heartbeats.example")
    other, _ = certificate(tmp_path / "other", "heartbeats.example")
    chained = tmp_path / "chained.pem"  # what follows the daemon's own certificate vouches for nobody
    chained.write_bytes(other.read_bytes() + cert.read_bytes())
    nexhb = await start_daemon(server=Server(port=0, tls_cert_file=cert, tls_key_file=key))
    assert nexhb.url.startswith("https://")
    assert (await asking.ask(settings_of(nexhb), None, ADMIN_KEY)).ready
    assert (await asking.ask(settings_of(nexhb), nexhb.url, ADMIN_KEY)).ready
    for wrong in (other, chained):
        heard = await asking.ask(settings_of(nexhb, tls_cert_file=wrong), None, ADMIN_KEY)
        assert (heard.reachable, "certificate" in heard.reasons[0]) == (False, True)
    assert not (await asking.ask(settings_of(nexhb), nexhb.url.replace("https", "http"), None)).reachable


async def test_what_cannot_be_asked_is_said_and_so_is_what_does_not_suffice(nexhb: Nexhb) -> None:
    right = settings_of(nexhb)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = right.model_copy(update={"server": Server(port=nobody.getsockname()[1])})
        heard = await asking.ask(closed, None)
        line = daemon_line(heard, configured=True)
        assert (line.good, "does not answer" in line.said, "nexhb serve" in line.remedy) == (False, True, True)
    unknown = await asking.ask(right.model_copy(update={"server": Server(port=0)}), None)
    assert (unknown.reachable, "--url" in unknown.reasons[0]) == (False, True)
    assert "error" in (await asking.ask(right, None, "wrong")).fleet
    older = asking.Heard(nexhb.url, True, True, [], "0.0.1")
    assert (daemon_line(older, configured=True).good, "0.0.1" in daemon_line(older, configured=True).said) == (
        False,
        True,
    )
    held = asking.Heard(nexhb.url, True, False, ["The disk is full."], __version__)
    assert (daemon_line(held, configured=True).good, "The disk" in daemon_line(held, configured=True).said) == (
        False,
        True,
    )


async def test_a_key_is_sent_to_nobody_that_the_answer_names(nexhb: Nexhb) -> None:
    """Whatever listens there may lead elsewhere."""
    keys: list[str | None] = []

    async def elsewhere(request: web.Request) -> web.Response:
        keys.append(request.headers.get("x-admin"))
        if request.host.startswith("localhost"):
            return web.json_response({"status": "ok"})
        raise web.HTTPFound(f"http://localhost:{request.url.port}{request.path}")

    app = web.Application()
    app.router.add_get("/{tail:.*}", elsewhere)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        heard = await asking.ask(settings_of(nexhb), site.name, ADMIN_KEY)
    finally:
        await runner.cleanup()
    assert not heard.reachable
    assert len(keys) == 1


async def test_a_start_that_may_go_well_the_next_time_is_no_error_of_the_configuration(nexhb: Nexhb) -> None:
    """A port that was taken for a moment ended with exit code 2, after which systemd gives the daemon up."""
    for server in (settings_of(nexhb).server, Server(host="192.0.2.1", port=0), Server(host="no.such.invalid", port=0)):
        with pytest.raises(CannotListen) as refused:
            await daemon._listen(lambda: pytest.fail("nobody came"), server, "port")
        assert not isinstance(refused.value, ConfigError)
        assert f"server.host {server.host}, server.port {server.port}" in str(refused.value)


def test_status_and_doctor_print_an_object_where_nothing_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.register()
    nowhere = DatabaseSettings(url=SecretStr("postgresql://u@127.0.0.1:1/x"))
    settings = Settings(data_dir=tmp_path, database=nowhere, server=Server(port=1))
    monkeypatch.setattr(cli, "settings", lambda: settings)
    for command in ("status", "doctor"):
        monkeypatch.setattr("sys.argv", ["nexhb", command, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        found = json.loads(capsys.readouterr().out)
        assert found["ready" if command == "status" else "good"] is False
    assert [(line["name"], line["good"]) for line in found["lines"]] == [("daemon", False), ("database", False)]
