"""`nexhb status` and `nexhb doctor` reach the daemon of their configuration, whatever address it listens on; if the
daemon does not answer, they still print JSON of the same form."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from aiohttp import test_utils, web
from pydantic import SecretStr

from nexhb import __version__, cli
from nexhb.cli import daemon_client
from nexhb.cli.daemon_client import DaemonStatus, query_daemon
from nexhb.cli.doctor import check_daemon
from nexhb.config import DatabaseSettings, ServerSettings, Settings
from nexhb.errors import CannotListen, ConfigError
from nexhb.http import server as http_server
from tests.conftest import ADMIN_KEY, Nexhb, StartDaemon
from tests.tls import certificate


def settings_of(nexhb: Nexhb, **server: object) -> Settings:
    """Return the daemon's settings, with the port that it listens on."""
    port = int(nexhb.url.rpartition(":")[2])
    return nexhb.settings.model_copy(
        update={"server": nexhb.settings.server.model_copy(update={"port": port, **server})}
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "[::1]", "localhost"])  # noqa: S104
async def test_commands_reach_the_daemon_at_the_address_on_which_it_listens(
    start_daemon: StartDaemon, host: str
) -> None:
    """`http://::1:8080` is not a valid URL, and nothing listens on `http://:::8080`."""
    nexhb = await start_daemon(server=ServerSettings(host=host, port=0))
    status = await query_daemon(settings_of(nexhb), None, ADMIN_KEY)
    assert (status.reachable, status.ready, status.version, status.reasons) == (True, True, __version__, [])
    assert status.fleet["devices"] == 0
    assert check_daemon(status, configured=True).passed


async def test_the_daemons_own_certificate_is_trusted_whatever_its_name_and_another_is_not(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    cert, key = certificate(tmp_path / "own", "heartbeats.example")
    other, _ = certificate(tmp_path / "other", "heartbeats.example")
    chained = tmp_path / "chained.pem"  # a certificate that follows the daemon's own is not trusted
    chained.write_bytes(other.read_bytes() + cert.read_bytes())
    nexhb = await start_daemon(server=ServerSettings(port=0, tls_cert_file=cert, tls_key_file=key))
    assert nexhb.url.startswith("https://")
    assert (await query_daemon(settings_of(nexhb), None, ADMIN_KEY)).ready
    assert (await query_daemon(settings_of(nexhb), nexhb.url, ADMIN_KEY)).ready
    for wrong in (other, chained):
        status = await query_daemon(settings_of(nexhb, tls_cert_file=wrong), None, ADMIN_KEY)
        assert (status.reachable, "certificate" in status.reasons[0]) == (False, True)
    assert not (await query_daemon(settings_of(nexhb), nexhb.url.replace("https", "http"), None)).reachable


async def test_an_unreachable_daemon_and_an_unsuitable_key_are_reported(nexhb: Nexhb) -> None:
    right = settings_of(nexhb)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = right.model_copy(update={"server": ServerSettings(port=nobody.getsockname()[1])})
        status = await query_daemon(closed, None)
        line = check_daemon(status, configured=True)
        assert (line.passed, "does not answer" in line.detail, "nexhb serve" in line.remedy) == (False, True, True)
    unknown = await query_daemon(right.model_copy(update={"server": ServerSettings(port=0)}), None)
    assert (unknown.reachable, "--url" in unknown.reasons[0]) == (False, True)
    assert "error" in (await query_daemon(right, None, "wrong")).fleet
    older = DaemonStatus(nexhb.url, True, True, [], "0.0.1")
    assert (check_daemon(older, configured=True).passed, "0.0.1" in check_daemon(older, configured=True).detail) == (
        False,
        True,
    )
    held = DaemonStatus(nexhb.url, True, False, ["The disk is full."], __version__)
    assert (check_daemon(held, configured=True).passed, "The disk" in check_daemon(held, configured=True).detail) == (
        False,
        True,
    )


async def test_the_key_is_not_sent_to_the_target_of_a_redirect(nexhb: Nexhb) -> None:
    """Another program may listen on the daemon's port."""
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
        status = await query_daemon(settings_of(nexhb), site.name, ADMIN_KEY)
    finally:
        await runner.cleanup()
    assert not status.reachable
    assert len(keys) == 1


async def test_the_timeout_is_for_the_whole_response(nexhb: Nexhb, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout for each read would never expire while a server sends a byte now and then."""

    asked, ended = asyncio.Event(), asyncio.Event()

    async def respond_slowly(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not asked.is_set():
            writer.write(b"x")
            await asyncio.sleep(0.01)
        writer.close()
        ended.set()

    monkeypatch.setattr(daemon_client, "TIMEOUT_S", 0.5)
    async with await asyncio.start_server(respond_slowly, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        status = await query_daemon(settings_of(nexhb), url)
        asked.set()
        await ended.wait()
    assert (status.reachable, status.reasons) == (False, ["no response within 0.5 s."])


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://127.0.0.1:8080/nexhb"])
async def test_a_url_that_is_not_the_root_of_a_server_is_rejected(nexhb: Nexhb, url: str) -> None:
    status = await query_daemon(settings_of(nexhb), url, ADMIN_KEY)
    assert (status.reachable, "expected a URL" in status.reasons[0]) == (False, True)


async def test_the_user_in_a_url_is_sent_for_a_proxy_before_the_daemon(nexhb: Nexhb) -> None:
    users: list[str | None] = []

    async def proxy(request: web.BaseRequest) -> web.Response:
        users.append(request.headers.get("Authorization"))
        return web.json_response({"ready": True, "reasons": []})

    async with test_utils.RawTestServer(proxy) as server:
        url = str(server.make_url("")).replace("http://", "http://op%40site:geheim@")
        status = await query_daemon(settings_of(nexhb), url)
    assert status.ready
    assert users == ["Basic b3BAc2l0ZTpnZWhlaW0="] * 2


async def test_a_port_that_may_be_free_later_is_not_a_configuration_error(nexhb: Nexhb) -> None:
    """Formerly, a start ended with exit code 2 if its port was in use for a moment; after exit code 2, systemd does not
    restart the daemon."""
    for server in (
        settings_of(nexhb).server,
        ServerSettings(host="192.0.2.1", port=0),
        ServerSettings(host="no.such.invalid", port=0),
    ):
        with pytest.raises(CannotListen) as refused:
            await http_server.listen(lambda: pytest.fail("no client connected"), server, "port")
        assert not isinstance(refused.value, ConfigError)
        assert f"server.host {server.host}, server.port {server.port}" in str(refused.value)


def test_status_and_doctor_print_json_if_the_daemon_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.register()
    nowhere = DatabaseSettings(url=SecretStr("postgresql://u@127.0.0.1:1/x"))
    settings = Settings(data_dir=tmp_path, database=nowhere, server=ServerSettings(port=1))
    monkeypatch.setattr(cli, "settings", lambda: settings)
    for command in ("status", "doctor"):
        monkeypatch.setattr("sys.argv", ["nexhb", command, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        found = json.loads(capsys.readouterr().out)
        assert found["ready" if command == "status" else "good"] is False
    assert [(line["name"], line["good"]) for line in found["lines"]] == [("daemon", False), ("database", False)]
