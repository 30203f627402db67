"""The folder of a run: what lies where in it, and that it belongs to one run, and to one process group at a time.

    form/          config.json and tokenizer of the run's model
    checkpoints/   the latest states, each whole
    metrics.jsonl  a line for every step that was told, each once
    layers.png     held-out loss of every layer
    tensorboard/   what TensorBoard reads, if asked for
    model/         the trained model, when the run has reached its end
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from jax.experimental.multihost_utils import sync_global_devices

from sled.errors import SettingError
from sled.train.checkpoint import complete_steps

_LOCK, _UNFINISHED = ".run.lock", ".unfinished-form"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """See the module."""

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    @property
    def form(self) -> Path:
        return self.path / "form"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "layers.png"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def steps(self) -> list[int]:
        """Those of its whole checkpoints."""
        return complete_steps(self.checkpoints)

    def is_run(self) -> bool:
        """Whether a run has put down the form of its model here."""
        return (self.form / "config.json").is_file()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within, no other run may write here; of several processes the first one claims it for all.

        Raises SettingError, before anything is written, for a folder that holds something else than a run, for one
        that cannot be written, and for one that a run is going on in.
        """
        if jax.process_index() > 0:
            yield
            return
        lock, new = FileLock(self.path / _LOCK), not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            with contextlib.suppress(NotImplementedError):  # some network file systems know no locks
                lock.acquire(timeout=0)
        except Timeout:
            raise SettingError(f"a run is going on in {self.path}; wait for its end, or give another folder for "
                               "another run") from None
        except OSError as reason:
            raise SettingError(f"the run's folder is {str(self.path)!r}, which cannot be written ({reason.strerror}); "
                               "give a folder of your own") from reason
        try:
            yield
        finally:
            lock.release()
            if new and not any(entry.name != _LOCK for entry in self.path.iterdir()):  # nothing came of it
                shutil.rmtree(self.path, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        if self.is_run() or self.steps or (self.path / _LOCK).exists():  # which a killed run leaves
            return
        if others := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
            raise SettingError(f"the run's folder is {str(self.path)!r}, which holds {others[0]!r} but no run; give a "
                               "new or empty folder")

    @contextlib.contextmanager
    def new_form(self) -> Iterator[Path]:
        """A folder that takes the place of `form` when the block ends, and goes when it raises.

        All processes enter and leave together; the first one writes.
        """
        first, unfinished = jax.process_index() == 0, self.path / _UNFINISHED
        try:
            if first:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
            yield unfinished
            _sync("sled has read the form of its model")
            if first:
                shutil.rmtree(self.form, ignore_errors=True)
                unfinished.rename(self.form)
            _sync("sled puts down the form of its model")
        finally:
            if first:
                shutil.rmtree(unfinished, ignore_errors=True)


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        sync_global_devices(name)
