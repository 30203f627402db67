"""Run by test_train_mesh.py: python mesh_of_eight.py FOLDER OUT. Trains on meshes of 8 devices, takes notes."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from mesh_training import LENGTH, OPTIMIZER, CountedFile, tokens_of, train

import sled.models.stored
from sled.models import Decoder, DecoderConfig, load_folder, save_folder
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.sharding import Sharding
from sled.train.data.rows import TrainingBatch
from sled.train.objective.layer_dropout import FixedRows, dont_drop_dropout
from sled.train.objective.train_step import init_state, make_train_step
from sled.train.parallel.memory_plan import memory_plan
from sled.train.recipes import Recipe

MESHES = {"data": Mesh(data=8, fsdp=1), "fsdp": Mesh(), "tensor": Mesh(data=2, fsdp=1, tensor=4),
          "all": Mesh(data=2, fsdp=2, tensor=2)}
folder, out = map(Path, sys.argv[1:])
notes = {"devices": jax.device_count(), "losses": {}, "gathered": {}, "asked": {}, "parts": {}, "bytes": {}}

alone = load_folder(folder).stack()
save_folder(alone, out / "alone", max_shard_bytes=20_000)
notes["losses"]["alone"], _, _ = train(alone, 20)

sled.models.stored.safe_open = CountedFile
for name, settings in MESHES.items():
    mesh = settings.build()
    CountedFile.asked.clear()
    decoder = load_onto(folder, mesh)
    notes["asked"][name] = list(CountedFile.asked)
    sharding = Sharding(decoder.config, mesh)
    weights = nnx.state(decoder)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding == where, weights, sharding.shardings(weights)))
    jax.tree.map(np.testing.assert_array_equal, weights, nnx.state(alone))
    notes["parts"][name] = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in
                            ((".".join(path), leaf[...]) for path, leaf in nnx.to_flat_state(weights))}
    if name == "all":
        save_folder(decoder, out / name, max_shard_bytes=20_000)
    notes["losses"][name], trained, step = train(decoder, 20, sharding)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim),
                                     nnx.state(trained), sharding.shardings(weights)))
    notes["gathered"][name] = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", step.as_text())
    planned = memory_plan(sharding, OPTIMIZER)
    notes["bytes"][name] = planned.weights + planned.optimizer, step.memory_analysis().argument_size_in_bytes


def updated(mesh=None):
    """The weights after one step of descent with layer dropout that leaves rows out of the computation."""
    recipe = Recipe(batch=8, dropout=dont_drop_dropout(0.6, steps=10, strategy=FixedRows()))
    config = DecoderConfig("llama", vocab_size=96, width=32, mlp_width=64, num_layers=4, num_heads=4, num_kv_heads=4,
                           head_dim=8, max_positions=LENGTH, tied_head=False)
    decoder = Decoder.init(config, rngs=nnx.Rngs(0)).stack()
    sharding = mesh and Sharding(decoder.config, mesh)
    weights = nnx.state(decoder) if mesh is None else jax.device_put(nnx.state(decoder), sharding.shardings(
        nnx.state(decoder)))
    tokens_BT = tokens_of(0, config.vocab_size)
    batch = TrainingBatch(tokens_BT, np.ones(tokens_BT.shape, np.float32), np.ones_like(tokens_BT))
    dropout = recipe.dropout.saving(8, decoder.num_layers, 0, 3)
    assert min(dropout.strategy.saved[1:]) > 0
    step = make_train_step(decoder, recipe, optax.sgd(1.0), sharding)
    state, _ = step(init_state(weights, optax.sgd(1.0), sharding), batch if mesh is None else sharding.batch(batch, 8),
                    dropout)
    return jax.device_get(state.weights)


expected, found = updated(), updated(Mesh(data=2, fsdp=1, tensor=2).build(jax.devices()[:4]))
notes["left out"] = max(float(np.abs(a - b).max()) for a, b in
                        zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))
(out / "notes.json").write_text(json.dumps(notes))
