"""The most memory that was taken, as the device or the system counts it."""

from __future__ import annotations

import dataclasses
import sys

import jax

from sled.io import size_in_words


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most bytes that were taken so far, and by what."""

    bytes: int
    by: str

    def __str__(self) -> str:
        return f"{size_in_words(self.bytes)} at most, {self.by}"


def peak_memory() -> Peak | None:
    """Of this process' devices the one that took most, or where they keep no count, of the process; None where nothing
    tells."""
    if all(counted := [device.memory_stats() for device in jax.local_devices()]):
        return Peak(max(of_one["peak_bytes_in_use"] for of_one in counted), "on a device")
    try:
        import resource  # Windows has no such module
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Peak(most if sys.platform == "darwin" else 1024 * most, "by the whole process")
