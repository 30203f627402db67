"""A Hugging Face folder from a checkpoint, while its run goes on or after it was given up."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from sled.errors import CheckpointError
from sled.models import read_config, save_folder
from sled.models.stored import abstract_stacked
from sled.train.checkpoint import complete_steps, load_checkpoint
from sled.train.named_arrays import mismatch, named, nested, rebuilt
from sled.train.trainer import CHECKPOINTS, FORM


def export_checkpoint(run: str | Path, to: str | Path, step: int | None = None) -> Path:
    """Writes the model of a checkpoint of the run in folder `run` to the folder `to`, with its tokenizer; returns `to`.

    step: the checkpoint's; None for the latest. The whole checkpoint is read onto one device, optimiser included.
    Raises CheckpointError for a folder that holds no run, or none of this step, and for a damaged one.
    """
    run = Path(run)
    if not (run / FORM / "config.json").is_file():
        raise CheckpointError(f"{run} holds no {FORM}/config.json, so it is no folder of a training run; give the one "
                              "that sled train has as --out")
    graph, weights = nnx.split(abstract_stacked(read_config(run / FORM)))
    like = {"weights": weights}
    state = load_checkpoint(run / CHECKPOINTS, _all_arrays(run / CHECKPOINTS, step), step).state
    found = {name: array for name, array in named(state).items() if name.startswith("weights/")}
    if different := mismatch(found, named(like)):
        raise CheckpointError(f"the checkpoints in {run} are not of the model in {run / FORM}: {different}; restore "
                              "the folder as the run left it")
    return save_folder(nnx.merge(graph, rebuilt(like, found)["weights"]), to, tokenizer_from=run / FORM)


def _all_arrays(checkpoints: Path, step: int | None) -> dict:
    """Shape and type of all that a checkpoint holds, whatever its optimiser; nothing where there is none."""
    steps = complete_steps(checkpoints)
    at = checkpoints.absolute() / str(steps[-1] if step is None and steps else step)
    try:
        held = named(ocp.checkpointables_metadata(at).metadata["state"]["arrays"])
    except Exception:  # load_checkpoint says what is wrong with it
        return {}
    return nested({name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in held.items()})
