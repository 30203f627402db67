"""Train step, evaluation, optimisers and schedules against plain formulas, on a model of three layers."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from plain_loss import plain_loss

from sled.errors import SettingError
from sled.models.config import DecoderConfig, ExitHeads
from sled.models.decoder import Decoder
from sled.models.stored import abstract_stacked
from sled.train.data.rows import TrainingBatch
from sled.train.objective import train_step as steps
from sled.train.objective.exit_heads import partition, with_heads
from sled.train.objective.exit_weights import (
    AllExits,
    FixedExits,
    Gradual,
    LayerSkipWeights,
    Rotational,
    UniformWeights,
    WeightedExits,
)
from sled.train.objective.layer_dropout import LayerDropout
from sled.train.objective.train_step import init_state, make_evaluation, make_train_step
from sled.train.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, rate_schedule
from sled.train.recipes import RECIPES, Recipe, named

CONFIG = DecoderConfig("llama", vocab_size=20, width=16, mlp_width=24, num_layers=3, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=16, tied_head=True)
RECIPE = Recipe(batch_size=4, context=9, exits=WeightedExits(LayerSkipWeights(1.0), Rotational(2)), z_loss=1e-2,
                distill=0.3, temperature=2.0)  # layers 1 and 3 at step 0, where 1 weighs 0; then 2 and 3
SGD = optax.sgd(1.0)  # a step's change is its gradient
NEVER = LayerDropout(0.0, rescale=False)  # it is traced, so one program serves all rates


@pytest.fixture(scope="module")
def model():
    return Decoder.init(CONFIG, rngs=nnx.Rngs(0)).stack()


@pytest.fixture(scope="module")
def batch():
    """Four rows of one document each, with 1 to 7 targets that count unequally, and padding."""
    random = np.random.RandomState(0)
    lengths_B1 = np.array([[9], [3], [6], [2]])
    index_1T = np.arange(9)[None]
    inside = index_1T < lengths_B1
    weights_BT = np.where(inside & (index_1T > 0), np.where(index_1T < 3, 0.25, 1.0), 0.0)
    tokens_BT = random.randint(1, 20, (4, 9)) * inside
    return TrainingBatch(tokens_BT.astype(np.int32), weights_BT.astype(np.float32), inside.astype(np.int32))


@pytest.fixture(scope="module")
def step(model):
    """`step(batch, dropout, **changes)`: a step with SGD from the first state; compiled once per recipe."""
    compiled = {}

    def taken(batch, dropout=NEVER, number=1, **changes):
        key = tuple(sorted(changes.items()))
        if key not in compiled:
            compiled[key] = make_train_step(model, dataclasses.replace(RECIPE, **changes), SGD)
        state = init_state(nnx.state(model), SGD)._replace(step=jnp.int32(number))
        state, metrics = compiled[key](state, batch, dropout)
        gradient = jax.tree.map(lambda before, after: before - after, nnx.state(model), state.weights)
        return SimpleNamespace(gradient=gradient, state=state, metrics=metrics, programs=compiled[key]._cache_size())

    return taken


def plain(model, h_EBTD, batch, weights_E=0, *terms):
    """The loss by its definition, of states that the last norm has been through, and its parts."""
    return plain_loss(h_EBTD[:, :, :-1], model.shared_head.w_VD, batch.tokens_BT[:, 1:], batch.weights_BT[:, 1:],
                      weights_E, *terms)


@pytest.fixture(scope="module")
def plain_parts(model, batch):
    """Plain likelihood, accuracy and more of the layers 1..3."""
    normal = jax.jit(lambda tokens_BT: model.normalise(model.unstack().hidden_states(tokens_BT)[1:]))
    return plain(model, normal(batch.tokens_BT), batch)[1]


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def test_a_step_goes_down_the_plain_formula(model, step, batch, plain_parts):
    graph, weights = nnx.split(model)
    weights_E = np.array([1, 3], np.float32) / 4  # e(2) = 1, e(3) = L - 1 + 1

    def loss_of(weights):
        model = nnx.merge(graph, weights)
        h_EBTD = model.normalise(model.unstack().hidden_states(batch.tokens_BT)[2:])
        return plain(model, h_EBTD, batch, weights_E, 1e-2, 0.3, 2.0)[0]

    taken = step(batch)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(weights)
    np.testing.assert_allclose(taken.metrics.loss, loss, rtol=1e-5)
    close(taken.gradient, gradient, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(taken.metrics.gradient_norm, optax.global_norm(gradient), rtol=1e-4)
    nll_L, accuracy_L, *_ = plain_parts
    np.testing.assert_allclose(taken.metrics.nll_E, nll_L[1:], rtol=1e-5)
    assert taken.metrics.layers_E.tolist() == [2, 3] and taken.state.step == 2
    np.testing.assert_allclose(taken.metrics.accuracy, accuracy_L[2], rtol=1e-5)
    before = step(batch, number=0)
    assert before.metrics.layers_E.tolist() == [1, 3] and before.programs == 1
    np.testing.assert_allclose(before.metrics.nll_E, [np.nan, nll_L[2]], rtol=1e-5)  # layer 1 weighs 0


def test_parts_of_a_batch_add_up_to_the_whole(step, batch):
    """With parts of 10, 2, ... targets: each counts as many as it holds, also where it holds none."""
    for rows in (batch, batch._replace(weights_BT=batch.weights_BT * np.array([[1], [0], [1], [0]], np.float32))):
        whole, halves = step(rows), step(rows, accumulate=2)
        close(halves.gradient, whole.gradient, rtol=1e-3, atol=2e-6)
        close(halves.metrics, whole.metrics, rtol=1e-5)


def test_dropped_layers_are_those_of_the_draw(step, batch):
    """At a rate near 1 the last layer is left out of every row, and the first, whose rate is 0, of none."""
    for changes in ({}, {"accumulate": 2}):
        dropped = step(batch, LayerDropout(0.999, rescale=False), **changes)
        assert dropped.programs == 1  # another rate compiles nothing
        moved = [np.asarray(leaf).any(axis=(1, 2)) for leaf in jax.tree.leaves(dropped.gradient["layers"]["mlp"])]
        assert all(leaf[0] and not leaf[-1] for leaf in moved)


def test_dropout_is_drawn_anew_at_each_step_and_alike_when_repeated(step, batch):
    half = LayerDropout(0.5, rescale=False)
    losses = {(number, parts): float(step(batch, half, number=number, accumulate=parts).metrics.loss)
              for number, parts in itertools.product((0, 1, 2), (1, 2))}
    assert len(set(losses.values())) > 3  # drops of 3 steps, and of other parts
    assert float(step(batch, half, number=1, accumulate=2).metrics.loss) == losses[1, 2]


def test_evaluation_is_the_plain_formula_of_every_layer(model, batch, plain_parts, monkeypatch):
    monkeypatch.setattr(steps, "EVALUATED", 18)  # two of the four rows
    sums = make_evaluation(model, RECIPE)(nnx.state(model), batch)
    for found, expected in zip((sums.nll_L, sums.correct_L), plain_parts, strict=False):
        np.testing.assert_allclose(found / sums.targets, expected, rtol=1e-5)
    assert sums.targets == batch.weights_BT.sum()


@pytest.fixture(scope="module")
def headed(model):
    """The model with heads after layers 1 and 2 that have moved from where they start."""
    made = with_heads(model, ExitHeads((1, 2), "norm"))
    made.exit_heads.norm.weight[...] = jnp.linspace(0.2, 2.0, 32).reshape(2, 16)
    return made


@pytest.fixture(scope="module")
def headed_parts(headed, batch):
    """Plain likelihood, accuracy and more of every layer [3], each read by its exit's head."""

    @jax.jit
    def read(tokens_BT):
        h_LBTD = headed.unstack().hidden_states(tokens_BT)
        return jnp.stack([headed.exit_head(n).read(h_LBTD[n]) for n in (1, 2)] + [headed.normalise(h_LBTD[3])])

    return plain(headed, read(batch.tokens_BT), batch, 0, 0, 1, 2.0)[1]


