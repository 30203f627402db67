"""The decoding loop against a slow reference, and the independence of rows, padding, buckets and chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sled
from sled.decoding import loop, state
from sled.decoding.sampling import penalise, truncate
from sled.exits import FullDepth
from sled.exits.schedule import Timing
from sled.fusion import SharedHead
from sled.lm import LM
from sled.models import Decoder, DecoderConfig

EOS = 5
CONFIG = DecoderConfig(family="llama", vocab_size=61, width=32, mlp_width=48, num_layers=3, num_heads=4,
                       num_kv_heads=2, head_dim=8, max_positions=400, eos_ids=(EOS,))
FUSIONS = [sled.FinalLayer(), sled.SLED(), sled.DoLa(), sled.ConfidentDecoding(), sled.LayerAverage(), sled.ClampOnly()]


@pytest.fixture(scope="module")
def model():
    decoder = Decoder.init(CONFIG, rngs=nnx.Rngs(0))
    # Larger weights than usual, so that the layers really disagree.
    nnx.update(decoder, jax.tree.map(lambda x: 5 * x if x.ndim == 2 else x, nnx.state(decoder)))
    return decoder


@pytest.fixture(scope="module")
def lm(model):
    return LM(model)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(6, 61, size=n).tolist() for n in (1, 3, 17, 30, 9)]


def slow_greedy(model, prompt, count, fusion):
    """Greedy decoding as one would write it on paper: the whole text through the model for every token."""
    ids = list(prompt)
    early = fusion.early_layers(CONFIG.num_layers, tied=model.tied_head)
    forward = jax.jit(lambda tokens: model.hidden_states(tokens)[:, 0])
    while len(ids) < len(prompt) + count:
        padded = np.zeros((1, 64), np.int32)
        padded[0, :len(ids)] = ids
        states = forward(padded)[:, len(ids) - 1]
        picked = [model.normalise(states[i]) if fusion.norm_early else states[i] for i in early]
        h_BCD = jnp.stack([*picked, model.normalise(states[-1])])[None]
        ids.append(int(jnp.argmax(fusion.logits(h_BCD, SharedHead(model.head_weight))[0])))
        if ids[-1] == EOS:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
def test_every_fusion_equals_the_slow_reference_in_a_ragged_batch(lm, model, prompts, fusion):
    out = lm.generate(prompts, max_new_tokens=14, fusion=fusion)
    assert out.tokens == [slow_greedy(model, p, 14, fusion) for p in prompts]


def test_rows_do_not_depend_on_mates_bucket_or_batch_size(lm, prompts):
    sampling = sled.Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    together = lm.generate(prompts, max_new_tokens=20, sampling=sampling, seed=7)
    alone = [lm.generate(p, max_new_tokens=20, sampling=sampling, seed=7 + i).tokens[0] for i, p in enumerate(prompts)]
    assert together.tokens == alone
    assert lm.generate(prompts, max_new_tokens=20, sampling=sampling, seed=7, batch_size=2).tokens == alone
    assert lm.generate(prompts, max_new_tokens=90, sampling=sampling, seed=7).tokens[0][:20] == alone[0]


def test_growing_the_caches_changes_nothing(lm, prompts, monkeypatch):
    whole = lm.generate(prompts, max_new_tokens=60).tokens
    monkeypatch.setattr("sled.decoding.generation.HEADROOM", 4)
    assert lm.generate(prompts, max_new_tokens=60).tokens == whole


def test_long_prompts_are_read_in_blocks(lm, monkeypatch):
    prompt = np.random.default_rng(1).integers(6, 61, size=100).tolist()
    whole = lm.generate(prompt, max_new_tokens=10).tokens
    monkeypatch.setattr(state, "PREFILL_BLOCK", 16)
    assert lm.generate(prompt, max_new_tokens=10).tokens == whole


def test_streaming_gives_the_same_tokens_in_pieces(lm, prompts):
    pieces = list(lm.stream(prompts, chunk=3, max_new_tokens=14))
    joined = [[t for piece in pieces for t in piece.tokens[i]] for i in range(len(prompts))]
    assert len(pieces) > 1
    assert joined == lm.generate(prompts, max_new_tokens=14).tokens


def test_tuning_numbers_and_prompts_of_a_bucket_compile_nothing(lm):
    def run(length, **settings):
        lm.generate(list(range(6, 6 + length)), max_new_tokens=40, **settings)

    run(9, fusion=sled.SLED(rate=2.0, scale=10), sampling=sled.Sampling(temperature=1.0, top_p=0.9))
    counts = loop.decode._cache_size(), state.prefill._cache_size()
    run(13, fusion=sled.SLED(rate=0.5, scale=5, steps=3, lower_bound=-100.0), sampling=sled.Sampling(temperature=0.7))
    run(11, fusion=sled.SLED(rate=1, scale=16), sampling=sled.Sampling(top_k=4, min_p=0.1, repetition_penalty=1.05))
    assert (loop.decode._cache_size(), state.prefill._cache_size()) == counts


def test_generation_ends_at_eos_and_at_the_context(lm, model, prompts):
    out = lm.generate(prompts, max_new_tokens=1000, sampling=sled.Sampling(temperature=1.0))
    for prompt, tokens, reason in zip(prompts, out.tokens, out.finish_reasons, strict=True):
        assert EOS not in tokens[:-1]
        assert (reason == "eos") == (tokens[-1] == EOS)
        assert reason == "eos" or len(prompt) + len(tokens) == CONFIG.max_positions


def test_no_transfer_to_the_host_inside_the_loop(lm, prompts):
    fusion, policy = sled.SLED(), FullDepth()
    plan = state.Plan.of(policy, fusion, lm.build(lm.params))
    begun = state.start(lm.build, lm.params, [np.array(prompts[2], np.int32)], [30], [0], capacity=32, plan=plan)
    arguments = jax.device_put((lm.params, begun, policy, Timing(np.int32(1), np.int32(0)), fusion, sled.Sampling(),
                                np.array([EOS], np.int32), np.array([30], np.int32), np.int32(8), np.int32(1)))
    with jax.transfer_guard("disallow"):
        after = loop.decode(lm.build, *arguments)
    assert int(after.length_B[0]) > len(prompts[2])


def test_sampling_follows_the_exact_distribution(lm, prompts):
    """Chi-square of 2,000 first tokens against the softmax of the logits, 0.999 quantile."""
    many = [prompts[2]] * 2000
    first = [t[0] for t in lm.generate(many, max_new_tokens=1, sampling=sled.Sampling(temperature=2.0),
                                       batch_size=500).tokens]
    scores = lm.score(prompts[2], [[v] for v in range(CONFIG.vocab_size)])
    p_V = np.exp(np.array(scores.totals) / 2)
    p_V /= p_V.sum()
    expected, seen = 2000 * p_V, np.bincount(first, minlength=CONFIG.vocab_size)
    common = expected >= 5
    expected = np.append(expected[common], expected[~common].sum())
    seen = np.append(seen[common], seen[~common].sum())
    statistic = float(((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 3.09 * (2 * freedom) ** 0.5 + 10


def test_truncation_and_penalty_by_hand():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]] * 4))
    kept = jnp.isfinite(truncate(logits, jnp.array([2, 0, 0, 3]), jnp.array([1, 0.6, 1, 0.5]),
                                 jnp.array([0, 0, 0.45, 0])))
    assert kept.tolist() == [[True, True, False, False], [True, True, False, False],
                             [True, True, True, False], [True, True, False, False]]
    out = penalise(jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]]), jnp.array([2.0]))
    assert out.tolist() == [[1.0, -4.0, 1.0]]


def test_scores_equal_a_full_forward_pass(lm, model, prompts):
    continuations = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16]]
    scores = lm.score([prompts[2], prompts[3]], [continuations, [[20, 21]]], batch_size=2)
    [raw] = lm.score(prompts[3], [20, 21], normalise=False).logprobs
    logits_TV = model.logits(model.hidden_states(jnp.array([prompts[3] + [20, 21]]))[-1, 0])
    np.testing.assert_allclose(raw, logits_TV[[len(prompts[3]) - 1, len(prompts[3])], [20, 21]], atol=1e-4)
    for prompt, texts, rows in ((prompts[2], continuations, scores.logprobs[0]),
                                (prompts[3], [[20, 21]], scores.logprobs[1])):
        for text, logprobs in zip(texts, rows, strict=True):
            states = model.hidden_states(jnp.array([prompt + text]))
            logp = jax.nn.log_softmax(model.logits(states[-1, 0]))
            expected = [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(text)]
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
def test_greedy_tokens_score_as_greedy_under_every_fusion(lm, prompts, fusion):
    tokens = lm.generate(prompts[3], max_new_tokens=6, fusion=fusion).tokens[0]
    scores = lm.score(prompts[3], [tokens, [tokens[0] + 1, *tokens[1:]]], fusion=fusion)
    assert scores.greedy == [True, False]
    assert scores.logprobs[0][0] > scores.logprobs[1][0]  # at the same place; what follows may be anything


def test_lens_shows_the_models_own_choices(lm, prompts):
    lens = lm.lens(prompts[3], fusion=sled.SLED())
    assert lens.top.shape == (CONFIG.num_layers + 1, len(prompts[3])) == lens.entropy.shape
    assert lens.top[-1, -1] == lm.generate(prompts[3], max_new_tokens=1).tokens[0][0]
    assert lens.fused[-1] == lm.generate(prompts[3], max_new_tokens=1, fusion=sled.SLED()).tokens[0][0]
    np.testing.assert_allclose(lens.final_probability[-1], lens.probability[-1], rtol=1e-5)
    assert (lens.agrees_from >= 0).all() and (lens.agrees_from <= CONFIG.num_layers).all()
    assert "layer 3" in lens.table()


def test_sampling_is_a_pytree_of_its_numbers():
    leaves, structure = jax.tree.flatten(sled.Sampling(temperature=1, top_k=5.0))
    assert leaves == [1.0, 5, 1.0, 0.0, 1.0]
    assert jax.tree.unflatten(structure, leaves) == sled.Sampling(temperature=1.0, top_k=5)
    # A transformation may fill the leaves with anything, even what no user may set.
    assert jax.tree.map(lambda _: None, sled.Sampling()).top_p is None
