"""Early exit and self-speculation: against a slow reference in plain Python, and what they promise."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sled
from sled.decoding import loop
from sled.decoding.generation import Generation
from sled.exits import FullDepth
from sled.fusion import SharedHead
from sled.lm import LM
from sled.models import Decoder, DecoderConfig

EOS = 5
CONFIG = DecoderConfig(family="llama", vocab_size=61, width=32, mlp_width=48, num_layers=4, num_heads=4,
                       num_kv_heads=2, head_dim=8, max_positions=96, eos_ids=(EOS,))
COUNT = 20


@pytest.fixture(scope="module")
def model():
    """Random, with deeper layers that change less and less: early layers are right now and then."""
    decoder = Decoder.init(CONFIG, rngs=nnx.Rngs(1))
    nnx.update(decoder, jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, nnx.state(decoder)))
    for n, block in enumerate(decoder.layers):
        for weight in (block.attention.o.weight, block.mlp.down.weight):
            weight[...] = weight[...] * 0.35**n
    return decoder


@pytest.fixture(scope="module")
def lm(model):
    return LM(model)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(6, 61, size=n).tolist() for n in (1, 4, 17, 30, 9, 12, 3, 25)]


@pytest.fixture(scope="module")
def states_of(model):
    """`states_of(ids)`: hidden states [L + 1, D] after the last of these tokens, by a full forward pass."""
    forward = jax.jit(lambda tokens: model.hidden_states(tokens)[:, 0])

    def states(ids):
        padded = np.zeros((1, 96), np.int32)
        padded[0, :len(ids)] = ids
        return forward(padded)[:, len(ids) - 1]

    return states


@functools.partial(jax.jit, static_argnames=("model", "layer", "fusion"))
def fused_logits(model, states, layer, fusion):
    """The fusion's logits [V] where `layer` speaks last."""
    early = fusion.early_layers(layer, tied=model.tied_head)
    picked = [model.normalise(states[n]) if fusion.norm_early else states[n] for n in early]
    h_BCD = jnp.stack([*picked, model.normalise(states[layer])])[None]
    return fusion.logits(h_BCD, SharedHead(model.head_weight))[0]


def sureness(name, logits, states, layer, classifier, index):
    p = jax.nn.softmax(logits)
    first, second = np.sort(np.asarray(p))[::-1][:2]
    h, below = states[layer], states[layer - 1]
    return {
        "max_probability": first,
        "margin": first - second,
        "entropy": 1 + float((p * jnp.log(jnp.maximum(p, 1e-30))).sum()) / np.log(len(p)),
        "saturation": max(0, float(h @ below / jnp.linalg.norm(h) / jnp.linalg.norm(below))),
        "classifier": classifier and float(
            jax.nn.sigmoid(h @ classifier.weight_ED[index] + classifier.bias_E[index])),
    }[name]


def slow_early_exit(model, states_of, prompt, policy, thresholds, fusion, count=COUNT):
    """(tokens, layers) of one row, every token through as many layers of a full forward pass as it needs.

    With exact K/V nothing else is needed: what a token's deeper layers see does not depend on exits.
    """
    ids, layers = list(prompt), []
    while len(layers) < count:
        states = states_of(ids)
        for index, layer in enumerate((*policy.layers, model.num_layers)):
            logits = fused_logits(model, states, layer, fusion)
            if layer == model.num_layers:
                break
            limit = thresholds[index]
            if policy.decay != "none":
                late = limit if policy.decay == "calm-code" else 1
                limit = 0.9 * limit + 0.1 * late * np.exp(-policy.decay_temperature * len(layers) / count)
            if layer >= policy.min_layer and sureness(policy.measure, logits, states, layer, policy.classifier,
                                                      index) > limit:
                break
        ids.append(int(jnp.argmax(logits)))
        layers.append(layer)
        if ids[-1] == EOS:
            break
    return ids[len(prompt):], layers


