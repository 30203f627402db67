"""Tuning of exit heads on a frozen backbone: what it costs, what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from headed_models import CONFIG, FAST, bare, headed, plain_logits

from sled.errors import SettingError
from sled.models import Decoder, ExitHeads
from sled.train.objective.exit_heads import exit_head_loss, merge, partition, tuning_loss, with_heads


@pytest.fixture(scope="module", name="bare")
def the_bare_model():
    return bare()


TOKENS_BT = np.random.RandomState(0).randint(6, 47, (4, 9))


def tuner(model):
    """The parts, and a compiled `run(heads, backbone, tokens, weights_E) -> ((loss, metrics), gradient)`."""
    graph, weights = nnx.split(model)

    def loss(heads, backbone, tokens_BT, weights_E):
        rows = tokens_BT[:, :-1], tokens_BT[:, 1:], jnp.ones((4, 8))
        return tuning_loss(nnx.merge(graph, merge(heads, backbone)), *rows, weights_E)

    heads, backbone = partition(weights)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    return heads, backbone, run.lower(heads, backbone, TOKENS_BT, jnp.ones(2)).compile()


@pytest.fixture(scope="module")
def tuned(bare):
    return tuner(with_heads(bare.stack(), ExitHeads((1, 2), "mlp", tied=False)))


def test_tuning_lowers_the_loss_and_touches_nothing_else(bare, tuned):
    heads, backbone, run = tuned
    adam = optax.adam(0.01)
    state, frozen = adam.init(heads), jax.tree.map(np.array, backbone)
    losses = []
    for _ in range(15):
        (loss, _), gradient = run(heads, backbone, TOKENS_BT, jnp.array([1.0, 0.5]))
        change, state = adam.update(gradient, state, heads)
        heads = optax.apply_updates(heads, change)
        losses.append(float(loss))
    assert [path for path, _ in nnx.to_flat_state(heads) if path[0] != "exit_heads"] == [] and len(
        jax.tree.leaves(heads)) == 6
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, backbone, frozen)
    sizes = [leaf.shape for leaf in jax.tree.leaves(heads)]
    assert [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim] == 2 * sizes


def test_the_loss_of_heads_is_the_plain_one():
    model, exits = headed("mlp, untied"), (1, 3, 4)
    h_EBTD = jax.random.normal(jax.random.key(1), (3, 2, 4, 16))
    targets, mask, weights = TOKENS_BT[:2, :4], np.array([[1, 1, 0, 1.0], [0, 1, 1, 1]]), np.array([0.5, 0.25, 1.0])
    graph, state = nnx.split(model.stack())
    loss, metrics = jax.jit(lambda state, h_EBTD: exit_head_loss(
        nnx.merge(graph, state), h_EBTD, exits, targets, mask, weights), compiler_options=FAST)(state, h_EBTD)
    nll = []
    for h_BTD, n in zip(h_EBTD, exits, strict=True):
        logits = plain_logits(model, h_BTD, n)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll.append(-(np.take_along_axis(logp, targets[..., None], -1)[..., 0] * mask).sum() / mask.sum())
    np.testing.assert_allclose(metrics.nll_E, nll, rtol=1e-5)
    np.testing.assert_allclose(loss, weights @ nll, rtol=1e-5)
    assert metrics.targets == 6
    with pytest.raises(SettingError, match="distill is given, but exits have projections of their own"):
        exit_head_loss(model.stack(), h_EBTD, exits, targets, mask, weights, distill=0.5)


def test_layers_above_the_last_exit_and_backward_passes_below_cost_nothing(monkeypatch):
    """Operations as the lowered program counts them, the loop over layers unrolled so that each is counted."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))

    deep = Decoder.init(dataclasses.replace(CONFIG, num_layers=6, windows=()), rngs=nnx.Rngs(0))

    def operations(last):
        model = with_heads(deep.stack(), ExitHeads((1, last), "norm"))
        graph, weights = nnx.split(model)
        loss = lambda heads, backbone: tuning_loss(  # noqa: E731
            nnx.merge(graph, merge(heads, backbone)), TOKENS_BT, TOKENS_BT, TOKENS_BT > 0)[0]
        return jax.jit(jax.grad(loss)).lower(*partition(weights)).cost_analysis()["flops"]

    h = jnp.zeros((4, 9, 16))
    one = jax.jit(lambda h: deep.run_layers(h, jnp.arange(9)[None], None, 3, 4)[0]).lower(h).cost_analysis()["flops"]
    assert (operations(5) - operations(2)) / one == pytest.approx(3, rel=0.03)
