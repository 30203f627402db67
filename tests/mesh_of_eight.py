"""Run by test_train_mesh.py, python mesh_of_eight.py FOLDER OUT MESHES...: a model trains on 8 devices as on 1."""

import collections
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from training_runs import ASKED, MESHES, counted_open, remember_programs

import sled.models.stored
from sled.errors import SettingError
from sled.fusion import SharedHead
from sled.models import Decoder, DecoderConfig, ExitHeads, Experts, save_folder
from sled.models.sharding.sharding import Sharding
from sled.train.data.sources import Source
from sled.train.objective.balance import balance_loss
from sled.train.objective.cross_entropy import Split, exit_cross_entropy
from sled.train.objective.exit_weights import Rotational, UniformWeights, WeightedExits
from sled.train.objective.forward import states_and_routing
from sled.train.objective.layer_dropout import FixedRows, LayerDropout
from sled.train.parallel.memory_plan import memory_plan
from sled.train.recipes import Recipe
from sled.train.run.checkpoint import Checkpoints, load_checkpoint
from sled.train.run.folder import RunFolder
from sled.train.run.metrics import HELD_OUT
from sled.train.run.named_arrays import named
from sled.train.trainer import TrainingRun, prepare

folder, out, *meshes = sys.argv[1:]
folder, out = Path(folder), Path(out)
remember_programs(out)
assert jax.device_count() == 8
STEPS, LENGTH = 10, 13
OPTIMIZER = optax.adamw(3e-3)
RECIPE = Recipe(steps=STEPS, batch_size=8, context=LENGTH, exits=WeightedExits(UniformWeights(), Rotational(2)),
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


def check_reading(weights):
    """Loading asked for each device's part once."""
    parts = {".".join(path): leaf[...].sharding.shard_shape(leaf.shape) for path, leaf in nnx.to_flat_state(weights)}
    family_names = {"mlp.down": "layers.mlp.down.weight", "self_attn.k": "layers.attention.k.weight",
                    "embed_tokens": "embedding.weight", "input_layernorm": "layers.attention_norm.weight"}
    asked = collections.Counter()
    for name, count in ASKED:
        asked[name] += count
        for own in (own for part, own in family_names.items() if part in name):
            assert count == math.prod(parts[own][1:] if own.startswith("layers") else parts[own]), name
    assert asked == {name: array.size for name, array in load_file(folder / "model.safetensors").items()}


def check_step(mesh, sharding, step):
    """Weights are gathered layer by layer and activations never; the step takes what was planned."""
    parts = MESHES[mesh].tensor
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", step.as_text())
    if mesh == "data":
        assert gathered == []
    elif mesh != "tensor":
        matrices = {(48, 32), (32, 32), (32, 16), (32, 40), (40, 32)}  # table; q and o; k and v; gate and up; down
        shapes = {tuple(map(int, dims.split(","))) for dims in gathered}
        assert shapes and shapes <= {(rows // m, columns // n) for rows, columns in matrices
                                     for m, n in ((1, parts), (parts, 1))}, mesh
    planned, groups = memory_plan(sharding, OPTIMIZER), 8 // parts
    rows = 3 * 4 * LENGTH * 8 // groups  # three arrays of its rows
    numbers = 4 + 4  # the step's, and the rate of layer dropout
    assert step.memory_analysis().argument_size_in_bytes == planned.weights + planned.optimizer + numbers + rows, mesh


def steps_on(mesh):
    """The weights before ten steps, their losses, and what evaluates the weights after them."""
    ASKED.clear()
    prepared, state = prepared_on(mesh)
    check_place(prepared, state.weights)
    if mesh in ("alone", "all"):
        save_folder(nnx.merge(prepared.graph, state.weights), out / "saved" / mesh, max_shard_bytes=20_000)
    initial = jax.device_get(state.weights)
    batches = [prepared.on_devices(next(prepared.batches), 8) for _ in range(STEPS)]
    step = prepared.train_step.lower(state, batches[0], prepared.dropout(1)).compile()
    if mesh != "alone":
        check_reading(state.weights)
        check_step(mesh, prepared.sharding, step)
    losses = []
    for number, batch in enumerate(batches, 1):
        state, measured = step(state, batch, prepared.dropout(number))
        losses.append(float(measured.loss))
    check_place(prepared, state.weights)
    return initial, losses, functools.partial(prepared.evaluate, state.weights)


def after_one_step(mesh, **changes):
    """Loss and weights after one step of plain descent."""
    prepared, state = prepared_on(mesh, optimizer=optax.sgd(1.0), **changes)
    state, measured = prepared.train_step(state, prepared.on_devices(next(prepared.batches), 8), prepared.dropout(1))
    check_place(prepared, state.weights)
    return jax.device_get((measured.loss, state.weights))


def check_one_step(**changes):
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    jax.tree.map(close, *(after_one_step(mesh, **changes) for mesh in ("alone", "all")))


def check_split_loss():
    """The loss in float64, split over data and vocabulary, and over pipeline stages, is the whole one."""
    random = np.random.RandomState(0)
    exits, batch, tokens, width = 3, 4, 9, 8
    h_EBTD, mask_BT = random.standard_normal((exits, batch, tokens, width)), random.rand(batch, tokens)
    mask_BT[0] = 0  # one device of the data axis has fewer targets
    weights_E = np.array([0.5, 0, 1.0])

    def run(w_VD, targets_BT, weights_E, split, **options):
        loss = lambda h, w: exit_cross_entropy(h, SharedHead(w), targets_BT, mask_BT, weights_E, split=split, **options)  # noqa: E731
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
        loss, _ = exit_cross_entropy(h_EBTD, SharedHead(w_VD), targets_BT, mask_BT, weights_E, split=here)
        return jax.lax.psum(loss, "stage")

    # The last two exits on a pipeline stage each, which splits the rest.
    stages = jax.shard_map(stage, mesh=mesh, in_specs=(P("stage"), P(), P("stage")), out_specs=P(),
                           axis_names={"stage"})
    parts = jax.jit(jax.value_and_grad(stages, argnums=(0, 1)))(h_EBTD[1:], w_VD, np.array([1.0, 2.0]))
    (value, _), (dh_EBTD, dw_VD) = run(w_VD, targets_BT, np.array([0.0, 1.0, 2.0]), None)
    same(parts, (value, (dh_EBTD[1:], dw_VD)))
    with pytest.raises(SettingError, match=r"the batch has 3 rows, which axes \('data', 'fsdp'\) of 4 devices cannot"):
        exit_cross_entropy(h_EBTD[:, 1:], SharedHead(w_VD), targets_BT[1:], mask_BT[1:], weights_E, split=split)


def check_checkpoints(folder):
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


def check_experts():
    """A mixture of experts gives one device's gradient; rows stay where they are."""
    config = DecoderConfig("mixtral", vocab_size=24, width=16, mlp_width=32, num_layers=2, num_heads=4, num_kv_heads=2,
                           head_dim=8, max_positions=64, mlp_bias=True, experts=Experts(6, 2, 20))
    graph, weights = nnx.split(Decoder.init(config, rngs=nnx.Rngs(0)).stack())
    tokens_BT = jnp.asarray(IDS)[:8] % 24

    def loss(weights, tokens_BT, sharding=None):
        h_EBTD, experts = states_and_routing(nnx.merge(graph, weights), tokens_BT, (2,), sharding=sharding)
        return jnp.sin(h_EBTD).sum() + balance_loss(experts)

    expected = jax.jit(jax.grad(loss))(weights, tokens_BT)
    sharding = Sharding(config, MESHES["all"].build())
    placed = jax.device_put((weights, tokens_BT), (sharding.shardings(weights), sharding.rows))
    step = jax.jit(jax.grad(functools.partial(loss, sharding=sharding))).lower(*placed).compile()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), step(*placed), expected)
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", step.as_text())
    experts = {shape for shape in gathered if shape.count(",") == 3}
    assert experts == {"1,6,16,10", "1,6,10,16"}  # a layer's, each with half of F
    assert not any(shape.startswith(f"8,{LENGTH - 1},") for shape in gathered)


check_checkpoints(out / "checkpoints")
check_experts()
sled.models.stored.safe_open = counted_open
runs = {mesh: steps_on(mesh) for mesh in meshes}
initial, losses, evaluate = runs["alone"]
assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
for weights, ours, _ in runs.values():  # with layer dropout, whose draws are the same everywhere
    jax.tree.map(np.testing.assert_array_equal, weights, initial)
    close(ours, losses)
saved = [{path.name: path.read_bytes() for path in (out / "saved" / mesh).iterdir()} for mesh in ("alone", "all")]
assert saved[0] == saved[1] and sum(name.endswith(".safetensors") for name in saved[0]) > 2
close(runs["all"][2]()[HELD_OUT], evaluate()[HELD_OUT])
# Where rows that lie on several devices are left out of the computation, and where exit heads learn alone.
check_one_step(recipe=dataclasses.replace(RECIPE, dropout=LayerDropout(0.6, strategy=FixedRows())))
check_one_step(recipe=Recipe(batch_size=8, context=LENGTH, trainable="exit-heads"),
               heads=ExitHeads((1, 2), "mlp", tied=False))
with jax.enable_x64(True):
    check_split_loss()