CLASSIFIER = sled.Classifier(jnp.asarray(np.random.default_rng(3).normal(size=(2, 32)) / 6, jnp.float32), jnp.zeros(2))
EARLY = {
    "max_probability": (sled.EarlyExit((1, 3), threshold=(0.08, 0.07)), sled.FinalLayer()),
    "margin, fused": (sled.EarlyExit((1, 3), threshold=(0.1, 0.05), measure="margin"), sled.SLED()),
    "entropy, decaying": (sled.EarlyExit(2, threshold=0.03, measure="entropy", decay="calm-paper"), sled.DoLa((1,))),
    "saturation, min layer": (sled.EarlyExit((1, 2, 3), threshold=(0.1, 0.9, 0.99), measure="saturation", min_layer=2,
                                             decay="calm-code"), sled.FinalLayer()),
    "classifier": (sled.EarlyExit((2, 3), threshold=0.5, measure="classifier", classifier=CLASSIFIER),
                   sled.FinalLayer()),
}


@pytest.mark.parametrize("case", EARLY)
def test_early_exit_equals_the_slow_reference(lm, model, states_of, prompts, case):
    policy, fusion = EARLY[case]
    thresholds = np.broadcast_to(policy.threshold, len(policy.layers))
    out = lm.generate(prompts[:3], max_new_tokens=COUNT, exits=policy, fusion=fusion)
    slow = [slow_early_exit(model, states_of, p, policy, thresholds, fusion) for p in prompts[:3]]
    assert list(zip(out.tokens, out.exit_layers, strict=True)) == slow
    assert len({layer for row in out.exit_layers for layer in row}) > 1  # the case is a case


