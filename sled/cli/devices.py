"""Options that say on which devices, and in how many processes, a command works."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from typing import Any

import jax

from sled.cli.derived import build, derive, offer, settings_of
from sled.cli.line import dashed
from sled.io import first_line
from sled.models.sharding.mesh import REST, Mesh
from sled.train.parallel.distributed import Processes, check_same_everywhere, initialize

PROCESSES = offer(Processes)
GONE = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "coordination service")  # in what JAX says then


@dataclasses.dataclass(frozen=True)
class ProcessOptions(derive("ProcessFields", *settings_of(PROCESSES))):
    """Several processes that work as one, each started with the same command; scripts/launch_*.sh start them."""

    def join(self, *, saves_when_told: bool = False) -> None:
        """Joins the processes. Only the first one writes to standard output from now on.

        saves_when_told: whether the command itself sees that it is asked to stop; else SIGTERM ends it, as any process.
        """
        processes = build(self, PROCESSES)
        if processes.coordinator:
            print(f"process {processes.index} of {processes.count} waits for the others at {processes.coordinator}",
                  file=sys.stderr)
        initialize(processes)
        if not jax.distributed.is_initialized():
            return
        sys.stdout = os.fdopen(os.dup(1) if first_process() else os.open(os.devnull, os.O_WRONLY), "w")
        os.dup2(2, 1)  # what passes between the processes writes lines of its own to standard output
        if not saves_when_told:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def lost_process(error: Exception) -> str | None:
    """What to say of an error that means that another process of the run has gone; None of any other."""
    if not jax.distributed.is_initialized() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if not any(word in str(error) for word in GONE):
        return None
    return (f"another process of this run has ended, or is out of reach ({first_line(error)}); what it said itself "
            "tells why; start all of them again")


def end_for_all(error: Exception | None = None) -> None:
    """Of several processes, ends this one, which has failed, at once: it would wait for the others at its end, and they
    for it in their next exchange, which so fails too. error: to be shown, with its traceback."""
    if jax.distributed.is_initialized():
        if error is not None:
            traceback.print_exception(error)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


def check_alike(command, **read) -> None:
    """Raises SettingError, in all processes, where one was given other options than the first, or has `read` others."""
    check_same_everywhere(dict(_alike(command)) | read)


def _alike(options) -> list[tuple[str, Any]]:
    """Every option, as one writes it, with its value as text; those of `ProcessOptions` may differ."""
    found = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            found += [] if isinstance(value, ProcessOptions) else _alike(value)
        else:
            found.append((dashed(field.name), repr(value)))
    return found


def mesh_of(*, data: int | None, tensor: int | None, stage: int | None) -> Mesh | None:
    """The mesh that was asked for; over several processes, all their devices, asked for or not."""
    if data is None and tensor is None and stage is None and jax.process_count() == 1:
        return None
    rest = REST if stage in (None, 1) and tensor != REST else 1  # stages decode for one group of rows
    return Mesh(*(usual if asked is None else asked for asked, usual in (
        (data, rest), (None, 1), (tensor, 1), (stage, 1))))


def first_process() -> bool:
    """Whether this is the process that shows how far the work has come, and writes its results."""
    return jax.process_index() == 0


def print_devices() -> None:
    """Says on standard error what the work runs on, with a warning when that is only the CPU."""
    if not first_process():
        return
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"running on {len(devices)} x {', '.join(kinds)}{several} (jax backend: {jax.default_backend()})",
          file=sys.stderr)
    if jax.default_backend() == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        print("warning: no accelerator found, so this runs on the CPU; for a GPU or TPU install jax[cuda13] or "
              "jax[tpu] (JAX_PLATFORMS=cpu silences this)", file=sys.stderr)
