import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from sled.errors import SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.train.checkpoint import Checkpoints, load_checkpoint
from sled.train.steps import (
    init_state,
    make_evaluation,
    make_train_step,
    muon,
    next_token_losses,
    schedule,
)

CONFIG = DecoderConfig("llama", vocab_size=20, width=16, mlp_width=24, num_layers=3, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=16, tied_head=True)


@pytest.fixture(scope="module")
def model():
    return Decoder.init(CONFIG, rngs=nnx.Rngs(0)).stack()


@pytest.fixture
def batch():
    """Tokens and weights [4, 9]: two tokens of a question, four that count in full, padding."""
    tokens_BT = np.random.RandomState(0).randint(1, 20, (4, 9)).astype(np.int32)
    weights_BT = np.array([[0.1] * 2 + [1.0] * 4 + [0.0] * 3] * 4, np.float32)
    return tokens_BT, weights_BT


@pytest.fixture(scope="module")
def losses(model):
    """`losses(tokens_BT, weights_BT)` of layers 1 and 3."""
    graph, weights = nnx.split(model)
    return jax.jit(lambda *batch: next_token_losses(nnx.merge(graph, weights), *batch, (1, 3)))


def test_losses_are_weighted_means_of_the_negative_log_likelihood(model, losses, batch):
    tokens_BT, weights_BT = batch
    logits = model.logits(model.hidden_states(tokens_BT[:, :-1])[1::2])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log_p, tokens_BT[None, :, 1:, None], -1)
    want = np.average(nll.reshape(2, -1), axis=1, weights=weights_BT[:, 1:].ravel())
    np.testing.assert_allclose(losses(*batch), want, rtol=1e-5)


def test_tokens_without_weight_do_not_matter(losses, batch):
    tokens_BT, weights_BT = batch
    padded = np.where(weights_BT > 0, tokens_BT, 0)
    np.testing.assert_array_equal(losses(padded, weights_BT), losses(tokens_BT, weights_BT))


def test_training_solves_a_batch_and_resumes_exactly(model, batch, tmp_path):
    optimizer = optax.adam(1e-2)
    step, evaluate = make_train_step(model, optimizer, exit_weight=0.2), make_evaluation(model)

    def run(state, count):
        for _ in range(count):
            state, _ = step(state, *batch)
        return state

    state = init_state(model, optimizer)
    before, _ = evaluate(state.weights, *batch)
    state = run(state, 30)
    with Checkpoints(tmp_path, {}, every=30) as checkpoints:
        checkpoints.save(30, state, {})
        state = run(state, 30)
    losses, solved = evaluate(state.weights, *batch)
    assert losses.shape == solved.shape == (3,)
    assert losses[-1] < before[-1] / 5 and solved[-1] == 1

    again = run(load_checkpoint(tmp_path, init_state(model, optimizer)).state, 30)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_a_single_layer_has_no_earlier_one_to_teach():
    model = Decoder.init(dataclasses.replace(CONFIG, num_layers=1, windows=()), rngs=nnx.Rngs(0)).stack()
    with pytest.raises(SettingError, match="at least 2"):
        make_train_step(model, optax.adam(1e-2), exit_weight=0.2)


def test_muon_orthogonalises_stacked_matrices_and_nothing_else():
    random = np.random.RandomState(0)
    weights = {"matrices": np.ones((2, 6, 4), np.float32), "table": np.ones((6, 4), np.float32)}
    gradient = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), weights)
    optimizer = muon(0.5, 20, decay=0.0)  # two steps of warm-up: the first has rate 0
    state = optimizer.init(weights)
    for _ in range(2):
        change, state = jax.jit(optimizer.update)(gradient, state, weights)
    singular = np.linalg.svd(np.asarray(change["matrices"]), compute_uv=False)
    assert singular.max() / singular.min() < 2.5
    moved = np.abs(change["table"])  # by Adam: a steady gradient moves every number alike
    np.testing.assert_allclose(moved, moved[0, 0], rtol=1e-3)


def test_schedule_warms_up_stays_and_falls_to_zero():
    rate = schedule(1.0, 1000)
    rates = [rate(step) for step in (0, 50, 100, 749, 875, 1000)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0.5, 0], atol=1e-6)