def test_tuning_moves_the_exit_heads_alone(headed, headed_parts, batch):
    recipe, adam = Recipe(batch_size=4, context=9, trainable="exit-heads", accumulate=2, distill=0.5,
                          temperature=2.0), optax.adam(0.1)
    state = init_state(nnx.state(headed), adam, trainable=recipe.trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) == 2 * 32 + 1
    state, metrics = make_train_step(headed, recipe, adam)(state, batch, None)
    nll_L, _, _, divergence_L = headed_parts
    np.testing.assert_allclose(metrics.nll_E, nll_L[:2], rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, (nll_L + 0.5 * divergence_L)[:2].sum(), rtol=1e-5)
    assert metrics.layers_E.tolist() == [1, 2]
    (heads, backbone), (heads_before, before) = partition(state.weights), partition(nnx.state(headed))
    jax.tree.map(np.testing.assert_array_equal, backbone, before)
    moved = jax.tree.map(lambda a, b: np.abs(a - b), heads, heads_before)
    assert all((leaf > 0.09).all() for leaf in jax.tree.leaves(moved))


def test_a_model_with_exit_heads_learns_through_them(headed, headed_parts, batch):
    recipe = dataclasses.replace(RECIPE, exits=WeightedExits(UniformWeights(), AllExits()), z_loss=None, distill=None)
    state, metrics = make_train_step(headed, recipe, SGD)(init_state(nnx.state(headed), SGD), batch, None)
    np.testing.assert_allclose(metrics.loss, headed_parts[0].mean(), rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.weights, nnx.state(headed))
    assert moved["exit_heads"]["norm"]["weight"][...] > 0 and moved["embedding"]["weight"][...] > 0
    sums = make_evaluation(headed, recipe)(nnx.state(headed), batch)  # all rows at once
    np.testing.assert_allclose(sums.nll_L / sums.targets, headed_parts[0], rtol=1e-5)


