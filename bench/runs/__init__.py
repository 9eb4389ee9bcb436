"""Each kind of run is a plan: its fields describe the load, its method `run` returns the finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from bench.finding import Finding

# called with a text that names the next step
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A run as data. The defaults are those of the full run; QUICK has the values that --quick changes."""

    QUICK: ClassVar[Mapping[str, Any]] = {}

    name: str
    title: str

    def quicker(self) -> Self:
        """Return the same run, shorter."""
        return replace(self, **self.QUICK)

    def run(self, say: Say) -> Finding:
        """Run the plan on a daemon of its own and return the finding. Raises StackError if the daemon fails."""
        raise NotImplementedError
