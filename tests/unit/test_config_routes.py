"""The routes of messages in the settings: an array of tables."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb import config
from nexhb.cli.config import toml_lines
from nexhb.config import Settings
from nexhb.errors import ConfigError
from nexhb.messages.routes import Route, routes_of
from nexhb.watching.judging import watch_rules
from nexhb.watching.state import Thresholds
from tests.support.receiver import SECRET

Load = Callable[[str], Settings]
HOOK = f'url = "https://hooks.example/geheim"\nsecret = "{SECRET}"\n'
MATCH = "[notify.routes.match]\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load settings from the text of a file."""
    monkeypatch.chdir(tmp_path)

    def load(text: str) -> Settings:
        (tmp_path / "nexhb.toml").write_text(text)
        return config.load()

    return load


def tables(*texts: str) -> str:
    """Return the text of a file with these routes."""
    return "".join(f"[[notify.routes]]\n{text}\n" for text in texts)


def only(settings: Settings) -> Route:
    """Return the only route."""
    (route,) = routes_of(settings)
    return route


def test_a_route_has_a_name_and_a_channel_and_by_default_hears_of_silence_and_of_unity(load: Load) -> None:
    route = only(load(tables('name = "on-call"\n' + HOOK)))
    assert (route.name, route.url, route.secret) == ("on-call", "https://hooks.example/geheim", SECRET)
    assert route.kinds == {"offline", "unity_down"}
    assert route.matches(kind="offline", scope="device", severity="warning", site=None, tags=())
    assert not route.matches(kind="flapping", scope="device", severity="info", site=None, tags=())
    assert not route.matches(kind="disk_low", scope="ours", severity="critical", site=None, tags=())
    assert "geheim" not in repr(route)


