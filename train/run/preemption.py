"""Leaving in order when the machine is taken away: SIGTERM ends a run after its step, with a checkpoint."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: it failed for now, and the same command may be given again


class Preemption:
    """While it is entered, SIGTERM does not kill but asks the run to stop.

    With several processes (after `jax.distributed.initialize`), JAX's own service takes the signal of any of them and
    lets all stop after the same step. Enter it in the main thread, as Python allows signal handlers only there.
    """

    def __init__(self):
        self._asked = False
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Preemption:
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """True where the run is to save and leave after this step. Every process asks after every step."""
        return self._asked if self._alone else reached_preemption_sync_point(step)

    def _ask(self, number, frame) -> None:
        self._asked = True


def leave(step: int, folder: str | Path) -> NoReturn:
    """Say where the run stands, and end the process with exit code 75 (`EXIT_CODE`)."""
    print(f"stopped by SIGTERM after step {step}, whose checkpoint is in {folder}; run the same command to go on",
          file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)
