"""Run by test_train_pipeline.py, python mesh_of_stages.py FOLDER OUT MESHES...: stages train as one device does.

With one mesh, the one of all axes, not all that is compiled for several.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file
from training_runs import MESHES, remember_programs

from sled.models import Decoder, DecoderConfig, ExitHeads
from sled.models.sharding.mesh import ROWS, Mesh
from sled.models.sharding.sharding import RULES, Sharding
from sled.train.data.sources import Source
from sled.train.objective.cross_entropy import Split
from sled.train.objective.exit_heads import exit_head_loss
from sled.train.objective.exit_weights import AllExits, Rotational, UniformWeights, WeightedExits
from sled.train.objective.forward import states_and_routing
from sled.train.objective.layer_dropout import FixedRows, LayerDropout, Masked, WholeBatch
from sled.train.recipes import Recipe
from sled.train.run.folder import RunFolder
from sled.train.run.metrics import HELD_OUT
from sled.train.trainer import TrainingRun, prepare, train

folder, out, *meshes = sys.argv[1:]
folder, out = Path(folder), Path(out)
remember_programs(out)
assert jax.device_count() == 8
STEPS, LENGTH = 20, 13
STAGES = {"alone": MESHES["alone"], "two": Mesh(data=4, fsdp=1, stage=2), "four": Mesh(fsdp=2, stage=4),
          "all": Mesh(fsdp=2, stage=2, tensor=2)}
DATA = Source([{"ids": ids} for ids in np.random.RandomState(0).randint(3, 48, (40, LENGTH - 1)).tolist()],
              tokens="ids")
RECIPE = Recipe(steps=STEPS, batch_size=8, context=LENGTH, exits=WeightedExits(UniformWeights(), Rotational(2)),
                dropout=LayerDropout(0.3, rescale=False), learning_rate=3e-3, warmup=2)
WITH_HEADS = dict(heads=ExitHeads((1, 2), "block"), recipe=dataclasses.replace(
    RECIPE, exits=WeightedExits(UniformWeights(), AllExits((1, 2))), dropout=LayerDropout(0.3, strategy=FixedRows())))


def losses_on(mesh: str, name: str, recipe=RECIPE, **changes) -> list[float]:
    """The losses of all steps."""
    run = TrainingRun(out / name / mesh, folder, DATA, recipe, DATA, mesh=STAGES[mesh], **changes)
    claimed, losses = RunFolder(run.folder), []
    with claimed.claimed():
        prepared, state = prepare(run, claimed, optax.adamw(3e-3))
        for step in range(1, STEPS + 1):
            batch = prepared.on_devices(next(prepared.batches), 8)
            state, measured = prepared.train_step(state, batch, prepared.dropout(step))
            losses.append(float(measured.loss))
        return [*losses, *prepared.evaluate(state.weights)[HELD_OUT]]


def check_gradients(mesh: Mesh, config: DecoderConfig, exits, strategy, remat: str, microbatches: int | None) -> None:
    """Of a small model in float64."""
    graph, weights = nnx.split(Decoder.init(config, rngs=nnx.Rngs(0), dtype=jnp.float64).stack())
    random = np.random.RandomState(0)
    tokens_BT, mask_BT = random.randint(3, config.vocab_size, (8, 11)), random.rand(8, 11)
    segments_BT = np.sort(random.randint(0, 3, (8, 11)), axis=1)
    drops = LayerDropout(0.5, rescale=False, strategy=strategy).draw(jax.random.key(3), 2, 8, config.num_layers)

    def loss(weights, sharding):
        model = nnx.merge(graph, weights)
        h_EBTD, _ = states_and_routing(model, tokens_BT, exits, segments_BT=segments_BT, drops=drops, remat=remat,
                                       sharding=sharding, microbatches=microbatches)
        split = sharding and Split(sharding.mesh, data=ROWS, tensor=RULES["vocab"])
        return exit_head_loss(model, h_EBTD, exits, tokens_BT, mask_BT, np.linspace(0.5, 1, len(exits)),
                              segments_BT=segments_BT, z_loss=1e-3, split=split)[0]

    sharding = Sharding(config, mesh.build())
    placed = jax.device_put(weights, sharding.shardings(weights))
    one, split = (jax.jit(jax.value_and_grad(functools.partial(loss, sharding=sharding)))(given)
                  for sharding, given in ((None, weights), (sharding, placed)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), one, split)


def final_weights(name: str, *runs: tuple[str, int]):
    """The weights after runs into one folder: a mesh each, and to which step."""
    for mesh, steps in runs:
        model = train(TrainingRun(out / name, folder, DATA, mesh=STAGES[mesh], save_every=2, recipe=dataclasses.replace(
            RECIPE, steps=steps, schedule="constant")))
    return load_file(model / "model.safetensors")


for name, changes in {"exits": {}, "heads": WITH_HEADS}.items() if meshes[1:] else [("heads", WITH_HEADS)]:
    expected = losses_on("alone", name, **changes)
    assert expected[STEPS - 1] < expected[0] - 0.2
    for mesh in meshes:
        np.testing.assert_allclose(losses_on(mesh, name, **changes), expected, rtol=0, atol=1e-4,
                                   err_msg=f"{name} {mesh}")
if meshes[1:]:
    through, same = final_weights("through", ("all", 6)), final_weights("same", ("all", 4), ("all", 6))
    jax.tree.map(np.testing.assert_array_equal, same, through)
    other = final_weights("other", ("all", 4), (meshes[0], 6))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), other, through)
with jax.enable_x64(True):
    BASE = dict(family="llama", vocab_size=40, width=16, mlp_width=32, num_heads=4, num_kv_heads=2, head_dim=8,
                max_positions=64)
    six = DecoderConfig(num_layers=6, **BASE)
    check_gradients(STAGES["four"], six, (1, 6), WholeBatch(), "none", None)  # 2, 2, 2 and no layer
    if meshes[1:]:
        check_gradients(STAGES["all"], six, (2, 3, 6), Masked(), "full", 2)
        check_gradients(STAGES["two"], dataclasses.replace(six, exit_heads=ExitHeads((1, 4), "block")), (1, 4, 6),
                        FixedRows(shards=2), "dots", 1)