def test_a_route_may_be_limited_to_sites_tags_and_severities_and_the_fleet_concerns_all(load: Load) -> None:
    match = '[notify.routes.match]\nsites = ["a"]\ntags = ["till"]\nseverity = "critical"\n'
    route = only(load(tables('name = "x"\nself = true\n' + HOOK + match)))
    matching = {"kind": "offline", "scope": "site", "severity": "critical", "site": "a", "tags": ("till", "old")}
    assert route.matches(**matching)  # type: ignore[arg-type]
    for change in ({"site": "b"}, {"tags": ()}, {"severity": "warning"}, {"kind": "battery_low"}):
        assert not route.matches(**matching | change)  # type: ignore[arg-type]
    assert route.matches(kind="offline", scope="fleet", severity="critical", site=None, tags=())
    assert route.matches(kind="disk_low", scope="ours", severity="critical", site=None, tags=())


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('name = "x"\n' + HOOK.replace("whsec_", "whsec_%"), "notify.routes[1].secret"),
        ('name = "x"\nurl = "https://hooks.example/x"\nsecret = "whsec_c2hvcnQ="', "notify.routes[1].secret"),
        ('name = "x"\nurl = "https://hooks.example/x"', "notify.routes[1].secret"),
        ('name = "x"\nurl = "nonsense://x"', "notify.routes[1].url"),
        ('name = "x"\nurl = "discord://incomplete"', "notify.routes[1].url"),
        ('name = "x"\nurl = "discord"', "notify.routes[1]: url"),
        ('name = "x"', "notify.routes[1]: url"),
        ('name = "x"\n' + HOOK.replace("https", "http"), "notify.routes[1]: url"),
        ('name = "x"\n' + HOOK.replace("hooks.example", "u:p@hooks.example"), "notify.routes[1]: url"),
        ('name = "A B"\n' + HOOK, "notify.routes[1].name"),
        (HOOK, "notify.routes[1].name"),
        ('name = "first"\n' + HOOK, "routes[1].name"),
        ('name = "x"\ncolour = 1\n' + HOOK, "notify.routes[1].colour"),
        ('name = "x"\nreminder_seconds = 5\n' + HOOK, "notify.routes[1].reminder_seconds"),
        ('name = "x"\nquiet_hours = "25:00-x"\n' + HOOK, "notify.routes[1].quiet_hours"),
        ('name = "x"\nquiet_hours = "22:00-06:00"\nquiet_zone = "Mars/Base"\n' + HOOK, "notify.routes[1].quiet_zone"),
        ('name = "x"\n' + HOOK + MATCH + 'kinds = ["offline", "oflline"]', "notify.routes[1].match.kinds[1]"),
        ('name = "x"\n' + HOOK + MATCH + 'severity = "urgent"', "notify.routes[1].match.severity"),
    ],
)  # fmt: skip
def test_an_error_names_the_key_and_repeats_no_secret(load: Load, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        routes_of(load(tables('name = "first"\n' + HOOK, text)))
    assert key in str(caught.value)
    assert "geheim" not in str(caught.value)
    assert SECRET[6:] not in str(caught.value)


def test_an_address_that_chat_services_give_out_needs_no_secret(load: Load) -> None:
    address = "https://discord.com/api/webhooks/123456789012345678/" + "a" * 68
    assert only(load(tables(f'name = "chat"\nurl = "{address}"'))).secret is None


def test_without_apprise_the_error_says_how_to_install_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    settings = load(tables('name = "chat"\nurl = "discord://id/token"'))
    with pytest.raises(ConfigError, match=r"notify\.routes\[0\]\.url.*pip install 'nexhb\[notify\]'"):
        routes_of(settings)
    assert only(load(tables('name = "x"\n' + HOOK))).secret == SECRET


def test_url_and_secret_may_be_credentials(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "route_on-call_url").write_text("https://hooks.example/geheim\n")
    (tmp_path / "route_on-call_secret").write_text(SECRET + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    route = only(load(tables('name = "on-call"')))
    assert (route.url, route.secret) == ("https://hooks.example/geheim", SECRET)


def test_routes_may_come_from_the_environment(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXHB_NOTIFY__ROUTES", f'[{{"name": "x", "url": "https://h.example", "secret": "{SECRET}"}}]')
    assert only(load("")).url == "https://h.example"


def test_config_check_prints_routes_as_toml_without_their_secrets(load: Load) -> None:
    printed = "\n".join(toml_lines(load(tables('name = "on-call"\nself = true\n' + HOOK))))
    (line,) = [line for line in printed.splitlines() if line.startswith("notify.routes")]
    assert line.startswith('notify.routes = [{name = "on-call", url = "**********", secret = "**********", match = ')
    assert "geheim" not in printed
    assert SECRET[6:] not in printed


# ---- thresholds by tag ----------------------------------------------------------------------------------------------


def test_thresholds_of_a_tag_replace_only_what_they_name(load: Load) -> None:
    night = '[[watch.tags]]\ntag = "night"\noffline_after_seconds = 3600\n'
    rules = watch_rules(load(night + '[[watch.tags]]\ntag = "old"\nbattery_low_pct = 5\n'))
    hour, usual = timedelta(hours=1), rules.thresholds
    assert rules.of(["night"]) == Thresholds(hour, usual.battery_low_pct, usual.battery_ok_pct)
    assert rules.of(["old", "x"]) == Thresholds(usual.offline_after, 5, usual.battery_ok_pct)
    assert rules.of([]) == rules.of(["x"]) == usual


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('tag = "a"\nbattery_low_pct = 50', "watch.tags[0].battery_ok_pct must be greater"),
        ('tag = "a"\n[[watch.tags]]\ntag = "a"', 'watch.tags[1].tag: "a" is given twice'),
        ("battery_low_pct = 5", "watch.tags[0].tag"),
        ('tag = "a"\noffline_after_seconds = 0', "watch.tags[0].offline_after_seconds"),
    ],
)
def test_thresholds_of_a_tag_that_are_not_valid_are_named(load: Load, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"[[watch.tags]]\n{text}\n")
    assert says in str(caught.value)