SCHEDULES = [sled.Immediate(), sled.Lockstep(), sled.Gather(rows=3, patience=5), sled.Gather(rows=8, patience=100)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_no_schedule_and_no_batch_mate_changes_a_row(lm, prompts, schedule):
    settings = dict(max_new_tokens=COUNT, exits=sled.EarlyExit((1, 3), threshold=(0.08, 0.07), max_deferred=3))
    alone = [lm.generate(p, **settings) for p in prompts[:5]]
    for batch in (prompts[:5], prompts[4::-1]):
        together = lm.generate(batch, schedule=schedule, **settings)
        mine = alone if batch[0] == prompts[0] else alone[::-1]
        assert together.tokens == [out.tokens[0] for out in mine]
        assert together.exit_layers == [out.exit_layers[0] for out in mine]


def begin(lm, prompts, **how):
    return Generation(lm.build, lm.params, [np.array(p, np.int32) for p in prompts], limits=[COUNT] * len(prompts),
                      seeds=[0] * len(prompts), sampling=sled.Sampling(), stop_ids=(), **how)


@pytest.mark.parametrize(("policy", "schedule"), [
    *((sled.EarlyExit((1, 3), threshold=(0.08, 0.07), max_deferred=3), schedule) for schedule in SCHEDULES),
    (sled.SelfSpeculation(2, draft=4), SCHEDULES[0]),
    *(pytest.param(sled.SelfSpeculation(2, draft=4), schedule, marks=pytest.mark.exhaustive)
      for schedule in SCHEDULES[1:])], ids=repr)
def test_caches_are_those_of_a_full_forward_pass(lm, model, prompts, policy, schedule):
    run = begin(lm, prompts[:3], policy=policy, schedule=schedule, fusion=sled.FinalLayer())
    run.advance()
    state = run._state
    plan = (0, *policy.exits(CONFIG.num_layers))
    done_BE = np.asarray(state.done_BE)
    assert (done_BE[:, -1] >= np.asarray(state.length_B) - 1 - state.window).all()
    for b in range(3):
        tokens = state.tokens_BS[b:b + 1, :int(state.length_B[b])]
        positions = jnp.arange(tokens.shape[1])[None]
        _, exact = model.run_layers(model.embed(tokens), positions, None, 0, CONFIG.num_layers)
        for s, (below, top) in enumerate(itertools.pairwise(plan)):
            for layer in range(below, top):
                for ours, theirs in zip(state.caches[layer], exact[layer], strict=True):
                    np.testing.assert_allclose(ours[b, :, :done_BE[b, s]], theirs[0, :, :done_BE[b, s]], atol=1e-5)


@pytest.mark.parametrize("fusion", [sled.FinalLayer(), sled.SLED()], ids=lambda f: type(f).__name__)
def test_threshold_one_is_plain_decoding(lm, prompts, fusion):
    plain = lm.generate(prompts, max_new_tokens=COUNT, fusion=fusion)
    for policy in (sled.EarlyExit((1, 3), threshold=1.0), sled.EarlyExit((1, 3), threshold=1.0, kv="propagate")):
        out = lm.generate(prompts, max_new_tokens=COUNT, fusion=fusion, exits=policy, schedule=sled.Gather())
        assert out.tokens == plain.tokens
        assert out.stats.mean_depth == CONFIG.num_layers and out.stats.deferred == 0


def test_propagation_equals_the_slow_reference(lm, model, prompts):
    """CALM's K/V: layer by layer, eagerly, with `write_kv` in place of the layers that did not run."""
    policy = sled.EarlyExit(2, threshold=0.07, kv="propagate")
    run_layers, write_kv = (functools.partial(jax.jit(f, static_argnums=(3, 4)))
                            for f in (model.run_layers, model.write_kv))
    for prompt in prompts[1:3]:
        tokens, caches, ids = [], model.empty_caches(1, 96), list(prompt)
        for t in range(len(prompt) + COUNT - 1):
            h, at = model.embed(jnp.array([[ids[t]]])), jnp.array([[t]])
            states, low = run_layers(h, at, caches[:2], 0, 2)
            logits = model.logits(states[-1][0, 0])
            sure = float(jax.nn.softmax(logits).max())
            if t >= len(prompt) - 1 and sure > 0.07:
                high = write_kv(states[-1], at, caches[2:], 2, 4)
            else:
                states, high = run_layers(states[-1], at, caches[2:], 2, 4)
                logits = model.logits(states[-1][0, 0])
            caches = [*low, *high]
            if t >= len(prompt) - 1:
                ids.append(int(logits.argmax()))
                tokens.append(ids[-1])
                if ids[-1] == EOS:
                    break
        assert lm.generate(prompt, max_new_tokens=COUNT, exits=policy).tokens[0] == tokens


def test_a_confidence_that_is_not_finite_goes_on(lm, prompts):
    nan = dataclasses.replace(CLASSIFIER, bias_E=jnp.array([jnp.nan, jnp.nan]))
    policy = sled.EarlyExit((2, 3), threshold=0.0, measure="classifier", classifier=nan)
    out = lm.generate(prompts[:3], max_new_tokens=COUNT, exits=policy)
    assert out.tokens == lm.generate(prompts[:3], max_new_tokens=COUNT).tokens


SAMPLED = sled.Sampling(temperature=0.9, top_p=0.95, top_k=30, repetition_penalty=1.1)


@pytest.mark.parametrize(("fusion", "sampling"), [
    *itertools.product([sled.FinalLayer(), sled.SLED()], [sled.Sampling(), SAMPLED]),
    (sled.DoLa(), sled.Sampling()), (sled.ConfidentDecoding(), SAMPLED),
    pytest.param(sled.DoLa(), SAMPLED, marks=pytest.mark.exhaustive),
    pytest.param(sled.ConfidentDecoding(), sled.Sampling(), marks=pytest.mark.exhaustive)],
    ids=lambda value: type(value).__name__ if value != SAMPLED else "sampled")
def test_speculation_loses_nothing(lm, prompts, fusion, sampling):
    """Ragged acceptance: every row has another draft length; batches of 1, 3 and 8."""
    settings = dict(max_new_tokens=COUNT, fusion=fusion, sampling=sampling, seed=3)
    plain = lm.generate(prompts, **settings)
    drafts = jnp.array([1, 2, 3, 4, 5, 6, 7, 8])
    many = lm.generate(prompts, exits=sled.SelfSpeculation(2, draft=drafts, max_draft=8), **settings)
    assert many.tokens == plain.tokens
    assert 0 < many.stats.accepted < many.stats.drafted


@pytest.mark.parametrize("layer", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 3)), 2])
def test_speculation_loses_nothing_at_any_exit_length_or_schedule(lm, prompts, layer):
    plain = lm.generate(prompts, max_new_tokens=COUNT)
    for draft, confidence, schedule in ((1, 0.0, sled.Immediate()), (3, 0.4, sled.Lockstep()), (8, 0.0, sled.Gather()),
                                        (8, 0.2, sled.Gather(rows=8))):
        policy = sled.SelfSpeculation(layer, draft=draft, confidence=confidence)
        assert lm.generate(prompts, max_new_tokens=COUNT, exits=policy, schedule=schedule).tokens == plain.tokens
        assert lm.generate(prompts[2], max_new_tokens=COUNT, exits=policy).tokens == plain.tokens[2:3]


