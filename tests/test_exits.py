"""Early exit and self-speculation: against a full pass for every token, and what they promise."""

import dataclasses
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm as tiny
from tiny_lm import (
    CAPACITY,
    CONFIG,
    EOS,
    PROMPTS,
    SAMPLED,
    FullPass,
    compiled,
    generate,
    talking_lm,
    tiny_lm,
    totals,
)

import sled
from sled.exits import FullDepth
from sled.lm import LM
from sled.results import Stats


def sureness(policy, logits_BSV, states, index):
    """The confidence [B, S] of the exit with this index."""
    p_BSV = np.asarray(jax.nn.softmax(logits_BSV))
    first, second = np.sort(p_BSV)[..., :-3:-1].transpose(2, 0, 1)
    h, below = states[policy.layers[index]], states[policy.layers[index] - 1]
    match policy.measure:
        case "max_probability":
            return first
        case "margin":
            return first - second
        case "entropy":
            return 1 + (p_BSV * np.log(np.maximum(p_BSV, 1e-30))).sum(-1) / np.log(CONFIG.vocab_size)
        case "saturation":
            cosine = (h * below).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(below, axis=-1)
            return np.maximum(cosine, 0)
        case "classifier":
            return jax.nn.sigmoid(h @ policy.classifier.weight_ED[index] + policy.classifier.bias_E[index])


def full_passes(policy, fusion, out):
    """The (token, layer) of every new token, each after what `out` has before it: [(tokens, layers)] of the rows.

    With exact K/V nothing else is needed: what a token's deeper layers see does not depend on exits.
    """
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)]
    passed, layers = FullPass(texts), (*policy.layers, CONFIG.num_layers)
    logits_LBSV = np.stack([passed.logits(fusion, layer) for layer in layers])
    sure_EBS = np.stack([sureness(policy, logits, passed.states, i) for i, logits in enumerate(logits_LBSV[:-1])])
    for b, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        at_T = np.arange(len(prompt) - 1, len(text) - 1)
        limit_ET = np.broadcast_to(policy.threshold, len(policy.layers))[:, None]
        if policy.decay != "none":
            late = limit_ET if policy.decay == "calm-code" else 1
            limit_ET = 0.9 * limit_ET + 0.1 * late * np.exp(
                -policy.decay_temperature * (at_T - at_T[0]) / (CAPACITY - len(prompt)))
        leaves_ET = (sure_EBS[:, b, at_T] > limit_ET) & (np.array(policy.layers)[:, None] >= policy.min_layer)
        first_T = np.vstack([leaves_ET, np.ones(len(at_T), bool)]).argmax(0)
        yield logits_LBSV[first_T, b, at_T].argmax(-1).tolist(), np.array(layers)[first_T].tolist()


CLASSIFIER = sled.Classifier(jnp.asarray(np.random.default_rng(3).normal(size=(2, 32)) / 6, jnp.float32), jnp.zeros(2))
MOST_LIKELY = sled.EarlyExit((1, 3), threshold=(0.08, 0.07), max_deferred=3)
MARGIN = sled.EarlyExit((1, 3), threshold=(0.1, 0.05), measure="margin")
CLASSIFIED = sled.EarlyExit((2, 3), threshold=0.5, measure="classifier", classifier=CLASSIFIER)
EARLY = {
    "max_probability": (MOST_LIKELY, sled.FinalLayer()),
    "margin, fused": (MARGIN, sled.SLED()),
    "entropy, decaying": (sled.EarlyExit(2, threshold=0.03, measure="entropy", decay="calm-paper"), sled.DoLa((1,))),
    "saturation, min layer": (sled.EarlyExit((1, 2, 3), threshold=(0.1, 0.9, 0.99), measure="saturation", min_layer=2,
                                             decay="calm-code"), sled.FinalLayer()),
    "classifier": (CLASSIFIED, sled.FinalLayer()),
}
PROPAGATING = sled.EarlyExit(2, threshold=0.07, kv="propagate")
SCHEDULES = [sled.Immediate(), sled.Lockstep(), sled.Gather(rows=3, patience=5), sled.Gather(rows=8, patience=100)]


