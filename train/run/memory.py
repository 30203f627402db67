"""The most memory that was taken, as the device or the system counts it."""

from __future__ import annotations

import sys

import jax

from sled.io import size_in_words


def peak_bytes() -> int | None:
    """The most bytes that were taken so far, on a device or, where that keeps no count, by this process; None where
    neither does."""
    if counted := jax.local_devices()[0].memory_stats():
        return counted["peak_bytes_in_use"]
    try:
        import resource  # Windows has no such module
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def peak_in_words(count: int) -> str:
    """So many bytes, and of what: of a device, or of the whole process, with libraries and programs."""
    return f"{size_in_words(count)} at most, {'by the whole process' if jax.default_backend() == 'cpu' else 'a device'}"