@pytest.mark.parametrize("policy", [
    pytest.param(sled.SelfSpeculation(2, draft=8, adaptive=True), marks=pytest.mark.exhaustive),
    sled.SelfSpeculation((1, 2, 3), draft=8, adaptive=True),
    sled.SelfSpeculation(2, draft=6, vocabulary=jnp.arange(6, 40)),
], ids=["length", "length and layer", "vocabulary"])
def test_speculation_that_adapts_loses_nothing(lm, prompts, policy):
    for sampling in (sled.Sampling(), SAMPLED):
        plain = lm.generate(prompts, max_new_tokens=60, sampling=sampling)
        out = lm.generate(prompts, max_new_tokens=60, sampling=sampling, exits=policy, schedule=sled.Gather())
        assert out.tokens == plain.tokens
        assert out.stats.accepted > 0
        assert {layer for row in out.exit_layers for layer in row} <= {*policy.layer, CONFIG.num_layers}


def test_sampled_speculation_follows_the_exact_distribution(lm, prompts):
    """Chi-square of the second token after a guessed first one, over 4,000 seeds, 0.999 quantile."""
    sampling = sled.Sampling(temperature=1.0)
    many = lm.generate([prompts[2]] * 4000, max_new_tokens=2, sampling=sampling, batch_size=500,
                       exits=sled.SelfSpeculation(2, draft=2))
    seen = np.zeros((61, 61))
    for tokens in many.tokens:
        seen[tokens[0], tokens[1] if len(tokens) > 1 else 0] += tokens[0] != EOS
    first = np.exp(lm.score(prompts[2], [[v] for v in range(61)]).totals)
    likely = np.argsort(first)[::-1][:3]
    assert EOS not in likely
    for v in likely:
        second = np.exp(lm.score(prompts[2] + [int(v)], [[w] for w in range(61)]).totals)
        expected, got = seen[v].sum() * second, seen[v]
        common = expected >= 5
        expected = np.append(expected[common], expected[~common].sum())
        got = np.append(got[common], got[~common].sum())
        statistic = float(((got - expected) ** 2 / np.maximum(expected, 1e-9)).sum())
        freedom = len(expected) - 1
        assert statistic < freedom + 3.09 * (2 * freedom) ** 0.5 + 10


def test_nothing_tuned_compiles_again(lm, prompts):
    def run(length, **settings):
        lm.generate(list(range(6, 6 + length)), max_new_tokens=40, **settings)

    cases = [
        (dict(exits=sled.EarlyExit((1, 3), threshold=0.9), schedule=sled.Gather(2, 3)),
         dict(exits=sled.EarlyExit((1, 3), threshold=0.1, min_layer=2), schedule=sled.Gather(8, 100))),
        (dict(exits=sled.EarlyExit((1, 3), threshold=(0.9, 0.5))),
         dict(exits=sled.EarlyExit((1, 3), threshold=(1, 0)), schedule=sled.Lockstep())),
        (dict(exits=sled.SelfSpeculation(2, draft=8)), dict(exits=sled.SelfSpeculation(2, draft=1, confidence=0.5))),
    ]
    for first, second in cases:
        run(9, **first)
        count = loop.decode._cache_size()
        run(13, **second)
        assert loop.decode._cache_size() == count


@pytest.mark.parametrize("policy", [sled.EarlyExit((1, 3), threshold=0.5), sled.SelfSpeculation(2, draft=4)],
                         ids=lambda p: type(p).__name__)
def test_no_transfer_to_the_host_inside_the_loop(lm, prompts, policy):
    run = begin(lm, prompts[2:3], policy=policy, schedule=sled.Gather(), fusion=sled.SLED())
    arguments = run.arguments(np.array([len(prompts[2]) + COUNT]))
    arguments = {k: v if k == "build" else jax.device_put(v) for k, v in arguments.items()}
    with jax.transfer_guard("disallow"):
        after = loop.decode(**arguments)
    assert int(after.length_B[0]) > len(prompts[2])


