"""Rivals timed side by side, round by round, so that a disturbance of the machine hits them alike; and the machine.

Ratios are taken between the fastest rounds: what is left there is least the machine's doing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.monitoring
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


class Stopwatch:
    """Runs from when it is made; what jax compiles meanwhile, in whatever thread, is told apart."""

    def __init__(self):
        self._compiled, self._begun = sum(_compilations()), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Seconds so far: without compilation, and of compilation alone."""
        compiled = sum(_compilations()) - self._compiled
        return max(time.perf_counter() - self._begun - compiled, 0.0), compiled


@functools.cache
def _compilations() -> list[float]:
    """Of each step of a compilation its seconds, as they come."""
    seconds: list[float] = []

    def hear(event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(hear)
    return seconds


def hardware() -> str:
    """The accelerators, or the processor's name and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that bear on speed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "flax", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
