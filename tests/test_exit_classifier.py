"""CALM's trained classifier: it learns when an exit is right, and is kept for its model."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from headed_models import bare, stirred

import sled
from sled.errors import CheckpointError, DataError, SettingError
from sled.exits.confidence import confidence
from sled.lm import LM
from sled.models import ExitHeads
from sled.train.data.rows import TrainingBatch
from sled.train.objective.classifier import train_classifier


@pytest.fixture(scope="module", name="bare")
def the_bare_model():
    return bare()


@pytest.fixture(scope="module")
def toy(bare):
    """A model whose layers do nothing. Exit 1 says what the last layer says after an even token, and 0 after an odd."""
    model = nnx.clone(bare.with_exit_heads(ExitHeads((1,), "projection", tied=False)))
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
    sure = [confidence("classifier", None, toy.embed(ids), None, classifier, e) for e in range(2)]
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
    with pytest.raises(SettingError, match="has weights for 2 exits, but layers names 1"):
        sled.EarlyExit(1, measure="classifier", classifier=dataclasses.replace(found, layers=None))
    with pytest.raises(CheckpointError, match="does not say for which exits"):
        sled.save_classifier(dataclasses.replace(found, layers=None), tmp_path / "c", LM(toy))
    with pytest.raises(DataError, match="end after 0 of 5 steps"):
        train_classifier(toy, [], 1, steps=5, progress=False)
    nothing = TrainingBatch(*np.zeros((3, 2, 12), np.int32))
    with pytest.raises(DataError, match="first batch has no token of weight above 0"):
        train_classifier(toy, [nothing], 1, steps=1, progress=False)