def test_stop_strings_and_streams_see_verified_tokens_only(lm, prompts):
    policy = sled.SelfSpeculation(2, draft=6)
    pieces = list(lm.stream(prompts, chunk=3, max_new_tokens=COUNT, exits=policy))
    joined = [[t for piece in pieces for t in piece.tokens[i]] for i in range(len(prompts))]
    assert joined == lm.generate(prompts, max_new_tokens=COUNT).tokens


@pytest.mark.parametrize(("build", "says"), [
    (lambda: sled.EarlyExit(2, threshold=40.0), "threshold is 40.0"),
    (lambda: sled.EarlyExit(2, threshold=-0.1), "threshold"),
    (lambda: sled.EarlyExit(2, threshold=float("nan")), "threshold"),
    (lambda: sled.EarlyExit((1, 2), threshold=(0.5, 0.5, 0.5)), "3 numbers for 2 exits"),
    (lambda: sled.EarlyExit((1, 2), threshold=(0.5, 1.5)), "1.5"),
    (lambda: sled.EarlyExit(0), "layers is 0"),
    (lambda: sled.EarlyExit(()), "layers"),
    (lambda: sled.EarlyExit("low"), "low"),
    (lambda: sled.EarlyExit(2, measure="hope"), "hope"),
    (lambda: sled.EarlyExit(2, measure="classifier"), "classifier"),
    (lambda: sled.EarlyExit(2, measure="classifier", classifier=sled.Classifier), "an instance, .* sled.Classifier"),
    (lambda: sled.EarlyExit(2, measure="classifier", classifier=np.ones(3)), "sled.Classifier"),
    (lambda: sled.EarlyExit(2, kv="none"), "none"),
    (lambda: sled.EarlyExit(2, decay="fast"), "fast"),
    (lambda: sled.EarlyExit(2, max_deferred=0), "max_deferred is 0"),
    (lambda: sled.SelfSpeculation(2, draft=0), "draft is 0"),
    (lambda: sled.SelfSpeculation(2, draft=9, max_draft=8), "draft is 9"),
    (lambda: sled.SelfSpeculation(2, draft=jnp.array([1, 2])), "max_draft"),
    (lambda: sled.SelfSpeculation(2, confidence=2), "confidence is 2"),
    (lambda: sled.SelfSpeculation((1, 2)), "adaptive"),
    (lambda: sled.SelfSpeculation((1, 2), adaptive="yes"), "adaptive is 'yes', but must be True or False"),
    (lambda: sled.SelfSpeculation(2, vocabulary="abc"), "vocabulary is 'abc'"),
    (lambda: sled.SelfSpeculation(2, vocabulary=[0.5]), "a list of token ids"),
    (lambda: sled.SelfSpeculation(2, vocabulary=[]), "a list of token ids"),
    (lambda: sled.Gather(rows=0), "rows is 0"),
    (lambda: sled.Gather(patience=-1), "patience is -1"),
    (lambda: sled.Gather(rows=2**40), "rows is 1099511627776"),
    (lambda: sled.Gather(patience=2**31), "patience is 2147483648"),
    (lambda: sled.EarlyExit(2, min_layer=2**40), "min_layer"),
    (lambda: sled.SelfSpeculation(2, max_draft=2**40), "max_draft"),
])
def test_bad_settings_are_named(build, says):
    with pytest.raises(sled.SettingError, match=says):
        build()


@pytest.mark.parametrize("policy", [sled.EarlyExit((1, 4)), sled.EarlyExit(9), sled.SelfSpeculation(4)], ids=repr)
def test_exits_outside_the_model_are_named(lm, policy):
    with pytest.raises(sled.SettingError, match="model of 4 layers"):
        lm.generate([7, 8], exits=policy)


def test_full_depth_is_the_default(lm, prompts):
    out = lm.generate(prompts[0], max_new_tokens=4, exits=FullDepth())
    assert out.exit_layers == [[4] * len(out.tokens[0])]
    assert out.stats.acceptance is None and out.stats.mean_accepted is None
