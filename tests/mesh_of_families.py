"""Run by test_families.py: python mesh_of_families.py OUT FOLDER ...: a step of each on 8 devices is that on one."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from training_runs import MESHES

from sled.models import save_folder
from sled.train.data.sources import Source
from sled.train.recipes import Recipe
from sled.train.run.folder import RunFolder
from sled.train.trainer import TrainingRun, prepare

out, *folders = map(Path, sys.argv[1:])
assert jax.device_count() == 8
DATA = Source([{"ids": ids} for ids in np.random.RandomState(0).randint(3, 48, (40, 12)).tolist()], tokens="ids")
RECIPE = Recipe(steps=1, batch_size=8, context=13)


def after_one_step(folder: Path, mesh: str):
    """Loss and weights after one step of plain descent; the weights are written as they came."""
    run = TrainingRun(out / "runs" / mesh / folder.name, folder, DATA, RECIPE, DATA, mesh=MESHES[mesh])
    claimed = RunFolder(run.folder)
    with claimed.claimed():
        prepared, state = prepare(run, claimed, optax.sgd(0.1))
    save_folder(nnx.merge(prepared.graph, state.weights), out / "saved" / mesh / folder.name)
    state, measured = prepared.train_step(state, prepared.on_devices(next(prepared.batches), 8), prepared.dropout(1))
    return jax.device_get((measured.loss, state.weights))


for folder in folders:
    alone, split = (after_one_step(folder, mesh) for mesh in ("alone", "all"))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, float(np.abs(other).max())), err_msg=folder.name)
    files = [(out / "saved" / mesh / folder.name / "model.safetensors").read_bytes() for mesh in ("alone", "all")]
    assert files[0] == files[1], folder.name
