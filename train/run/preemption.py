"""Leaving in order: SIGTERM (the machine is taken away) or Ctrl-C ends a run after its step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
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
    lets all stop after the same step. Enter it in the main thread, as Python allows signal handlers only there.
    """
    signals, several = [], jax.process_count() > 1

    def ask(number, frame):
        if number == signal.SIGINT and signals:
            raise KeyboardInterrupt
        signals.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)  # which JAX's service has taken over

    own = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in own}
    try:
        with _answered_at_once():
            yield reached_preemption_sync_point if several else lambda step: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _answered_at_once() -> Iterator[None]:
    """Ctrl-C is answered by a line, from a thread of its own: Python calls a handler only between two of its own steps,
    and measuring on a CPU may be one step of a minute or more."""
    answers = iter(("stopping after this step and what is being measured or saved, with a checkpoint; once more does "
                    "not wait for that", "stopping as soon as the computation under way returns"))
    heard, woken = os.pipe()
    os.set_blocking(woken, False)  # which `set_wakeup_fd` asks for

    def answer() -> None:
        while number := os.read(heard, 1):
            if number[0] == signal.SIGINT and (line := next(answers, None)):
                print(f"\n{line}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)  # ends the thread
        thread.join()
        os.close(heard)


def leave(step: int, folder: str | Path) -> NoReturn:
    """Say where the run stands, and end the process with exit code 75 (`EXIT_CODE`)."""
    print(f"\nstopped after step {step}, whose checkpoint is in {folder}; run the same command to go on",
          file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)
