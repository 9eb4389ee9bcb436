"""Read a daemon's metrics as Prometheus does."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.conftest import ADMIN_KEY, Nexhb


class Scrape:
    """The samples of /metrics at one moment."""

    def __init__(self, text: str) -> None:
        self.types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        self.helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
        self.samples: list[Sample] = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def of(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of this name with these labels."""
        return [s for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of these samples."""
        return sum(sample.value for sample in self.of(name, **labels))


async def scrape(nexhb: Nexhb) -> Scrape:
    """Request /metrics as Prometheus does."""
    async with nexhb.http.get(f"{nexhb.url}/metrics", headers={"x-admin": ADMIN_KEY}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain")
        return Scrape(await response.text())