def speculation(layer=2, drafts=(1, 2, 4, 8), **settings):
    """Ragged acceptance: every row has another draft length."""
    return sled.SelfSpeculation(layer, draft=np.array(drafts), max_draft=8, **settings)


@pytest.mark.parametrize("case", EARLY)
def test_early_exit_equals_a_full_pass_and_its_numbers_compile_nothing(case):
    policy, fusion = EARLY[case]
    out = generate(exits=policy, fusion=fusion)
    assert list(zip(out.tokens, out.exit_layers, strict=True)) == list(full_passes(policy, fusion, out))
    assert len({layer for row in out.exit_layers for layer in row}) > 1  # the case is a case
    tiny.check_endings(out)

    counts = compiled()
    other = dataclasses.replace(policy, threshold=jax.tree.map(lambda x: x / 2, policy.threshold), min_layer=1,
                                decay_temperature=2.0)
    generate([[9] * n for n in (5, 11, 2, 16)], exits=other, fusion=fusion, sampling=SAMPLED, schedule=sled.Gather(8))
    assert compiled() == counts


def test_no_schedule_and_no_batch_mate_changes_a_row():
    alone = [generate(p, exits=MOST_LIKELY) for p in PROMPTS]
    for schedule in SCHEDULES:
        for prompts, mine in ((PROMPTS, alone), (PROMPTS[::-1], alone[::-1])):
            together = generate(prompts, schedule=schedule, exits=MOST_LIKELY)
            assert together.tokens == [out.tokens[0] for out in mine]
            assert together.exit_layers == [out.exit_layers[0] for out in mine]


@pytest.mark.parametrize("confidence", [0.0, 0.05])
def test_what_is_drafted_and_counted_depends_on_the_row_alone(confidence, monkeypatch):
    policy = sled.SelfSpeculation((1, 2), draft=5, confidence=confidence, adaptive=True)
    whole, lm = generate(exits=policy), talking_lm()
    assert 0 < whole.stats.accepted < whole.stats.drafted
    for schedule in (sled.Immediate(), sled.Gather(2, 1), sled.Gather(8)):
        out = generate(exits=policy, schedule=schedule)
        assert (out.exit_layers, totals(out.stats)) == (whole.exit_layers, totals(whole.stats))
    for mates in ([3, 2, 1, 0], [0, 0, 3, 3], [2, 1, 2, 2]):
        layers = generate([PROMPTS[i] for i in mates], exits=policy).exit_layers
        assert layers == [whole.exit_layers[i] for i in mates]
    short = generate(exits=policy, max_new_tokens=20)
    assert short.exit_layers == [layers[:20] for layers in whole.exit_layers]
    stop = lm.text.decode(whole.tokens[2][9:11])
    for stops in ((), (stop,)):  # what was decoded beyond a stop string does not count
        once = lm.generate(PROMPTS, exits=policy, stop=stops, max_new_tokens=CAPACITY)
        for chunk in (1, 3, 40):
            pieces = list(lm.stream(PROMPTS, exits=policy, stop=stops, chunk=chunk, max_new_tokens=CAPACITY))
            layers = [list(itertools.chain(*(piece.exit_layers[i] for piece in pieces))) for i in range(len(PROMPTS))]
            assert (layers, totals(pieces[-1].stats)) == (once.exit_layers, totals(once.stats))
    engine = sled.Engine(lm, slots=4, capacity=CAPACITY, exits=policy, limits=sled.Limits(show_exits=True))
    served = [engine.submit(prompt, max_new_tokens=CAPACITY) for prompt in (*PROMPTS[::-1], *PROMPTS)]
    results = [request.result() for request in served]
    assert [result.exit_layers for result in results] == [*whole.exit_layers[::-1], *whole.exit_layers]
    assert [2 * n for n in (whole.stats.drafted, whole.stats.accepted)] == [
        sum(result.drafted for result in results), sum(result.accepted for result in results)]
    monkeypatch.setattr("sled.decoding.batch.HEADROOM", 8)  # the caches grow
    assert generate(exits=policy).exit_layers == whole.exit_layers


