"""Exit heads that look back: with K/V of their own, that are exact whatever left, was not kept, or came later."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from headed_models import CONFIG, stirred
from tiny_lm import settling

import sled
from sled.decoding.batch import Generation
from sled.decoding.readout import Readout
from sled.lm import LM
from sled.models import ExitHeads
from sled.models.config import Experts
from sled.models.decoder import Decoder
from sled.models.layers import MLP, LayerContext
from sled.survey.choices import layer_choices
from sled.train.objective.exit_heads import read_exits

COUNT = 14
PROMPTS = [np.random.default_rng(7).integers(6, 47, size=n).tolist() for n in (1, 5, 9)]
SLED = sled.SLED(layers=(1, 3))
SEVERAL = sled.EarlyExit((1, 3), threshold=(0.07, 0.052), max_deferred=2)
DRAFTS = sled.SelfSpeculation(1, draft=3, max_draft=3)
WINDOWS = (None, 4, None, 5)  # the head after layer 1 sees 4 tokens back, that after layer 3 sees 5


@functools.cache
def lm():
    """A model with block heads after layers 1 and 3, moved from where they start."""
    config = dataclasses.replace(CONFIG, windows=WINDOWS)
    return LM(stirred(settling(config, 0.4).with_exit_heads(ExitHeads((1, 3), "block"), rngs=nnx.Rngs(0))))


def model():
    return lm().build(lm().params)


def generate(prompts=PROMPTS, **settings):
    return lm().generate(prompts, max_new_tokens=COUNT, **settings)


@functools.partial(jax.jit, static_argnames="build")
def _whole(build, params, ids_1S):
    at = jnp.arange(ids_1S.shape[1])[None]
    readout = Readout(build(params))
    h0 = readout.network.embed(ids_1S, at)
    states, _, kv = readout.run_layers(h0, at, None, None, 0, 4)
    states = {n: h[0] for n, h in (states | {0: h0}).items()}
    return readout.fuse(SLED, states, 4), kv


def whole(ids):
    """Of a full pass without caches: SLED's logits [T, V], and the heads' K/V."""
    return _whole(lm().build, lm().params, np.pad(ids, (0, 32 - len(ids)))[None])


def fused(prompt, text):
    """SLED's logits [T, V] of the text's tokens, by a full pass."""
    return np.asarray(whole([*prompt, *text])[0])[len(prompt) - 1:len(prompt) + len(text) - 1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", [SEVERAL, dataclasses.replace(SEVERAL, kv="propagate"), DRAFTS,
                                    sled.SelfSpeculation((1, 3), draft=3, max_draft=3, adaptive=True)])
def test_a_heads_keys_and_values_are_those_of_the_layers_below(policy):
    """As far as the layers below have come; of a propagated token only where all left at the last."""
    run = Generation(lm().build, lm().params, [np.array(p, np.int32) for p in PROMPTS],
                     sled.Decoding(sled.FinalLayer(), policy), limits=[32 - len(p) for p in PROMPTS], seeds=[0] * 3,
                     stop_ids=())
    run.advance(10)
    held, exits = run._state, run._plan.exits
    tokens_BS, kv_len_BE = np.asarray(held.text.tokens_BS), np.asarray(held.progress.kv_len_BE)
    for b, length in enumerate(held.text.length_B.tolist()):
        exact = whole(tokens_BS[b, :length])[1]
        for n, kv in held.head_caches.items():
            known = kv_len_BE[b, exits.index(n)]
            if policy.propagates and n == 3:
                known = len(PROMPTS[b]) - 1
            size = kv[0].shape[2] - 1
            for p in range(max(0, length - WINDOWS[n]), known):
                for x, y in zip(kv, exact[n], strict=True):
                    np.testing.assert_allclose(x[b, :, p % size], y[0, :, p], atol=1e-5)
    assert set(held.head_caches) == {n for n in exits if n < 4}


def test_a_fusion_reads_early_layers_by_their_heads_however_it_is_decoded():
    for prompt, text in zip(PROMPTS, generate(fusion=SLED, exits=DRAFTS).tokens, strict=True):
        assert text == fused(prompt, text).argmax(-1).tolist()


@pytest.mark.exhaustive
def test_and_in_every_other_way_too():
    for settings in ({}, dict(exits=sled.SelfSpeculation((1, 3), draft=3, max_draft=3, adaptive=True))):
        out = generate(fusion=SLED, **settings)
        for prompt, text in zip(PROMPTS, out.tokens, strict=True):
            assert text == fused(prompt, text).argmax(-1).tolist()
    scores = lm().score(PROMPTS, out.tokens, fusion=SLED)
    for prompt, text, logp in zip(PROMPTS, out.tokens, scores.logprobs, strict=True):
        wanted = jax.nn.log_softmax(fused(prompt, text))[np.arange(len(text)), text]
        np.testing.assert_allclose(logp, wanted, atol=1e-4)
    lens = lm().lens([*PROMPTS[2], *out.tokens[2]], fusion=SLED)
    np.testing.assert_array_equal(lens.fused[len(PROMPTS[2]) - 1:-1], out.tokens[2])
    [choices] = layer_choices(lm(), [(np.array(PROMPTS[2]), np.array(out.tokens[2]))], batch_size=1, progress=False)
    np.testing.assert_array_equal(lens.top[1:, len(PROMPTS[2]) - 1:-1], choices.token_LT)


@pytest.mark.exhaustive
def test_rows_that_join_later_bring_their_own():
    engine = sled.Engine(lm(), slots=2, capacity=32, exits=SEVERAL)
    asked = [*PROMPTS, PROMPTS[1][::-1], PROMPTS[2][::-1]]
    requests = [engine.submit(prompt, max_new_tokens=COUNT) for prompt in asked]
    engine.run()
    assert [request.result().tokens for request in requests] == generate(asked, exits=SEVERAL).tokens


def test_in_training_a_document_sees_itself_alone():
    h_EBTD = jax.random.normal(jax.random.key(0), (2, 1, 9, 16))
    stacked = model().stack()
    read = jax.jit(lambda h_EBTD, segments_BT: read_exits(stacked, h_EBTD, (1, 3), segments_BT))
    packed = read(h_EBTD, np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]]))
    alone = read(jnp.roll(h_EBTD, -3, axis=2), np.array([[7] * 9]))  # causal: what follows the document hides nothing
    np.testing.assert_allclose(packed[:, :, 3:7], alone[:, :, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [
    dict(norms_at="around", norm="rms_plus_one", qk_norm="whole", experts=Experts(4, 2, 8), sinks=True),
    dict(rope=None, norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True, gated=False)])
def test_in_every_form_of_layer_it_begins_as_nothing_and_learns(changes):
    at, h_BTD = jnp.arange(5)[None], jax.random.normal(jax.random.key(0), (2, 5, 16))

    @jax.jit
    def made():
        decoder = Decoder.init(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
        stir = lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)  # noqa: E731
        nnx.update(decoder, jax.tree.map(stir, nnx.state(decoder)))
        head = decoder.with_exit_heads(ExitHeads((2,), "block")).exit_head(2)
        assert isinstance(head.head.block.mlp, MLP)
        graph, state = nnx.split(head.head.block)
        context = LayerContext.of(decoder.config, at)
        slopes = jax.grad(lambda state: (nnx.merge(graph, state)(h_BTD, context, None)[0] ** 3).sum())(state)
        keys = [block.attention.k.weight[...] for block in (head.head.block, decoder.layers[2])]
        return head.run(h_BTD, at, None)[0], slopes, keys

    said_BTD, slopes, (own, above) = made()
    np.testing.assert_array_equal(said_BTD, h_BTD)
    np.testing.assert_array_equal(own, above)
    assert sum(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(slopes)) >= 2