@pytest.mark.parametrize("exits, says", [
    (RECIPE.exits, r"Rotational.*change from step to step.*AllExits"),
    (FixedExits((1,), (0.5,)), r"after layer 2 has a head, but with .* learns nothing.* \(--exit-layers 1 2\)"),
    (WeightedExits(LayerSkipWeights(1.0), AllExits()), "after layer 1 has a head, but .* learns nothing"),  # weighed 0
])
def test_heads_want_exits_that_stay(headed, exits, says):
    with pytest.raises(SettingError, match=says):
        make_train_step(headed, Recipe(batch_size=4, context=9, exits=exits), SGD)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    biased = dataclasses.replace(CONFIG, qkv_bias=True)
    weights = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), nnx.state(abstract_stacked(biased)))
    still = jax.tree.map(jnp.zeros_like, weights)
    optimizer = make_optimizer(name, optax.constant_schedule(0.1), weight_decay=0.5, beta2=0.9, clip=1.0)
    moved, _ = jax.jit(optimizer.update)(still, optimizer.init(weights), weights)
    for (path, change), weight in zip(nnx.to_flat_state(moved), jax.tree.leaves(weights), strict=True):
        decays = not {"bias"} & set(path) and not any("norm" in str(part) for part in path)
        np.testing.assert_allclose(change[...], -0.05 * weight if decays else 0 * weight, rtol=1e-5, err_msg=str(path))


