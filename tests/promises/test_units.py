"""The systemd units: valid, closed to what they do not need, and with bounds that are the code's own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nexhb import config, daemon, embedded, writer

HOUSE = Path(__file__).parents[2]
UNITS = ("nexhb.service", "nexhb@.service")
# Known to systemd 254 and newer; the unit says so.
NEWER = re.compile(r".*: Unknown key '(RestartSteps|RestartMaxDelaySec)' in section \[Service\], ignoring\.")

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: apt-get install systemd"
)


def lines_of(unit: str) -> list[str]:
    """What it sets."""
    text = (HOUSE / "packaging" / "systemd" / unit).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def value(key: str, unit: str = "nexhb.service") -> str:
    """The one value of a key."""
    [found] = [line.partition("=")[2] for line in lines_of(unit) if line.startswith(f"{key}=")]
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the units, and with a program where they expect one."""
    for unit in UNITS:
        text = (HOUSE / "packaging" / "systemd" / unit).read_text(encoding="utf-8")
        (tmp_path / unit).write_text(text.replace("/opt/nexhb/bin/nexhb", sys.executable))
    return tmp_path


@needs_analyze
@pytest.mark.parametrize("unit", ["nexhb.service", "nexhb@9101.service"])
def test_systemd_finds_nothing_wrong(installed: Path, unit: str) -> None:
    path = installed / unit
    if not path.exists():
        path.symlink_to("nexhb@.service")
    command = ["systemd-analyze", "verify", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=140)
    said = [line for line in found.stderr.splitlines() if "nexhb" in line and not NEWER.fullmatch(line)]
    assert (found.returncode, said) == (0, [])


@needs_analyze
@pytest.mark.parametrize("unit", UNITS)
def test_the_exposure_is_at_most_2(installed: Path, unit: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(installed / unit)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=140)
    assert found.returncode == 0, found.stdout + found.stderr
    figure = re.search(r"Overall exposure level for \S+: ([\d.]+)", found.stdout)
    assert figure
    assert float(figure[1]) <= 2.0


def test_the_template_is_the_unit_but_for_the_ports() -> None:
    one, many = (set(lines_of(unit)) for unit in UNITS)
    assert {line for line in one - many if not line.startswith("Description=")} == set()
    assert {line for line in many - one if not line.startswith("Description=")} == {
        "Conflicts=nexhb.service",
        "Environment=NEXHB_SERVER__REUSE_PORT=true NEXHB_SERVER__INSTANCE_PORT=%i",
    }


def test_its_bounds_are_longer_than_the_sums_of_the_daemons_own() -> None:
    answers = config.Ingest().answer_within_seconds + config.Server().shutdown_timeout_seconds
    stop = answers + embedded.LOCK_S + sum(seconds for _, seconds in embedded.STOPS)
    assert float(value("TimeoutStopSec")) >= stop + 10
    assert float(value("TimeoutAbortSec")) >= answers + 10
    assert float(value("WatchdogSec")) > writer.SILENT_MOST_S + daemon.STATUS_S
    assert float(value("TimeoutStartSec")) > daemon.START_PATIENCE_S
    assert daemon.ASKED_S > 2 * daemon.ASK_S  # one that is lost is no end
    steps = (writer.ATTEMPT_S + 1, writer.PROBE_S, 4 * writer.STATEMENT_TIMEOUT_S + writer.RECOVER_WAIT_S)
    assert max(steps) + 5 < writer.SILENT_MOST_S


def test_its_home_is_one_that_it_may_enter() -> None:
    # asyncpg looks for ~/.postgresql at each connection by TCP, and ended with PermissionError below ProtectHome.
    assert "Environment=HOME=/var/lib/nexhb" in lines_of("nexhb.service")
    assert value("ProtectHome") == "yes"


def test_a_crash_leaves_no_dump_with_keys_in_it() -> None:
    assert value("LimitCORE") == "0"


def test_an_outage_of_the_database_never_reaches_the_start_limit() -> None:
    each = daemon.START_PATIENCE_S + float(value("RestartSec"))
    assert float(value("StartLimitIntervalSec")) / each < int(value("StartLimitBurst"))


def test_every_credential_that_the_daemon_reads_is_handed_to_it_and_none_need_be_there() -> None:
    loaded = {line.partition("=")[2].partition(":")[0] for line in lines_of(UNITS[0]) if "LoadCredential=" in line}
    absent = {line.partition("=")[2] for line in lines_of(UNITS[0]) if line.startswith("SetCredential=")}
    assert loaded == {*config.CREDENTIALS, "aws"}
    assert absent == {rf"{name}:\n" for name in loaded}
