"""What every family gives, from one table of tiny models: each method in each, held against the model without a cache.

By default one model of each family decodes; `--exhaustive` takes every variant, more methods, and gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sled
from sled.decoding.readout import Readout
from sled.lm import LM
from sled.models import Decoder, load_folder
from sled.train.objective.cross_entropy import exit_cross_entropy
from sled.train.objective.forward import exit_states

FAMILIES = ["qwen3-mha-biases-windows", "gemma", "gemma2", "gemma3_text"]
ROOM = 40  # positions, more than any window and than what a ring of slots holds
PROMPTS = [np.random.RandomState(n).randint(3, 48, n).tolist() for n in (17, 1, 6)]
METHODS = {
    "guessed SLED": dict(fusion=sled.SLED(), exits=sled.SelfSpeculation(1, draft=4, max_draft=5)),
    "sure exits": dict(exits=sled.EarlyExit((1, 2), threshold=1.0)),
    "DoLa": dict(fusion=sled.DoLa(layers=(0, 1, 2))),
}


@pytest.fixture
def everything(variant, request):
    if variant not in FAMILIES and not request.config.getoption("--exhaustive"):
        pytest.skip("another variant of its family is tried: run with --exhaustive")
    return variant


@functools.cache
def model_of(folder) -> Decoder:
    model = load_folder(folder)
    model.config = dataclasses.replace(model.config, eos_ids=())
    return model


@pytest.mark.parametrize("method", [
    name if name == "guessed SLED" else pytest.param(name, marks=pytest.mark.exhaustive) for name in METHODS])
def test_texts_are_those_of_the_model_without_a_cache(everything, method, tiny_folder):
    """Every token is the fusion's choice after a full pass: whatever was kept in a ring, guessed, or in another row."""
    model = model_of(tiny_folder(everything))
    lm = LM(model)
    tokens = lm.generate(PROMPTS, max_new_tokens=ROOM - 17, **METHODS[method]).tokens
    readout, layers = Readout(model), model.num_layers
    fusion = METHODS[method].get("fusion", sled.FinalLayer())

    @jax.jit
    def choices(ids_T):
        states = model.hidden_states(ids_T[None])
        return readout.fuse(fusion, {n: states[n, 0] for n in range(layers + 1)}, layers).argmax(-1)

    for prompt, said in zip(PROMPTS, tokens, strict=True):
        assert len(said) == ROOM - 17
        text = np.pad([*prompt, *said], (0, ROOM - len(prompt) - len(said)))
        assert np.asarray(choices(text))[len(prompt) - 1:][:len(said)].tolist() == said


def test_scores_are_those_of_the_model_without_a_cache(everything, tiny_folder):
    model = model_of(tiny_folder(everything))
    scores = LM(model).score([PROMPTS[0], PROMPTS[0], PROMPTS[1]], [PROMPTS[2], [5], PROMPTS[0]])
    text = jnp.asarray([*PROMPTS[0], *PROMPTS[2]])
    logits = model.logits(model.hidden_states(text[None])[-1, 0])
    logp = jax.nn.log_softmax(logits)[jnp.arange(16, 22), text[17:]]
    np.testing.assert_allclose(scores.logprobs[0], logp, atol=1e-4)


@pytest.mark.exhaustive
def test_gradients_of_the_fused_loss_are_those_of_plain_logits(variant, tiny_folder):
    """Both forms: the scanned one with the fused loss, the separate one with every layer's logits at once."""
    model = model_of(tiny_folder(variant))
    ids_BT = jnp.asarray(np.random.RandomState(0).randint(3, 48, (2, 12)))
    targets_BT, mask_BT, exits = jnp.roll(ids_BT, -1, 1), jnp.ones((2, 12), bool).at[:, -1].set(False), (1, 3)
    weights_E = jnp.array([0.25, 0.75])

    def fused(state):
        stacked = nnx.merge(graph, state)
        h_EBTD = stacked.normalise(exit_states(stacked, ids_BT, exits))
        return exit_cross_entropy(h_EBTD, stacked.shared_head, targets_BT, mask_BT, weights_E)[0]

    def plain(state):
        separate = nnx.merge(graph, state).unstack()
        states = separate.hidden_states(ids_BT)
        logp = jax.nn.log_softmax(separate.logits(states[jnp.array(exits)]))
        picked = jnp.take_along_axis(logp, targets_BT[None, ..., None], -1)[..., 0]
        return -(weights_E @ (picked * mask_BT).sum((1, 2))) / mask_BT.sum()

    graph, state = nnx.split(model.stack())
    (loss, by), (expected, by_plain) = (jax.jit(jax.value_and_grad(f))(state) for f in (fused, plain))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(by), jax.tree.leaves(by_plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, float(jnp.abs(theirs).max())))
