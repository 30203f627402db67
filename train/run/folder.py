"""The folder of a run: what lies where in it, and that it belongs to one run, and to one process group at a time.

    model_config/  config.json and tokenizer of the run's model
    checkpoints/   the latest states, each whole
    metrics.jsonl  a line for every step that was logged, each once
    layers.png     held-out loss of every layer
    tensorboard/   the same numbers for TensorBoard, if asked for
    model/         the trained model, when the run has reached its end
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from filelock import FileLock, Timeout
from flax import nnx

from sled.errors import CheckpointError, SettingError
from sled.io import NO_LOCKS
from sled.models import Decoder, read_config
from sled.models.stored import abstract_stacked
from sled.train.parallel.distributed import from_first_process, synchronise
from sled.train.run.checkpoint import check_format, complete_steps, load_checkpoint

_LOCK, _UNFINISHED = ".run.lock", ".unfinished-model_config"


class RunFolder:
    """The paths within a run's folder, and the right to write there.

    shared: whether all processes of the run see this one folder; else each has, and writes, one of its own.
    writes: whether this process writes the model's configuration.
    """

    def __init__(self, path: str | Path, *, shared: bool = True):
        self.path, self.writes = Path(path), not shared or jax.process_index() == 0
        self.model_config, self.checkpoints = self.path / "model_config", self.path / "checkpoints"
        self.metrics, self.picture = self.path / "metrics.jsonl", self.path / "layers.png"
        self.tensorboard, self.model = self.path / "tensorboard", self.path / "model"

    @property
    def steps(self) -> list[int]:
        """The steps of its whole checkpoints."""
        return complete_steps(self.checkpoints)

    def is_run(self) -> bool:
        """True where a run has begun here."""
        return (self.model_config / "config.json").is_file() or bool(self.steps)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within, no other run may write here; of several processes the first one claims it for all.

        Raises SettingError in all of them, before anything is written, for a folder that holds something else than a
        run, or the model of a run whose checkpoints are gone; for one that cannot be written, and for one that a run
        is going on in.
        """
        first, new, reason = jax.process_index() == 0, False, None
        # Not a lock that stays where this process is killed, which is what filelock would take instead.
        lock = FileLock(self.path / _LOCK, fallback_to_soft=False)
        try:
            if first:
                new = not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                reason = self._foreign()
                if reason is None:
                    lock.acquire(timeout=0)
        except Timeout:
            reason = f"a run is going on in {self.path}; wait for its end, or give another folder for another run"
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                why = "is a file" if os.path.isfile(self.path) else f"cannot be written ({error.strerror})"
                reason = f"the run's folder is {str(self.path)!r}, which {why}; give a folder of your own"
        if reason := from_first_process(reason):
            raise SettingError(reason)
        try:
            yield
        finally:
            if first:
                with contextlib.suppress(OSError):
                    if {entry.name for entry in self.path.iterdir()} <= {_LOCK}:  # nothing came of it
                        (self.path / _LOCK).unlink(missing_ok=True)
                        if new:
                            self.path.rmdir()
                lock.release()

    def _foreign(self) -> str | None:
        """The reason why no run may begin or go on here, or None."""
        if self.steps:
            return None
        if self.is_run() or (self.path / _UNFINISHED).is_dir():
            if not (self.model / "config.json").exists():
                return None
            return (f"the run's folder is {str(self.path)!r}, which holds a trained model, but none of the checkpoints "
                    "to go on from; give another folder, or move model/ away to begin anew")
        others = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        return (f"the run's folder is {str(self.path)!r}, which holds {others[0]!r} but no run; give a new or empty "
                "folder") if others else None

    @contextlib.contextmanager
    def new_model_config(self) -> Iterator[Path]:
        """A folder that takes the place of `model_config` when the block ends, and goes when it raises.

        All processes enter and leave together; those write of which `writes` is true. Until `model_config` is in its
        place, the folder under its other name tells that this is a run.
        """
        unfinished = self.path / _UNFINISHED
        try:
            if self.writes:
                unfinished.mkdir(exist_ok=True)
                for left in unfinished.iterdir():  # by a run that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield unfinished
            synchronise("the model's configuration is read")
            if self.writes:
                shutil.rmtree(self.model_config, ignore_errors=True)
                unfinished.rename(self.model_config)
            synchronise("the model's configuration is in its place")
        finally:
            if self.writes:
                shutil.rmtree(unfinished, ignore_errors=True)


class TrainedModel(NamedTuple):
    """A checkpoint's decoder, stacked form, float32; the folder of its config.json and tokenizer; its step, and the
    settings that its run had."""

    decoder: Decoder
    model_config: Path
    step: int
    settings: dict[str, Any]


def read_checkpoint(run: str | Path, step: int | None = None) -> TrainedModel:
    """The model of a checkpoint of the run in folder `run`, on one device; its optimiser is not read.

    step: the checkpoint's; None for the latest.
    Raises CheckpointError for a folder that holds no run, or none of this step, and for a damaged one.
    """
    run = RunFolder(run)
    if not run.is_run():
        raise CheckpointError(f"{run.path} holds neither checkpoints nor model_config/config.json, so it is no folder "
                              "of a training run; give the one that sled train has as --out")
    check_format(run.checkpoints, step)
    graph, weights = nnx.split(abstract_stacked(read_config(run.model_config)))
    restored = load_checkpoint(run.checkpoints, {"weights": weights}, step, partial=True)
    return TrainedModel(nnx.merge(graph, restored.state["weights"]), run.model_config, restored.step, restored.settings)
