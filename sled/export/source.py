"""Reads the model to export from wherever it is, with the folder of its tokenizer and where it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from sled.errors import CheckpointError, SettingError
from sled.io import path_of
from sled.models import Decoder, load_folder, load_orbax
from sled.models.hub import folder_of
from sled.models.orbax import is_orbax


class SourceModel(NamedTuple):
    """A model to export, and where it comes from.

    decoder: separate form. files: the folder that holds its tokenizer, if it has one. hub_id: where it is a hub's.
    run: the folder of the training run whose checkpoint it is, step: the checkpoint's, settings: the run's.
    """

    decoder: Decoder
    files: Path
    name: str
    hub_id: str | None = None
    revision: str | None = None
    run: Path | None = None
    step: int | None = None
    settings: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The origin of the model as JSON has it: source, revision, step."""
        known = {"source": self.name, "revision": self.revision, "step": self.step}
        return {name: value for name, value in known.items() if value is not None}


def read_source(source: str | os.PathLike, *, step: int | None = None, revision: str | None = None,
                dtype: str | None = None) -> SourceModel:
    """The model that `source` names: a training run's folder, a Hugging Face or Orbax folder, a hub id, or "demo".

    step: of a run, which checkpoint (None: the latest). revision: of a hub id. dtype: that the weights are brought to;
    None keeps the stored ones (a run's are float32).
    Raises SettingError for a step of what is no run, CheckpointError and what else loading raises.
    """
    path = path_of("source", source)
    here = source != "demo" and path.is_dir()  # a folder of that name is ./demo
    if here:
        from sled.train.run.folder import RunFolder, read_checkpoint

        if RunFolder(path).is_run():
            trained = read_checkpoint(path, step)
            graph, weights = nnx.split(trained.decoder.unstack())
            return SourceModel(nnx.merge(graph, cast(weights, dtype)), trained.model_config, path.resolve().name,
                               run=path, step=trained.step, settings=trained.settings)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is neither a training run's folder (no checkpoints) nor a model's (no "
                                  "config.json); give what sled train has as --out, or a Hugging Face or Orbax folder")
    if step is not None:
        raise SettingError(f"step is {step}, but {source} is no training run, whose checkpoints have steps; leave it "
                           "out")
    folder = folder_of(source, revision)
    decoder = (load_orbax if is_orbax(folder) else load_folder)(folder, dtype=dtype)
    if here or source == "demo":
        return SourceModel(decoder, folder, path.resolve().name if here else "demo")
    return SourceModel(decoder, folder, os.fspath(source), hub_id=os.fspath(source), revision=revision)


def cast(weights: nnx.State, dtype: str | None) -> nnx.State:
    """The weights in another type; None: as they are."""
    return weights if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
