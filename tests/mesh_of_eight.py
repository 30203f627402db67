"""Run by test_train_mesh.py: python mesh_of_eight.py FOLDER OUT. Trains FOLDER's model on 8 devices, takes notes."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from training_runs import ASKED, MESHES, counted_open, remember_programs

import sled.models.stored
from sled.errors import SettingError
from sled.models import ExitHeads, save_folder
from sled.train.data.sources import Source
from sled.train.objective.cross_entropy import Split, exit_cross_entropy
from sled.train.objective.exit_weights import Rotational, UniformWeights, WeightedExits
from sled.train.objective.layer_dropout import FixedRows, LayerDropout
from sled.train.parallel.memory_plan import memory_plan
from sled.train.recipes import Recipe
from sled.train.run.checkpoint import Checkpoints, load_checkpoint
from sled.train.run.folder import RunFolder
from sled.train.run.metrics import HELD_OUT
from sled.train.run.named_arrays import named
from sled.train.trainer import TrainingRun, prepare, train

folder, out = map(Path, sys.argv[1:])
remember_programs(out)
notes = {"devices": jax.device_count(), "losses": {}, "gathered": {}, "asked": {}, "parts": {}, "bytes": {}}
STEPS, LENGTH = 10, 13
OPTIMIZER = optax.adamw(3e-3)
RECIPE = Recipe(steps=STEPS, batch=8, context=LENGTH, exits=WeightedExits(UniformWeights(), Rotational(2)),
                dropout=LayerDropout(0.3, rescale=False))
IDS = np.random.RandomState(0).randint(3, 48, (40, LENGTH - 1)).tolist()
DATA = Source([{"ids": ids} for ids in IDS], tokens="ids")


def prepared_on(mesh, recipe=RECIPE, optimizer=OPTIMIZER, **changes):
    run = TrainingRun(out / "prepared" / mesh, folder, DATA, recipe, DATA, mesh=MESHES[mesh], **changes)
    claimed = RunFolder(run.folder)
    with claimed.claimed():
        return prepare(run, claimed, optimizer)


def check_place(prepared, weights):
    if prepared.sharding is not None:
        where = prepared.sharding.shardings(weights)
        placed = jax.tree.map(lambda leaf, at: leaf.sharding.is_equivalent_to(at, leaf.ndim), weights, where)
        assert jax.tree.all(placed)


def losses_on(mesh):
    """Losses of all steps; with notes of what was read, what each device holds, and what the compiled step does."""
    ASKED.clear()
    prepared, state = prepared_on(mesh)
    notes["asked"][mesh] = list(ASKED)
    check_place(prepared, state.weights)
    if mesh in ("alone", "all"):
        save_folder(nnx.merge(prepared.graph, state.weights), out / "saved" / mesh, max_shard_bytes=20_000)
    initial = jax.device_get(state.weights)
    batches = [prepared.on_devices(next(prepared.batches), 8) for _ in range(STEPS)]
    step = prepared.train_step.lower(state, batches[0], prepared.dropout(1)).compile()
    if prepared.sharding is not None:
        notes["parts"][mesh] = {".".join(path): leaf[...].sharding.shard_shape(leaf.shape)
                                for path, leaf in nnx.to_flat_state(state.weights)}
        notes["gathered"][mesh] = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", step.as_text())
        planned = memory_plan(prepared.sharding, OPTIMIZER)
        notes["bytes"][mesh] = (planned.weights + planned.optimizer, step.memory_analysis().argument_size_in_bytes)
    losses = []
    for number, batch in enumerate(batches, 1):
        state, measured = step(state, batch, prepared.dropout(number))
        losses.append(float(measured.loss))
    check_place(prepared, state.weights)
    notes["losses"][mesh] = losses
    if mesh == "alone":
        notes[HELD_OUT] = prepared.evaluate(state.weights)[HELD_OUT]
    return initial


def after_one_step(mesh, **changes):
    """Loss and weights after one step of plain descent."""
    prepared, state = prepared_on(mesh, optimizer=optax.sgd(1.0), **changes)
    state, measured = prepared.train_step(state, prepared.on_devices(next(prepared.batches), 8), prepared.dropout(1))
    check_place(prepared, state.weights)
    return jax.device_get((measured.loss, state.weights))


def difference(**changes):
    alone, ours = (jax.tree.leaves(after_one_step(mesh, **changes)) for mesh in ("alone", "all"))
    return max(float(np.abs(a - b).max()) for a, b in zip(alone, ours, strict=True))


def split_loss():
    """The loss in float64, split over data and vocabulary, and over pipeline stages, is the whole one."""
    random = np.random.RandomState(0)
    exits, batch, tokens, width = 3, 4, 9, 8
    h_EBTD, mask_BT = random.standard_normal((exits, batch, tokens, width)), random.rand(batch, tokens)
    mask_BT[0] = 0  # one device of the data axis has fewer targets
    weights_E = np.array([0.5, 0, 1.0])

    def run(w_VD, targets_BT, weights_E, split, **options):
        loss = lambda h, w: exit_cross_entropy(h, w, targets_BT, mask_BT, weights_E, split=split, **options)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h_EBTD, w_VD)

    def same(parts, whole):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), parts, whole)

    every = {"z_loss": 1e-2, "distill": 0.5, "temperature": 2.0}
    for vocabulary, shape, names, axes, terms in (  # 4 devices do not divide 21
            (21, (2, 4), ("data", "tensor"), {}, every),
            (16, (2, 2, 2), ("data", "fsdp", "tensor"), {"data": ("data", "fsdp")}, {})):
        w_VD, targets_BT = random.standard_normal((vocabulary, width)), random.randint(0, vocabulary, (batch, tokens))
        split = Split(jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names)), **axes)
        same(run(w_VD, targets_BT, weights_E, split, chunk=5, **terms), run(w_VD, targets_BT, weights_E, None, **terms))
    mesh = jax.make_mesh((2, 2, 2), ("stage", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def stage(h_EBTD, w_VD, weights_E):
        w_VD = jax.lax.pcast(w_VD, "stage", to="varying")
        here = Split(jax.sharding.get_abstract_mesh())
        loss, _ = exit_cross_entropy(h_EBTD, w_VD, targets_BT, mask_BT, weights_E, split=here)
        return jax.lax.psum(loss, "stage")

    # The last two exits on a pipeline stage each, which splits the rest.
    stages = jax.shard_map(stage, mesh=mesh, in_specs=(P("stage"), P(), P("stage")), out_specs=P(),
                           axis_names={"stage"})
    parts = jax.jit(jax.value_and_grad(stages, argnums=(0, 1)))(h_EBTD[1:], w_VD, np.array([1.0, 2.0]))
    (value, _), (dh_EBTD, dw_VD) = run(w_VD, targets_BT, np.array([0.0, 1.0, 2.0]), None)
    same(parts, (value, (dh_EBTD[1:], dw_VD)))
    try:
        exit_cross_entropy(h_EBTD[:, 1:], w_VD, targets_BT[1:], mask_BT[1:], weights_E, split=split)
    except SettingError as error:
        return str(error)


def checkpoint_on_meshes(folder):
    """A state saved on one mesh comes back on others, and on a single device, bit for bit."""
    state = {"weights": jnp.arange(96.0).reshape(8, 12), "bias": jnp.arange(8, dtype=jnp.bfloat16),
             "key": jax.random.split(jax.random.key(1), 4), "step": jnp.int32(3)}
    specs = {"weights": P("fsdp", "tensor"), "bias": P("fsdp"), "key": P()}
    turned = {"weights": P("tensor", "fsdp"), "bias": P(), "key": P("tensor")}

    def spread(shape, specs):
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    def same(one, other):
        jax.tree.map(np.testing.assert_array_equal, named(one), named(other))

    with Checkpoints(folder, {}, save_every=1) as checkpoints:
        placed = jax.device_put({name: state[name] for name in specs}, spread((4, 2), specs))
        checkpoints.save(1, {**placed, "step": state["step"]}, {})
    for place in (spread((2, 4), turned), spread((8, 1), specs), spread((4, 2), specs)):
        like = {name: jax.ShapeDtypeStruct(state[name].shape, state[name].dtype, sharding=place.get(name))
                for name in state}
        restored = load_checkpoint(folder, like).state
        for name, sharding in place.items():
            assert restored[name].sharding.is_equivalent_to(sharding, restored[name].ndim), (name, restored[name])
        assert len(restored["step"].sharding.device_set) == 8  # it was never placed: whole on each device
        jax.jit(lambda state: state)(restored)
        same(restored, state)
    same(load_checkpoint(folder, jax.eval_shape(lambda: state)).state, state)


checkpoint_on_meshes(out / "checkpoints")
sled.models.stored.safe_open = counted_open
weights = {mesh: losses_on(mesh) for mesh in MESHES}
for mesh in MESHES:
    jax.tree.map(np.testing.assert_array_equal, weights[mesh], weights["alone"])
train(TrainingRun(out / "run", folder, DATA, RECIPE, DATA, mesh=MESHES["all"], log_every=1), optimizer=OPTIMIZER)
notes["rows left out"] = difference(recipe=dataclasses.replace(RECIPE, dropout=LayerDropout(0.6, strategy=FixedRows())))
notes["tuned heads"] = difference(recipe=Recipe(batch=8, context=LENGTH, trainable="exit-heads"),
                                  heads=ExitHeads((1, 2), "mlp", tied=False))
with jax.enable_x64(True):
    notes["split loss"] = split_loss()
(out / "notes.json").write_text(json.dumps(notes))
