"""Checkpoints of a training run: saved in the background, whole or not at all, restored exactly and onto any mesh.

A folder of checkpoints holds one folder per step, written by Orbax. A step's folder gets its name when all of it is
on disk, so a kill at any moment leaves the older ones and at most a leftover that is no checkpoint; the next run
removes it. A checkpoint holds

- the state: a pytree of arrays (weights, optimiser, step, keys), each under its name, with a checksum of each;
- the host state: what the loop holds besides, as JSON has it (data position, curricula);
- the settings of the run and the versions it was made with.

The folder lies on a file system where renaming is atomic. Several processes share it, call everything here together,
and hold the same host state.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp

from sled.errors import CheckpointError, SettingError
from sled.io import first_line
from sled.settings.rules import Whole
from sled.train.run.named_arrays import checksums, mismatch, named, rebuilt, targets
from sled.train.run.resume import Rule, check_resumable

FORMAT = 3  # of what is written here; raised when another sled could not read it
WRITTEN = 2**28  # bytes that are written at a time, if an array has no more
_DROPPED = "dropped-"
PACKAGES = ("sled-jax", "jax", "flax", "optax", "orbax-checkpoint")


class Restored(NamedTuple):
    """A checkpoint: the state as asked for, and what was saved beside it."""

    step: int
    state: Any
    host: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]


def complete_steps(folder: str | Path) -> list[int]:
    """The steps whose checkpoints are whole, ascending; none for a folder that is not there."""
    folder = Path(folder)
    held = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in held if entry.name.isdecimal() and entry.is_dir())


def check_format(folder: str | Path, step: int | None = None) -> None:
    """Raises CheckpointError where the checkpoint of `step`, or the latest, has another format or is damaged."""
    folder = Path(folder).absolute()
    _metadata(folder / str(_choose(folder, step)))


def load_checkpoint(folder: str | Path, like, step: int | None = None, *, partial: bool = False) -> Restored:
    """The checkpoint of `step`, or the latest; reads only, so the run that owns the folder may go on meanwhile.

    like: the state's pytree, of arrays or of `jax.ShapeDtypeStruct`s, which take no memory. Every array comes back
    with the sharding of its leaf, on whatever mesh that is (without one: on the default device), bit for bit as it was
    saved.
    partial: whether `like` may be a part of the state at its top, such as {"weights": ...}; nothing else is read.
    Raises CheckpointError for a folder without checkpoints or without this one, for one of another format, for another
    model's (names, shapes and types are compared before anything is read), and for damage.
    """
    folder = Path(folder).absolute()
    at = folder / str(_choose(folder, step))
    about, saved = _metadata(at)
    wanted = named(like)
    held = _read(at, lambda: named(about.metadata["state"]["arrays"]))
    parts = {name.partition("/")[0] for name in (wanted if partial else held)}
    stored = {name: leaf for name, leaf in held.items() if name.partition("/")[0] in parts}
    if different := mismatch(stored, wanted):
        raise CheckpointError(f"{at} holds the state of another model or optimiser: {different}; give the settings "
                              "it was made with, or another folder")
    abstract, whole = targets(wanted)
    sums = jax.ShapeDtypeStruct((len(held),), "uint32", sharding=whole)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        loaded = _read(at, lambda: ocp.load(at, {"arrays": unflatten_dict(abstract, sep="/"), "checksums": sums}))
    arrays = named(loaded["arrays"])
    found, expected = jax.device_get((checksums(arrays), loaded["checksums"]))
    expected = [total for name, total in zip(sorted(held), expected, strict=True) if name in arrays]
    if wrong := [name for name, a, b in zip(sorted(arrays), found, expected, strict=True) if a != b]:
        raise _damaged(at, f"{', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} not what was saved")
    return Restored(int(at.name), rebuilt(like, arrays), saved["host"], saved["settings"], saved["versions"])


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints that a run writes to its folder; a context manager.

    folder: made if missing; belongs to this run alone, and is cleaned of what a killed one left half-written.
    settings: all that decides what the run computes, as JSON has it.
    save_every: steps between two checkpoints. keep: how many of the latest stay.
    may_change, follow: which of the settings a resumed run may change, each with its rule, and which change because
        others do (`sled.train.run.resume`).
    Raises CheckpointError where the folder cannot be written, SettingError for a setting out of range.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, save_every: int, keep: int = 3,
                 may_change: Mapping[str, Rule] | None = None, follow: Mapping[str, Sequence[str]] | None = None):
        self.save_every = Whole(1, hint="it is the steps between two checkpoints")("save_every", save_every)
        self.keep = Whole(1, hint="it counts the latest checkpoints, which stay")("keep", keep)
        self.folder = Path(folder).absolute()
        self.settings = _as_json("settings", settings)
        self.may_change, self.follow = dict(may_change or {}), dict(follow or {})
        self._make_folder()
        self._checkpointer = ocp.training.Checkpointer(self.folder, cleanup_tmp_directories=True)
        self._written = complete_steps(self.folder)
        self._under_way: int | None = None
        self._trash = ThreadPoolExecutor(1)

    @property
    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole, ascending."""
        return complete_steps(self.folder)

    def restore(self, like) -> Restored:
        """The latest, as `load_checkpoint`; before that, CheckpointError where settings differ that may not."""
        step = _choose(self.folder, None)
        _, saved = _metadata(self.folder / str(step))
        check_resumable(f"{self.folder}", saved["settings"], self.settings, step, self.may_change, self.follow)
        return load_checkpoint(self.folder, like, step)

    def save(self, step: int, state, host: Mapping[str, Any], *, force: bool = False) -> bool:
        """Begin to save step `step` where its turn has come, or by `force`; returns whether it is, or was, saved.

        Returns once the state is copied off the devices, so the next step may give it up; on CPUs, whose memory a copy
        would take as well, once it is written. First waits for the
        checkpoint before, of which one is thus never skipped.
        state: a pytree of jax arrays. host: comes back as it is, so only what JSON has (no tuples, no arrays).
        Raises CheckpointError where this checkpoint or the one before cannot be written, or where there is one of a
        later step.
        """
        if not (force or step % self.save_every == 0):
            return False
        self.wait()
        if step in self._written:
            return True
        if self._written and step < self._written[-1]:
            raise CheckpointError(f"{self.folder} holds a checkpoint of step {self._written[-1]}, so step {step} is of "
                                  "another run or of a repeated part of this one; give another folder, or remove the "
                                  "checkpoints of the later steps")
        self._drop_superseded()
        if (kept := _as_json("host", host)) != host:
            raise SettingError(f"host is {host!r}, but would come back as {kept!r}; give only dicts with names as "
                               "keys, lists, numbers, strings, booleans and None")
        arrays = named(state)
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        about = {"format": FORMAT, "host": kept, "settings": self.settings, "versions": versions}
        saved = {"arrays": unflatten_dict(arrays, sep="/"), "checksums": checksums(arrays)}
        self._under_way = step
        context = ocp.Context()  # what is being written is held a second time meanwhile
        context.memory.write_concurrent_bytes = max(WRITTEN, *(1 + array.nbytes for array in arrays.values()))
        with self._write_errors(), context:
            self._checkpointer.save_async(step, saved, force=True, custom_metadata=about)
        if jax.default_backend() == "cpu":
            self.wait()
        return True

    def wait(self) -> None:
        """Return once the checkpoint under way is whole. Raises CheckpointError where it could not be written."""
        if self._under_way is None:
            return
        with self._write_errors():
            self._checkpointer.wait()
        self._written.append(self._under_way)
        self._under_way = None

    def close(self) -> None:
        """Finish what is under way. Raises CheckpointError where that cannot be written."""
        try:
            self.wait()
            self._drop_superseded()
            self._checkpointer.close()
        finally:
            self._trash.shutdown()

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # asking for permissions would not tell a read-only disk
            if jax.process_index() == 0:
                for left in self.folder.glob(f"{_DROPPED}*"):
                    shutil.rmtree(left)
        except OSError as reason:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder} ({reason.strerror}); give a folder "
                                  "of your own") from reason

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns whatever goes wrong within into a CheckpointError that names the step under way."""
        try:
            yield
        except Exception as error:
            step, self._under_way = self._under_way, None
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({_reason(error)}); the older ones "
                "are whole: make room or take another disk, and run again") from error

    def _drop_superseded(self) -> None:
        """Renamed first, at once: what a kill leaves of a removal is no checkpoint.

        Orbax's own `preservation_policy` removes a checkpoint under its own name, and still counts what a kill left.
        """
        dropped, self._written = self._written[:-self.keep], self._written[-self.keep:]
        for step in dropped:
            if jax.process_index() == 0:
                gone = (self.folder / str(step)).rename(self.folder / f"{_DROPPED}{step}")
                self._trash.submit(shutil.rmtree, gone)


def _choose(folder: Path, step: int | None) -> int:
    steps = complete_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no checkpoint; give the folder of a run that saved one, or start anew")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; it holds those of "
                              f"{', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _metadata(at: Path) -> tuple[Any, dict[str, Any]]:
    """Orbax's own and ours."""
    about = _read(at, lambda: ocp.checkpointables_metadata(at))
    saved = about.custom_metadata or {}
    if not isinstance(saved.get("format"), int):
        raise _damaged(at, "it lacks the record of a training run, unless something else wrote it")
    if saved["format"] != FORMAT:
        which = "a newer" if saved["format"] > FORMAT else "an older"
        raise CheckpointError(f"{at} has format {saved['format']}, but this sled reads format {FORMAT}; {which} sled "
                              "wrote it: install that one")
    return about, saved


def _read(at: Path, read):
    """Orbax and TensorStore raise many kinds of errors, bare Exception among them, for files that are damaged."""
    try:
        return read()
    except Exception as error:
        raise _damaged(at, _reason(error)) from error


def _damaged(at: Path, reason: str) -> CheckpointError:
    older = [step for step in complete_steps(at.parent) if step < int(at.name)]
    remedy = (f"remove it, and step {older[-1]} is the latest" if older else
              "there is no older one: start anew in another folder")
    return CheckpointError(f"{at} is damaged ({reason}); {remedy}")


def _reason(error: BaseException) -> str:
    """The first cause, in one line."""
    while error.__cause__:
        error = error.__cause__
    return first_line(error)


def _as_json(name: str, value) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SettingError(f"{name} cannot be written as JSON ({error}); give only dicts with names as keys, lists, "
                           "finite numbers, strings, booleans and None") from None