@pytest.mark.parametrize("policy", [MOST_LIKELY, speculation()], ids=lambda policy: type(policy).__name__)
def test_caches_are_those_of_a_full_forward_pass(policy):
    for schedule in SCHEDULES:
        tiny.check_caches(policy, schedule)


@pytest.mark.parametrize(("policy", "fusion"), [
    (FullDepth(), sled.FinalLayer()),
    (dataclasses.replace(MOST_LIKELY, threshold=(1.0, 1.0)), sled.FinalLayer()),
    (dataclasses.replace(MARGIN, threshold=(1.0, 1.0)), sled.SLED()),
    (dataclasses.replace(PROPAGATING, threshold=1.0), sled.FinalLayer()),
    pytest.param(dataclasses.replace(PROPAGATING, threshold=1.0), sled.SLED(), marks=pytest.mark.exhaustive),
    (jax.tree.map(lambda x: np.nan * x if isinstance(x, jax.Array) else x,  # of which construction makes an error
                  dataclasses.replace(CLASSIFIED, threshold=0.0)), sled.FinalLayer()),
], ids=["full depth", "exact", "exact, fused", "propagated", "propagated, fused", "confidence not finite"])
def test_where_no_token_may_leave_it_is_plain_decoding(policy, fusion):
    out = generate(fusion=fusion, exits=policy, schedule=sled.Gather())
    assert out.tokens == generate(fusion=fusion).tokens
    assert out.exit_layers == [[CONFIG.num_layers] * len(tokens) for tokens in out.tokens]
    assert (out.stats.mean_depth, out.stats.deferred, out.stats.acceptance) == (CONFIG.num_layers, 0, None)
    assert out.stats.mean_accepted is None


def test_propagation_equals_the_slow_reference():
    """CALM's K/V: layer by layer, eagerly, with `write_kv` in place of the layers that did not run."""
    model, count = tiny_lm().build(tiny_lm().params), 18
    run_layers, write_kv = (jax.jit(f, static_argnums=(3, 4)) for f in (model.run_layers, model.write_kv))
    out = generate(exits=PROPAGATING)
    assert {layer for row in out.exit_layers for layer in row} == {2, 4}
    for prompt, expected in list(zip(PROMPTS, out.tokens, strict=True))[1::2]:
        caches, ids = model.empty_caches(1, CAPACITY, 0), list(prompt)
        for t in range(len(prompt) + count - 1):
            at = np.array([[t]])
            h = model.embed(np.array([[ids[t]]]), at)
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
            if ids[-1] == EOS:
                break
        assert expected[:count] == ids[len(prompt):]


@pytest.mark.parametrize(("policy", "fusion"), [
    *((speculation(), fusion) for fusion in (sled.FinalLayer(), sled.SLED(), sled.ConfidentDecoding())),
    pytest.param(speculation(), sled.DoLa(), marks=pytest.mark.exhaustive),
    pytest.param(speculation(drafts=(8, 8, 8, 8), adaptive=True), sled.FinalLayer(), marks=pytest.mark.exhaustive),
    (speculation((1, 2, 3), (8, 8, 8, 8), adaptive=True), sled.FinalLayer()),
    (speculation(drafts=(6, 6, 6, 6), vocabulary=jnp.arange(6, 40)), sled.FinalLayer()),
    (speculation(drafts=(6, 6, 6, 6), first_ids=40), sled.FinalLayer()),
    # A draft that ends its row waits for its verification, whatever layer the row would draft at by then.
    (sled.SelfSpeculation((1, 2), draft=5, adaptive=True), sled.FinalLayer()),
    pytest.param(sled.SelfSpeculation((1, 3), draft=5, adaptive=True), sled.FinalLayer(), marks=pytest.mark.exhaustive),
])
def test_speculation_loses_nothing(policy, fusion):
    for sampling in (sled.Sampling(), SAMPLED):
        settings = dict(fusion=fusion, sampling=sampling, seed=3)
        plain = generate(**settings).tokens
        for schedule in (None, sled.Immediate(), sled.Gather(), sled.Gather(1, 0), sled.Gather(2, 1)):
            out = generate(exits=policy, schedule=schedule, **settings)
            assert out.tokens == plain
            assert 0 < out.stats.accepted < out.stats.drafted
            assert {layer for row in out.exit_layers for layer in row} <= {*policy.layer, CONFIG.num_layers}
            tiny.check_endings(out)


