"""What /metrics says: read, subtracted from each other, asked for means and quantiles. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of one moment, or what counters gained between two."""

    samples: Mapping[Key, float]

    def since(self, earlier: Scrape) -> Scrape:
        """What every sample gained; of a gauge that says nothing."""
        return Scrape({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def value(self, name: str) -> float | None:
        """The sum of the samples of this name over their labels; None where there is none."""
        found = [value for (sample, _), value in self.samples.items() if sample == name]
        return sum(found) if found else None

    def mean(self, histogram: str) -> float | None:
        """Of what was observed; None where nothing was."""
        count, total = self.value(f"{histogram}_count"), self.value(f"{histogram}_sum")
        return total / count if count and total is not None else None

    def quantile(self, histogram: str, q: float) -> float | None:
        """As histogram_quantile estimates it: by a straight line within its bucket; the last bound where it lies
        beyond. None where nothing was observed."""
        buckets: dict[float, float] = {}
        for (name, labels), value in self.samples.items():
            if name == f"{histogram}_bucket":
                bound = float(dict(labels)["le"])
                buckets[bound] = buckets.get(bound, 0.0) + value
        bounds = sorted(buckets)
        if not bounds or not buckets[bounds[-1]]:
            return None
        rank, low, below = q * buckets[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            if buckets[bound] >= rank:
                if math.isinf(bound):
                    return low
                inside = buckets[bound] - below
                return low + (bound - low) * (rank - below) / inside if inside else bound
            low, below = bound, buckets[bound]
        return low


def parse(text: str) -> Scrape:
    """The samples of an exposition in Prometheus' text format."""
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )
