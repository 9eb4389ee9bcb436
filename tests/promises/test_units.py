"""The systemd units are valid, restricted to what they need, and have timeouts that match the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nexhb import config, preparation, service, supervision
from nexhb.ingest import connection, writer
from nexhb.postgres import embedded, postmaster

HOUSE = Path(__file__).parents[2]
UNITS = ("nexhb.service", "nexhb@.service")
# Keys that exist since systemd 254, as the unit says; an older systemd-analyze reports them as unknown.
NEWER = re.compile(r".*: Unknown key '(RestartSteps|RestartMaxDelaySec)' in section \[Service\], ignoring\.")

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt-get install systemd"
)


def lines_of(unit: str) -> list[str]:
    """Return the settings of a unit."""
    text = (HOUSE / "packaging" / "systemd" / unit).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def value(key: str, unit: str = "nexhb.service") -> str:
    """Return the single value of a key."""
    [found] = [line.partition("=")[2] for line in lines_of(unit) if line.startswith(f"{key}=")]
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a folder with the units and their program."""
    for unit in UNITS:
        text = (HOUSE / "packaging" / "systemd" / unit).read_text(encoding="utf-8")
        (tmp_path / unit).write_text(text.replace("/opt/nexhb/bin/nexhb", sys.executable))
    return tmp_path


@needs_analyze
@pytest.mark.parametrize("unit", ["nexhb.service", "nexhb@9101.service"])
def test_systemd_analyze_reports_no_error(installed: Path, unit: str) -> None:
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


def test_the_timeouts_of_the_unit_exceed_the_sums_of_the_daemons_timeouts() -> None:
    answers = config.IngestSettings().answer_within_seconds + config.ServerSettings().shutdown_timeout_seconds
    stop = answers + embedded.LOCK_S + sum(seconds for _, seconds in postmaster.STOPS)
    assert float(value("TimeoutStopSec")) >= stop + 10
    assert float(value("TimeoutAbortSec")) >= answers + 10
    assert float(value("WatchdogSec")) > writer.MAX_SILENT_S + supervision.STATUS_S
    assert float(value("TimeoutStartSec")) > preparation.DATABASE_WAIT_S
    assert service.EXTENSION_S > 2 * service.EXTEND_EVERY_S  # one lost extension of the timeout must not end the start
    steps = (writer.ATTEMPT_S + 1, writer.PROBE_S, 4 * connection.STATEMENT_TIMEOUT_S + connection.RECOVER_WAIT_S)
    assert max(steps) + 5 < writer.MAX_SILENT_S


def test_the_units_home_directory_is_accessible_to_its_user() -> None:
    # asyncpg looks for ~/.postgresql at each TCP connection; formerly, it raised PermissionError under ProtectHome.
    assert "Environment=HOME=/var/lib/nexhb" in lines_of("nexhb.service")
    assert value("ProtectHome") == "yes"


def test_a_crash_leaves_no_dump_with_keys_in_it() -> None:
    assert value("LimitCORE") == "0"


def test_an_outage_of_the_database_never_reaches_the_start_limit() -> None:
    each = preparation.DATABASE_WAIT_S + float(value("RestartSec"))
    assert float(value("StartLimitIntervalSec")) / each < int(value("StartLimitBurst"))


def test_the_unit_passes_every_credential_that_the_daemon_reads_and_requires_none() -> None:
    loaded = {line.partition("=")[2].partition(":")[0] for line in lines_of(UNITS[0]) if "LoadCredential=" in line}
    absent = {line.partition("=")[2] for line in lines_of(UNITS[0]) if line.startswith("SetCredential=")}
    assert loaded == {*config.CREDENTIALS, "aws"}
    assert absent == {rf"{name}:\n" for name in loaded}