@pytest.mark.parametrize("layer", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 3)), 2])
def test_speculation_loses_nothing_at_any_exit_length_or_schedule(layer):
    plain = generate().tokens
    counts = None
    for draft, confidence, schedule in ((1, 0.0, sled.Immediate()), (3, 0.4, sled.Lockstep()), (8, 0.0, sled.Gather()),
                                        (8, 0.2, sled.Gather(rows=8))):
        policy = speculation(layer, [draft] * 4, confidence=confidence)
        assert generate(exits=policy, schedule=schedule).tokens == plain
        alone = sled.SelfSpeculation(layer, draft=draft, max_draft=8, confidence=confidence)
        assert generate(PROMPTS[2], exits=alone).tokens == plain[2:3]
        counts = counts or compiled()
    assert compiled() == counts


@pytest.mark.parametrize(("policy", "fusion"), [
    (FullDepth(), sled.SLED()), (MARGIN, sled.SLED()), (speculation(), sled.SLED())],
    ids=lambda value: type(value).__name__)
def test_no_transfer_to_the_host_inside_the_loop(policy, fusion):
    lengths = tiny.decode_without_transfers(policy, fusion, sled.Gather())
    assert all(length > len(prompt) for prompt, length in zip(PROMPTS, lengths, strict=True))


def test_drafts_that_cost_more_than_they_save_are_told_once():
    lm, hopeless = LM(tiny_lm().build(tiny_lm().params)), sled.SelfSpeculation(
        2, draft=4, vocabulary=jnp.array([CONFIG.vocab_size - 1]))
    for vain in (dict(exits=sled.SelfSpeculation(3, draft=1)), dict(exits=hopeless, max_new_tokens=3)):
        assert not told_of_drafts(lm, **vain)  # they pay, or too few to tell
    [said] = told_of_drafts(lm, exits=hopeless)
    assert re.match(r"\d+% of \d+ drafts after layer 2 were accepted, so \d\.\d times as many layers ran", said)
    assert not told_of_drafts(lm, exits=hopeless) and not told_of_drafts(lm)


def told_of_drafts(lm, **settings):
    return [said for said in warned(lm, **settings) if " drafts " in said]


def test_texts_that_the_context_ends_are_told_once():
    lm = LM(tiny_lm().build(tiny_lm().params))
    assert not warned(lm, max_new_tokens=3)
    [said] = warned(lm, max_new_tokens=10 * CAPACITY)
    assert re.match(rf"\d of 4 texts ended where the model's context of {CAPACITY} tokens did, before 480 new", said)
    assert not warned(lm, max_new_tokens=10 * CAPACITY)


def warned(lm, **settings):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lm.generate(PROMPTS, **{"max_new_tokens": CAPACITY, **settings})
    return [str(one.message) for one in seen]


@pytest.mark.parametrize(("drafted", "accepted", "verifications", "layer", "over"), [
    (0, 0, 5, 2, 1.0), (20, 20, 4, 2, 72 / 192), (60, 0, 10, 2, 2.5), (60, 15, 10, 2, 1.0),
    (10, 10, 10, 7, 15 / 16), (10, 9, 10, 7, 150 / 152)])
def test_layers_over_those_of_plain_decoding(drafted, accepted, verifications, layer, over):
    stats = Stats(0, 0, 0, 0, 0, drafted, accepted, verifications)
    assert stats.layers_over_plain(layer, 8) == pytest.approx(over)