def test_muon_orthogonalises_stacked_matrices_and_nothing_else():
    random = np.random.RandomState(0)
    weights = {"matrices": np.ones((2, 6, 4), np.float32), "table": np.ones((6, 4), np.float32),
               "norm": np.ones((2, 4), np.float32)}
    gradient = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), weights)
    optimizer = make_optimizer("muon", optax.constant_schedule(0.5), weight_decay=0.0, beta2=0.9, clip=1e9)
    change, _ = jax.jit(optimizer.update)(gradient, optimizer.init(weights), weights)
    singular = np.linalg.svd(np.asarray(change["matrices"]), compute_uv=False)
    assert singular.max() / singular.min() < 2.5
    rms = np.sqrt(np.mean(np.square(change["matrices"])))
    assert 0.5 * 0.2 * 0.6 < rms < 0.5 * 0.2 * 1.4  # of Adam's usual size, so that one rate serves both
    for name in ("table", "norm"):  # by Adam: its first step moves every number alike
        moved = np.abs(change[name])
        np.testing.assert_allclose(moved, moved.flat[0], rtol=1e-3)


def test_gradients_are_clipped_to_a_global_norm():
    gradient = {"a": jnp.full(3, 3.0), "b": jnp.full((2, 2), 4.0)}
    weights = jax.tree.map(jnp.zeros_like, gradient)
    optimizer = make_optimizer("adamw", optax.constant_schedule(1.0), weight_decay=0.0, beta2=0.9, clip=1.0)
    _, state = optimizer.update(gradient, optimizer.init(weights), weights)
    mean = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(optax.global_norm(mean), 0.1, rtol=1e-5)  # 1 - beta1 of a norm of 1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 100), (8, 0), (8, 1), (8, 8), (1000, 100)])
def test_schedules_rise_stay_and_fall(name, steps, warmup):
    rates = np.asarray(jax.vmap(rate_schedule(name, 2.0, warmup)(steps))(jnp.arange(steps)))
    rising = min(warmup, steps)
    np.testing.assert_allclose(rates[:rising], 2.0 * np.arange(1, rising + 1) / max(rising, 1), rtol=1e-5)
    assert (rates > 0).all() and (rates <= 2.0).all()  # the last step learns too
    after, falling = rates[rising:], steps - rising
    share = np.arange(falling) / max(falling, 1)
    quarter = max(steps // 4, 1)
    want = {"constant": np.ones(falling), "linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2,
            "warmup-stable-decay": np.minimum(1, (falling - np.arange(falling)) / quarter)}[name]
    np.testing.assert_allclose(after, 2.0 * want, rtol=1e-5, atol=1e-6)


def test_recipes_by_name():
    for name in RECIPES:
        assert named(name, steps=40).steps == 40
    topv2 = named("layerskip-topv2", steps=400)
    assert topv2.exits == WeightedExits(LayerSkipWeights(1.0), Gradual(400)) and topv2.dropout.rate == 0.2
    assert named("layerskip-scratch-7b", steps=400).dropout.schedule.steps == 400
    assert named("layerskip-llama2-13b").exits.curriculum == Rotational(39)
    assert named("plain", dropout=None, learning_rate=1.0).learning_rate == 1.0


@pytest.mark.parametrize("call, words", [
    (lambda: named("plain", rates=1), "no rates; it has"),
    (lambda: named("plain", learning_rate=0), "learning_rate is 0"),
    (lambda: named("plain", optimizer="sgd"), "optimizer is 'sgd'.*'adamw', 'muon'"),
    (lambda: named("plain", batch_size=6, accumulate=4), "batch_size is 6.*accumulate 4"),
    (lambda: named("plain", exits=3), "exits is 3"),
    (lambda: named("plain", context=1), "context is 1"),
    (lambda: named("plain", trainable="heads"), "trainable is 'heads'.*'all', 'exit-heads'"),
    (lambda: named("tune-exits", dropout=NEVER), "dropout is .*, but the recipe tunes exit heads"),
    (lambda: named("finetune", trainable="exit-heads"), "exits is WeightedExits.*leave it at LastOnly"),
    (lambda: named("plain", z_loss=-1.0), "z_loss is -1"),
])
def test_recipes_say_what_they_refuse(call, words):
    with pytest.raises(SettingError, match=words):
        call()
