"""Rivals timed side by side, round by round, so that a disturbance of the machine hits them alike.

Ratios are taken between the fastest rounds: what is left there is least the machine's doing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one rival in each of its rounds."""

    seconds: list[float]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int, bar: tqdm,
               fewer: Mapping[str, int] | None = None) -> dict[str, Times]:
    """Times every call once a round; none is warmed up here. `bar` moves by one a call.

    fewer: how many rounds a slow rival takes part in, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number >= (fewer or {}).get(name, rounds):
                continue
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
            bar.update()
    return {name: Times(taken) for name, taken in seconds.items()}
