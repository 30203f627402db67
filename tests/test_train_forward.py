"""The training pass gives the decoder's own hidden states, of the wanted exits only; packing changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sled.errors import SettingError
from sled.models import Decoder, DecoderConfig
from sled.train.objective.forward import REMAT, exit_states

CONFIG = DecoderConfig("llama", vocab_size=24, width=16, mlp_width=24, num_layers=4, num_heads=2, num_kv_heads=1,
                       head_dim=8, max_positions=8, qk_norm="head", windows=(None, 3, None, 3))
TOKENS_BT = np.random.RandomState(0).randint(1, 24, (3, 11))
# Documents of each row; the second's numbers come back, the third ends in padding of its own number.
SEGMENTS_BT = np.array([[0] * 11, [1] * 4 + [2] * 3 + [1] * 4, [5] * 6 + [6] * 2 + [0] * 3])


@pytest.fixture(scope="module")
def model():
    return Decoder.init(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def split(model):
    return nnx.split(model.stack())


@pytest.fixture(scope="module")
def hidden(model):
    """Every hidden state of [3, 11] tokens by the separate form, layer after layer."""
    return jax.jit(model.hidden_states)


@pytest.fixture(scope="module")
def whole(hidden):
    return np.asarray(hidden(TOKENS_BT))


@functools.partial(jax.jit, static_argnums=0)
def states_of(graph, weights, exits, segments_BT):
    return exit_states(nnx.merge(graph, weights), TOKENS_BT, exits, segments_BT=segments_BT)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("exits", "remat", "compute_dtype"))
def run(graph, weights, traced=None, *, exits=None, **options):
    """The states of `exits`, or of `traced` numbers, and the gradient of a weighted sum of them."""

    def loss(weights):
        states = exit_states(nnx.merge(graph, weights), TOKENS_BT, exits or traced, **options)
        wide = states.astype(jnp.float32)
        return jnp.sum(wide * jnp.sin(jnp.arange(wide.size)).reshape(wide.shape)), states

    gradient, states = jax.grad(loss, has_aux=True)(weights)
    return states, gradient


@pytest.fixture(scope="module")
def plain(split):
    return run(*split, exits=(1, 3), remat="none")


def close(found, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("remat", sorted(REMAT))
def test_remat_changes_neither_states_nor_gradients(split, plain, whole, remat):
    states, gradient = run(*split, exits=(1, 3), remat=remat)
    close(states, whole[[1, 3]])
    close(gradient, plain[1])


def test_exits_may_be_traced_and_compile_nothing_anew(split, plain, whole):
    before = run._cache_size()
    for exits in ((1, 3), (2, 4), (3, 4)):
        states, gradient = run(*split, jnp.array(exits))
        close(states, whole[list(exits)])
        if exits == (1, 3):
            close(gradient, plain[1])
    assert run._cache_size() == before + 1


def test_layers_above_the_last_exit_are_not_run(split, plain):
    """Whatever their weights are."""
    graph, weights = split
    broken = jax.tree.map(lambda leaf: leaf.at[3:].set(jnp.nan) if leaf.shape[0] == 4 else leaf, weights)
    found = run(graph, broken, exits=(1, 3), remat="none")
    close(found, plain)
    for leaf in jax.tree.leaves(found[1].layers):
        assert (leaf[3:] == 0).all() and (leaf[:3] != 0).any()


def test_packed_documents_are_as_if_alone(split, hidden):
    states = states_of(*split, jnp.array([1, 2, 3, 4]), segments_BT=SEGMENTS_BT)
    documents = [(row, *run.span()) for row, text in enumerate("".join(map(str, row)) for row in SEGMENTS_BT)
                 for run in re.finditer(r"(\d)\1*", text)]
    assert len(documents) == 7
    for some in (documents[:3], documents[3:6], documents[6:]):
        padded = np.zeros((3, 11), int)
        for i, (row, begin, end) in enumerate(some):
            padded[i, :end - begin] = TOKENS_BT[row, begin:end]
        alone = hidden(padded)
        for i, (row, begin, end) in enumerate(some):
            close(states[:, row, begin:end], alone[1:, i, :end - begin])


def test_computing_in_bfloat16_keeps_float32_weights(split, whole):
    states, gradient = run(*split, exits=(1, 3), compute_dtype=jnp.bfloat16, remat="full")
    assert states.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    close(states, whole[[1, 3]], 0.02)
    close(gradient, run(*split, exits=(1, 3), remat="full")[1], 0.1)


def test_only_the_exits_states_are_handed_out(split):
    """Of many layers no array of all hidden states exists unless the backward pass needs one."""
    graph, weights = split
    text = str(jax.make_jaxpr(lambda w: exit_states(nnx.merge(graph, w), TOKENS_BT, (2, 4)))(weights))
    assert "f32[2,3,11,16]" in text and "f32[4,3,11,16]" not in text


@pytest.mark.parametrize(("options", "says"), [
    (dict(exits=()), r"exits is \(\)"), (dict(exits=(0, 2)), "within 1..4"), (dict(exits=(2, 5)), "within 1..4"),
    (dict(exits=(3, 1)), "strictly ascending"), (dict(exits=(2, 2)), "strictly ascending"),
    (dict(exits=(1,), remat="some"), "remat is 'some'"), (dict(exits=(1,)), r"model.stack\(\)"),  # the separate form
])
def test_impossible_passes_are_refused(model, options, says):
    with pytest.raises(SettingError, match=says):
        exit_states(model if "stack" in says else model.stack(), TOKENS_BT, **options)
