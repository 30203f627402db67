"""What exits learn on a frozen model: heads of their own, and CALM's classifier of when an exit is right."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from headed_models import CONFIG, bare, headed, plain_logits, stirred

import sled
from sled.errors import CheckpointError, DataError, SettingError
from sled.exits.confidence import confidence
from sled.lm import LM
from sled.models import Decoder, ExitHeads
from sled.train.data.rows import TrainingBatch
from sled.train.objective.classifier import train_classifier
from sled.train.objective.exit_heads import exit_head_loss, merge, partition, tuning_loss, with_heads

TOKENS_BT = np.random.RandomState(0).randint(6, 47, (4, 9))


def test_the_loss_of_heads_is_the_plain_one():
    model, exits = headed("mlp, untied"), (1, 3, 4)
    h_EBTD = jax.random.normal(jax.random.key(1), (3, 2, 4, 16))
    targets, mask, weights = TOKENS_BT[:2, :4], np.array([[1, 1, 0, 1.0], [0, 1, 1, 1]]), np.array([0.5, 0.25, 1.0])
    graph, state = nnx.split(model.stack())
    loss, metrics = jax.jit(lambda state, h_EBTD: exit_head_loss(
        nnx.merge(graph, state), h_EBTD, exits, targets, mask, weights))(state, h_EBTD)
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


# The classifier

@pytest.fixture(scope="module")
def toy():
    """A model whose layers do nothing. Exit 1 says what the last layer says after an even token, and 0 after an odd."""
    model = nnx.clone(bare().with_exit_heads(ExitHeads((1,), "projection", tied=False)))
    for block in model.layers:
        for weight in (block.attention.o.weight, block.mlp.down.weight):
            weight[...] = jnp.zeros_like(weight[...])
    table, own = model.embedding.weight, model.exit_heads[0].projection
    table[...] = table[...].at[:, 0].set(jnp.where(jnp.arange(47) % 2, 1.0, -1.0))
    model.head.weight[...] = model.head.weight[...].at[0].set(0)
    own[...] = model.head.weight[...].at[0, 0].set(100)
    return model


@pytest.fixture(scope="module")
def classifier(toy):
    """For exits 1 and 2 of the toy model."""
    rows = np.random.RandomState(1).randint(6, 47, (16, 12)).astype(np.int32)
    batch = TrainingBatch(rows, np.ones(rows.shape, np.float32), np.ones(rows.shape, np.int32))
    return train_classifier(LM(toy), itertools.repeat(batch), (1, 2), steps=100, learning_rate=0.1, progress=False)


def test_the_classifier_learns_when_an_exit_is_right(toy, classifier):
    ids = jnp.arange(6, 47)
    sure = [confidence("classifier", None, toy.embed(ids, ids), None, classifier, e) for e in range(2)]
    assert (sure[0][::2] > 0.7).all() and (sure[0][1::2] < 0.3).all()
    assert (sure[1] > 0.9).all()  # exit 2 is always right


def test_a_classifier_is_kept_for_its_model(toy, classifier, tmp_path):
    sled.save_classifier(classifier, tmp_path / "c.safetensors", LM(toy))
    found = sled.load_classifier(tmp_path / "c.safetensors", LM(toy))
    jax.tree.map(np.testing.assert_array_equal, found, classifier)
    for other in (toy.with_exit_heads(None), stirred(toy)):
        with pytest.raises(CheckpointError, match="trained for another model"):
            sled.load_classifier(tmp_path / "c.safetensors", LM(other))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is no complete classifier"):
        sled.load_classifier(tmp_path / "cut.safetensors", LM(toy))
    with pytest.raises(SettingError, match=r"trained for exits \(1, 2\), but layers is \(1, 3\)"):
        sled.EarlyExit((1, 3), measure="classifier", classifier=found)
    with pytest.raises(SettingError, match=r"has weights of the shapes .* but for the exits that layers names"):
        sled.EarlyExit(1, measure="classifier", classifier=dataclasses.replace(found, layers=None))
    with pytest.raises(CheckpointError, match="does not say for which exits"):
        sled.save_classifier(dataclasses.replace(found, layers=None), tmp_path / "c", LM(toy))
    with pytest.raises(DataError, match="end after 0 of 5 steps"):
        train_classifier(toy, [], 1, steps=5, progress=False)
    nothing = TrainingBatch(*np.zeros((3, 2, 12), np.int32))
    with pytest.raises(DataError, match="first batch has no token of weight above 0"):
        train_classifier(toy, [nothing], 1, steps=1, progress=False)
