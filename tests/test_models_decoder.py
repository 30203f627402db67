"""A cache changes nothing, nor stacking, padding, or what comes later; every family says what transformers says."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sled.models import Decoder, load_folder
from sled.models.layers import RMSNorm
from sled.train.objective.forward import exit_states

TOKENS_BT = jnp.asarray(np.random.RandomState(2).randint(0, 48, (2, 20)))
SLOTS = 24
# Llama 3's rope and shared key/value heads; windows on some layers, query and key norms, biases.
CHOSEN = ["llama-llama3", "qwen3-mha-biases-windows"]


@pytest.fixture(scope="module", params=CHOSEN)
def decoder(request, tiny_folder):
    return load_folder(tiny_folder(request.param))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, tokens_BT, positions_BT, caches):
    """In two segments: layers join, whatever their windows."""
    model = nnx.merge(graph, state)
    h_BTD = model.embed(tokens_BT, positions_BT)
    lower, below = model.run_layers(h_BTD, positions_BT, caches and caches[:1], 0, 1)
    upper, above = model.run_layers(lower[-1], positions_BT, caches and caches[1:], 1, model.config.num_layers)
    return jnp.stack([h_BTD, *lower, *upper]), [*below, *above]


def run(decoder, tokens_BT, positions_BT=None, caches=None):
    """All hidden states, and the layers' K/V."""
    counted = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return _run(*nnx.split(decoder), tokens_BT, counted if positions_BT is None else positions_BT, caches)


@pytest.fixture(scope="module")
def whole(decoder):
    """Every hidden state of the whole sequences, [L + 1, B, T, D]."""
    return decoder.hidden_states(TOKENS_BT)


def padded(caches):
    """K/V of a block that stood alone, with room for SLOTS positions."""
    return [tuple(jnp.pad(x, ((0, 0), (0, 0), (0, SLOTS - x.shape[2]), (0, 0))) for x in kv) for kv in caches]


close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 2])
def test_cached_decoding_gives_the_hidden_states_of_whole_sequences(decoder, whole, block):
    states, caches = run(decoder, TOKENS_BT[:, :8])
    close(states, whole[:, :, :8])
    caches = padded(caches)
    for t in range(8, 20, block):
        positions = jnp.broadcast_to(jnp.arange(t, t + block), (2, block))
        states, caches = run(decoder, TOKENS_BT[:, t:t + block], positions, caches)
        close(states, whole[:, :, t:t + block])


def test_rows_may_stand_at_different_positions(decoder, whole):
    """Row 0 goes on at 5, row 1 at 12; what the cache holds beyond must not matter."""
    _, caches = run(decoder, TOKENS_BT)
    at = jnp.array([[5, 6], [12, 13]])
    states, _ = run(decoder, jnp.take_along_axis(TOKENS_BT, at, 1), at, padded(caches))
    close(states, whole[:, jnp.arange(2)[:, None], at])


def test_a_negative_position_writes_nothing(decoder):
    """Nothing but the last slot, which belongs to no position."""
    caches = padded(run(decoder, TOKENS_BT)[1])
    _, after = run(decoder, TOKENS_BT[:, :1], jnp.array([[20], [-1]]), caches)
    for old, new in zip(jax.tree.leaves(caches), jax.tree.leaves(after), strict=True):
        assert (old[1, :, :-1] == new[1, :, :-1]).all() and (old[0] != new[0]).any()


def test_the_stacked_form_equals_the_separate_one(decoder, whole):
    """Also beyond max_positions, which limits no layer without a window."""
    short = Decoder(dataclasses.replace(decoder.config, max_positions=4), embed=decoder.embedding, positions=None,
                    layers=decoder.layers, norm=decoder.norm, head=decoder.head)
    stacked = short.stack()
    close(exit_states(stacked, TOKENS_BT, range(1, decoder.num_layers + 1)), whole[1:])
    before, after = (jax.tree.leaves(nnx.state(form)) for form in (decoder, stacked.unstack()))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_hidden_states_of_narrow_weights_are_float32_and_not_rounded_on_the_way(tiny_folder):
    narrow = load_folder(tiny_folder(CHOSEN[1]), dtype=jnp.bfloat16)
    caches = narrow.empty_caches(2, SLOTS, 0)
    states, kv = run(narrow, TOKENS_BT, caches=caches)
    assert states.dtype == narrow.embed(TOKENS_BT, None).dtype == narrow.logits(states[-1]).dtype == jnp.float32
    assert {x.dtype for pair in (*caches, *kv) for x in pair} == {jnp.dtype(jnp.bfloat16)}
    assert narrow.normalise(states[-1]).dtype == jnp.bfloat16  # for a product with the projection as it is
    assert (states[1:] != states[1:].astype(jnp.bfloat16)).mean() > 0.9


