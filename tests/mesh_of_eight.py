"""Run by test_train_mesh.py: python mesh_of_eight.py FOLDER OUT. Trains on meshes of 8 devices, takes notes."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from mesh_training import OPTIMIZER, CountedFile, train

import sled.models.stored
from sled.models import load_folder, save_folder
from sled.train.folders import load_onto
from sled.train.memory import plan
from sled.train.mesh import Mesh
from sled.train.placing import Placing

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
    placing = Placing(decoder.config, mesh)
    weights = nnx.state(decoder)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding == where, weights, placing.shardings(weights)))
    jax.tree.map(np.testing.assert_array_equal, weights, nnx.state(alone))
    notes["parts"][name] = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in
                            ((".".join(path), leaf[...]) for path, leaf in nnx.to_flat_state(weights))}
    if name == "all":
        save_folder(decoder, out / name, max_shard_bytes=20_000)
    notes["losses"][name], trained, step = train(decoder, 20, placing)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim),
                                     nnx.state(trained), placing.shardings(weights)))
    notes["gathered"][name] = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", step.as_text())
    planned = plan(placing, OPTIMIZER)
    notes["bytes"][name] = planned.weights + planned.optimizer, step.memory_analysis().argument_size_in_bytes
(out / "notes.json").write_text(json.dumps(notes))
