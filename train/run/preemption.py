"""Leaving in order: SIGTERM (the machine is taken away) or Ctrl-C ends a run after its step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: it failed for now, and the same command may be given again


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """While it is entered, SIGTERM and Ctrl-C do not kill but ask the run to stop: what it gives is true of a step
    after which the run is to save and leave. Every process asks after every step. A second Ctrl-C is a
    KeyboardInterrupt.

    With several processes (after `jax.distributed.initialize`), JAX's own service takes the signal of any of them and
    lets all stop after the same step; Ctrl-C is a KeyboardInterrupt there. Enter it in the main thread, as Python
    allows signal handlers only there.
    """
    if jax.process_count() > 1:
        yield reached_preemption_sync_point
        return
    signals = []

    def ask(number, frame):
        if number == signal.SIGINT and signals:
            raise KeyboardInterrupt
        signals.append(number)
        if number == signal.SIGINT:
            print("\nstopping after this step, with a checkpoint; once more stops at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(step: int, folder: str | Path) -> NoReturn:
    """Say where the run stands, and end the process with exit code 75 (`EXIT_CODE`)."""
    print(f"stopped after step {step}, whose checkpoint is in {folder}; run the same command to go on",
          file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)