def test_padding_to_the_right_changes_nothing(decoder, whole):
    close(run(decoder, TOKENS_BT.at[:, 8:].set(0))[0][:, :, :8], whole[:, :, :8])


@pytest.mark.parametrize("name, layers, at, first", [
    (CHOSEN[-1], 3, 9, 0), ("mistral-window", 1, 15, 10)], ids=["causal", "window"])
def test_a_position_depends_on_no_later_token_and_none_before_its_window(name, layers, at, first, tiny_folder):
    decoder = load_folder(tiny_folder(name))
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))

    def output(h_BTD):
        return jnp.abs(decoder.run_layers(h_BTD, positions, None, 0, layers)[0][-1][:, at]).sum()

    seen = (jax.jit(jax.grad(output))(decoder.embed(TOKENS_BT, positions)) != 0).any(axis=(0, 2))
    assert seen.tolist() == [first <= t <= at for t in range(20)]


# Against transformers, live and recorded.

RECORDED = Path(__file__).parent / "fixtures" / "decoder_logits.npz"
LONG_BT = np.random.RandomState(1).randint(0, 48, (2, 24))  # longer than every window
POSITIONS = [0, 7, 23]  # whose logits, of row 1, are recorded


@functools.cache
def ours(folder):
    """The hidden states (the last one normed) and logits for LONG_BT."""
    decoder = load_folder(folder)
    states = decoder.hidden_states(jnp.asarray(LONG_BT))
    return [*states[:-1], decoder.normalise(states[-1])], np.asarray(decoder.logits(states[-1]))


def theirs(folder, transformers):
    """The same of transformers."""
    import torch

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading  # every tensor has the name that the class has for it
    model.eval()
    with torch.no_grad():
        out = model(torch.tensor(LONG_BT), output_hidden_states=True, use_cache=False)
    return [h.numpy() for h in out.hidden_states], out.logits.numpy()


def record(tiny_folder, variants, transformers):
    """Writes the recorded logits anew. Call it where a variant was added."""
    np.savez_compressed(RECORDED, **{
        name: theirs(tiny_folder(name), transformers)[1][1, POSITIONS] for name in variants})


def test_logits_equal_the_recorded_ones(variant, tiny_folder):
    with np.load(RECORDED) as recorded:
        np.testing.assert_allclose(ours(tiny_folder(variant))[1][1, POSITIONS], recorded[variant], atol=1e-4, rtol=0)


def test_every_hidden_state_equals_transformers(variant, tiny_folder, transformers):
    (states, logits), (hidden, expected) = ours(tiny_folder(variant)), theirs(tiny_folder(variant), transformers)
    for n, (h, other) in enumerate(zip(states, hidden, strict=True)):
        np.testing.assert_allclose(h, other, atol=1e-4, rtol=0, err_msg=f"hidden state {n}")
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1  # or the comparison says nothing


@pytest.mark.parametrize("plus_one", [False, True])
def test_norms_are_rounded_once(plus_one):
    """In bfloat16, in which 1 + w has no room for most of w."""
    norm = RMSNorm(256, eps=1e-6, plus_one=plus_one, dtype=jnp.bfloat16)
    w, x = (jax.random.normal(jax.random.key(n), (256,), jnp.bfloat16) * 0.3 for n in (0, 1))
    norm.weight[...] = w
    wide = x.astype(jnp.float32)
    expected = wide / jnp.sqrt((wide**2).mean() + 1e-6) * (w.astype(jnp.float32) + plus_one)
    np.testing.assert_array_equal(norm(x).astype(jnp.float32), expected.astype(jnp.bfloat16).astype(jnp.float32))
