"""The model of a checkpoint, while its run goes on or after it was given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from sled.errors import CheckpointError
from sled.models import Decoder, read_config
from sled.models.stored import abstract_stacked
from sled.train.run.checkpoint import load_checkpoint
from sled.train.run.folder import RunFolder


class TrainedModel(NamedTuple):
    """A checkpoint's decoder, stacked form, float32; the folder of its config.json and tokenizer; its step, and the
    settings that its run had."""

    decoder: Decoder
    form: Path
    step: int
    settings: dict[str, Any]


def read_checkpoint(run: str | Path, step: int | None = None) -> TrainedModel:
    """The model of a checkpoint of the run in folder `run`, on one device; its optimiser is not read.

    step: the checkpoint's; None for the latest.
    Raises CheckpointError for a folder that holds no run, or none of this step, and for a damaged one.
    """
    run = RunFolder(run)
    if not run.is_run():
        raise CheckpointError(f"{run.path} holds no form/config.json, so it is no folder of a training run; give the "
                              "one that sled train has as --out")
    graph, weights = nnx.split(abstract_stacked(read_config(run.form)))
    restored = load_checkpoint(run.checkpoints, {"weights": weights}, step, partial=True)
    return TrainedModel(nnx.merge(graph, restored.state["weights"]), run.form, restored.step, restored.settings)
