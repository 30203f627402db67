"""The decoding loop against a full pass for every token, and the independence of rows, padding, buckets and chunks."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lm import (
    CAPACITY,
    CONFIG,
    EOS,
    PROMPTS,
    SAMPLED,
    FullPass,
    check_endings,
    compiled,
    generate,
    tiny_lm,
    totals,
)

import sled.lm
from sled.decoding import programs, state
from sled.decoding.options import FULL_DEPTH
from sled.decoding.rows import batch_height, shape_of_runs
from sled.decoding.sampling import penalise, truncate
from sled.errors import SettingError
from sled.exits import FullDepth
from sled.settings.per_row import check_rows

FUSIONS = [sled.FinalLayer(), sled.SLED(), sled.DoLa(), sled.ConfidentDecoding(), sled.LayerAverage(), sled.ClampOnly()]


def check_distribution(draws, probabilities_V) -> None:
    """Chi-square of draws from the vocabulary, 0.999 quantile; tokens expected less than five times count together."""
    expected, seen = len(draws) * probabilities_V, np.bincount(draws, minlength=len(probabilities_V))
    common = expected >= 5
    expected = np.append(expected[common], expected[~common].sum())
    seen = np.append(seen[common], seen[~common].sum())
    freedom = len(expected) - 1
    assert ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < freedom + 3.09 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
def test_every_fusion_generates_and_scores_as_a_full_pass_does(fusion):
    out = generate(fusion=fusion)
    check_endings(out)
    texts = [prompt + text for prompt, text in zip(PROMPTS, out.tokens, strict=True)]
    for prompt, text, best_S in zip(PROMPTS, out.tokens, FullPass(texts).logits(fusion).argmax(-1), strict=True):
        assert text == best_S[len(prompt) - 1:len(prompt) + len(text) - 1].tolist()

    right = [tokens[:3 + b] for b, tokens in enumerate(out.tokens)]
    wrong = [[tokens[0] + 1, *tokens[1:]] for tokens in right]
    scores = tiny_lm().score(PROMPTS, [[[7], mine, other] if b < 2 else [mine, other]
                                       for b, (mine, other) in enumerate(zip(right, wrong, strict=True))],
                             fusion=fusion, batch_size=4)
    assert [of_prompt[-2:] for of_prompt in scores.greedy] == [[True, False]] * 4
    for at, texts in ((-2, right), (-1, wrong)):
        passed = FullPass([prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)])
        logp_BSV = np.asarray(jax.nn.log_softmax(passed.logits(fusion)))
        for b, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            expected = logp_BSV[b, len(prompt) - 1 + np.arange(len(text)), text]
            np.testing.assert_allclose(scores.logprobs[b][at], expected, atol=1e-4)


@pytest.mark.parametrize(("usual", "others"), [
    (sled.SLED(), [sled.SLED(rate=0.05), sled.SLED(rate=0.3, scale=5), sled.SLED(rate=0.1, lower_bound=1.5)]),
    (sled.DoLa(), [sled.DoLa(relative_top=0.5), sled.DoLa(relative_top=0.9)])], ids=["SLED", "DoLa"])
def test_tokens_that_are_certain_are_those_of_a_full_pass(usual, others):
    generate(fusion=usual)
    programs = compiled()
    for fusion in others:
        texts = generate(fusion=fusion).tokens
        final_BSV, fused_BSV = (FullPass([prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]).logits(f)
                              for f in (sled.FinalLayer(), fusion))
        certain_BS, seen = jax.vmap(fusion.certain)(final_BSV), set()
        for b, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            here = np.s_[b, len(prompt) - 1:len(prompt) + len(text) - 1]
            assert text == fused_BSV[here].argmax(-1).tolist()
            seen |= set(np.asarray(certain_BS[here]).tolist())
        assert seen == {False, True}
    assert compiled() == programs


BEGUN = PROMPTS[2][:13]


@pytest.mark.parametrize("prompts, shared, runs", [
    ([BEGUN + tail for tail in ([7], [8, 9], [10] * 5, [7, 8])], 13, [1, 4]),
    ([BEGUN + tail for tail in ([], [8, 9], [10] * 5, [7, 8])], 12, [1, 4]),
    ([BEGUN + tail for tail in ([6, 7, 8], [6, 7, 9], [6, 7], [6, 7, 8, 9])], 14, [1, 4]),
    ([[*BEGUN, 6, 7, 8]] * 4, 15, [1]), ([BEGUN, [*BEGUN[:4], 7], BEGUN, BEGUN], 4, [4]),
    ([[7, *BEGUN], *[BEGUN] * 3], 0, [4])], ids=range(6))
def test_what_all_prompts_begin_with_is_run_once(prompts, shared, runs, monkeypatch):
    score = lambda: tiny_lm().score(prompts, [[20, 21]] * 4, batch_size=4).logprobs  # noqa: E731
    tokens, scores = generate(prompts).tokens, score()
    rows, prefill = [], state.prefill
    monkeypatch.setattr(state, "SHARED", 8)
    monkeypatch.setattr(state, "prefill", lambda build, params, begun, *at, block: rows.append(
        len(begun.text.length_B)) or prefill(build, params, begun, *at, block=block))
    assert state.shared_length([np.array(prompt) for prompt in prompts]) == shared
    assert generate(prompts).tokens == tokens and rows == runs
    np.testing.assert_allclose(score(), scores, atol=1e-4)


@pytest.mark.parametrize("fusion, kept, normalise", [
    (sled.SLED(scale=3), 3, True), (sled.SLED(scale=3, lower_bound=-9.0), 3, True), (sled.SLED(scale=12), 12, True),
    (sled.SLED(scale=12, log_softmax=True), 12, False), (sled.ClampOnly(scale=7), 7, False),
    (sled.ClampOnly(scale=61, max_scale=61), 61, False), (sled.DoLa(relative_top=1.0), 1, True),
    (sled.DoLa(relative_top=1e-30, lower_bound=-9.0), 61, True), (sled.FinalLayer(), 61, True)], ids=str)
def test_scores_mark_the_tokens_that_are_left_out(fusion, kept, normalise):
    scores = tiny_lm().score(PROMPTS[1], [[token] for token in range(CONFIG.vocab_size)], fusion=fusion,
                             batch_size=CONFIG.vocab_size, normalise=normalise)
    logp_V, left_V = np.array(scores.logprobs)[:, 0], np.array(scores.left_out)[:, 0]
    assert (~left_V).sum() == kept and scores.greedy[int(logp_V.argmax())] and not left_V[logp_V.argmax()]
    assert len(set(logp_V[left_V].tolist())) <= 1 and (logp_V[left_V] < logp_V[~left_V].min()).all()


def test_scores_that_are_not_normalised_are_logits():
    scores = tiny_lm().score(PROMPTS, [[20, 21]] * 4, normalise=False, batch_size=4)
    logits_BSV = FullPass([[*prompt, 20, 21] for prompt in PROMPTS]).logits(sled.FinalLayer())
    for prompt, raw, logits_SV in zip(PROMPTS, scores.logprobs, logits_BSV, strict=True):
        np.testing.assert_allclose(raw, logits_SV[[len(prompt) - 1, len(prompt)], [20, 21]], atol=1e-4)


@pytest.mark.parametrize("sampling", [sled.Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_rows_do_not_depend_on_mates_capacity_limit_or_batch_size(sampling, monkeypatch):
    settings = dict(sampling=sampling, seed=7)
    together = generate(**settings).tokens
    assert [generate(p, sampling=sampling, seed=7 + i).tokens[0] for i, p in enumerate(PROMPTS)] == together
    assert generate(batch_size=3, **settings).tokens == together  # two idle rows in the second batch
    assert generate(max_new_tokens=20, **settings).tokens == [tokens[:20] for tokens in together]
    monkeypatch.setattr("sled.decoding.batch.HEADROOM", 8)
    assert generate(**settings).tokens == together  # the caches grow


def test_the_number_of_prompts_is_rounded_so_that_another_compiles_nothing():
    many = [PROMPTS[i % 4] for i in range(6)]
    expected = generate().tokens + generate().tokens[:2]
    assert generate(many).tokens == expected
    counts = compiled()
    assert generate(many[:5]).tokens == expected[:5]
    pieces = list(tiny_lm().stream(many[:5], max_new_tokens=CAPACITY, chunk=20))
    assert [list(itertools.chain(*row)) for row in zip(*(p.tokens for p in pieces), strict=True)] == expected[:5]
    assert compiled() == counts
    assert [batch_height(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


@pytest.mark.parametrize(("stages", "prompts", "batch_size", "plain", "early"), [
    (1, 1, 1, (1, 1, 1), (1, 1, 1)), (1, 5, 32, (6, 1, 6), (6, 1, 6)), (1, 40, 32, (32, 1, 32), (32, 1, 32)),
    (4, 1, 32, (1, 1, 1), (1, 1, 1)), (4, 2, 32, (1, 2, 2), (2, 1, 2)), (4, 5, 1, (1, 4, 4), (1, 4, 4)),
    (4, 7, 32, (2, 4, 8), (8, 1, 8)), (4, 40, 32, (12, 4, 48), (24, 2, 48)), (4, 500, 8, (8, 4, 32), (8, 4, 32)),
])
def test_the_shape_of_runs(stages, prompts, batch_size, plain, early):
    """Over stages batches follow each other; idle rows are few."""
    mesh = SimpleNamespace(shape={"data": 1, "stage": stages})
    build = SimpleNamespace(mesh=mesh, outline=SimpleNamespace(num_layers=8))
    for exits, shape in ((FULL_DEPTH, plain), (sled.EarlyExit((2, 4)), early)):
        assert shape_of_runs(build, prompts, sled.Decoding(exits=exits), batch_size=batch_size) == shape


def test_a_batch_is_filled_up_for_every_group_of_devices():
    build = SimpleNamespace(mesh=SimpleNamespace(shape={"data": 4, "stage": 1}), outline=SimpleNamespace(num_layers=8))
    assert shape_of_runs(build, 20, sled.Decoding(), batch_size=6) == (8, 1, 6)


def test_no_more_programs_are_kept_than_a_bound_and_those_of_a_service(monkeypatch):
    out, engine = generate(), sled.Engine(tiny_lm(), slots=2)
    served = engine.submit(PROMPTS[0]).result().tokens
    of_services = [f.programs[True] for f in programs._PROGRAMS]
    held = compiled()
    monkeypatch.setattr("sled.decoding.programs.MOST", sum(f.programs[False] for f in programs._PROGRAMS))
    assert generate().tokens == out.tokens and compiled() == held  # at the bound all are kept
    monkeypatch.setattr("sled.decoding.programs.MOST", 1)
    run = tiny_lm().stream(PROMPTS, max_new_tokens=CAPACITY, chunk=20)
    assert generate().tokens == out.tokens and sum(compiled()) < sum(held)
    assert [len(tokens) for tokens in next(run).tokens] == [min(20, len(tokens)) for tokens in out.tokens]
    assert sled.Engine(tiny_lm(), slots=2) and engine.submit(PROMPTS[0]).result().tokens == served
    assert [f.programs[True] for f in programs._PROGRAMS] == of_services


def test_long_prompts_are_read_in_blocks(monkeypatch):
    prompt = np.random.default_rng(1).integers(6, 61, size=40).tolist()
    whole = generate(prompt).tokens
    monkeypatch.setattr("sled.decoding.state.PREFILL_BLOCK", 16)
    assert generate(prompt).tokens == whole


@pytest.mark.parametrize("exits", [
    FullDepth(), sled.EarlyExit((1, 3), (0.08, 0.07)), sled.SelfSpeculation(2, np.array([1, 2, 4, 8]), max_draft=8),
], ids=lambda policy: type(policy).__name__)
def test_streaming_gives_the_same_tokens_in_pieces(exits):
    pieces, out = list(tiny_lm().stream(PROMPTS, chunk=3, max_new_tokens=CAPACITY, exits=exits)), generate(exits=exits)

    def joined(name):
        of_pieces = [getattr(piece, name) for piece in pieces]
        return [list(itertools.chain(*parts)) for parts in zip(*of_pieces, strict=True)]

    first, last = pieces[0].stats, pieces[-1].stats
    assert (joined("tokens"), joined("exit_layers")) == (out.tokens, out.exit_layers)
    assert first.new_tokens == sum(map(len, pieces[0].tokens)) < last.new_tokens == out.stats.new_tokens
    assert last.prompt_tokens == out.stats.prompt_tokens
    assert totals(last) == totals(out.stats)


def test_tuning_numbers_and_prompts_of_a_bucket_compile_nothing():
    generate(fusion=sled.SLED(rate=2.0, scale=10), sampling=sled.Sampling(temperature=1.0, top_p=0.9))
    counts = compiled()
    others = [[9] * n for n in (5, 11, 2, 16)]
    generate(others, fusion=sled.SLED(rate=0.5, scale=5, steps=3, lower_bound=-100.0),
             sampling=sled.Sampling(temperature=0.7))
    generate(others, fusion=sled.SLED(rate=1, scale=16),
             sampling=sled.Sampling(top_k=4, min_p=0.1, repetition_penalty=1.05))
    assert compiled() == counts


def test_sampling_follows_the_exact_distribution():
    """First tokens, second tokens after the likeliest first ones, and the same where they were guessed and verified."""
    settings = dict(max_new_tokens=2, sampling=sled.Sampling(temperature=2.0), batch_size=500)
    draws = generate([PROMPTS[2]] * 4000, **settings).tokens
    first = np.array([tokens[0] for tokens in draws])
    after = lambda *texts: jax.nn.softmax(FullPass(texts).logits(sled.FinalLayer()) / 2)  # noqa: E731
    p_V = np.asarray(after(PROMPTS[2], [], [], [])[0, len(PROMPTS[2]) - 1])
    check_distribution(first, p_V)
    likely = [v for v in np.argsort(-p_V) if v != EOS][:4]
    seconds_BV = np.asarray(after(*([*PROMPTS[2], v] for v in likely))[:, len(PROMPTS[2])])
    for v, second_V in zip(likely, seconds_BV, strict=True):
        check_distribution([tokens[1] for tokens in draws if tokens[0] == v], second_V)
    assert generate([PROMPTS[2]] * 500, exits=sled.SelfSpeculation(2, draft=2), **settings).tokens == draws[:500]


def test_truncation_and_penalty_by_hand():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]] * 4))
    kept = jnp.isfinite(truncate(logits, jnp.array([2, 0, 0, 3]), jnp.array([1, 0.6, 1, 0.5]),
                                 jnp.array([0, 0, 0.45, 0])))
    assert kept.tolist() == [[True, True, False, False], [True, True, False, False],
                             [True, True, True, False], [True, True, False, False]]
    out = penalise(jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]]), jnp.array([2.0]))
    assert out.tolist() == [[1.0, -4.0, 1.0]]


# Settings with an entry per row: each follows its prompt, whatever the batches; what is not per row stays whole.

FIVE = [*PROMPTS, [7, 8]]  # not in the order of their lengths
SIX = np.arange(1, 7, dtype=np.float32)
FIRST = np.eye(5, dtype=np.float32)
BY_ROW = {
    "sampling, SLED and drafts": dict(
        sampling=sled.Sampling(temperature=np.array([0, 9, 3, 9, 0.0]), top_k=np.array([0, 0, 5, 0, 0])),
        fusion=sled.SLED(rate=jnp.array([0, 1, 2, 4, 1.0]), scale=np.array([3, 9, 1, 20, 4]), max_scale=32),
        exits=sled.SelfSpeculation(1, np.array([1, 4, 2, 3, 5]), max_draft=8, vocabulary=jnp.arange(30, 34))),
    # As many weights as prompts: nothing tells them from rows but the settings themselves.
    "weights by row": dict(fusion=sled.LayerAverage(FIRST[[4, 0, 1, 2, 3]])),
    "weights of all": dict(fusion=sled.LayerAverage(FIRST[2])),
    "thresholds": dict(exits=sled.EarlyExit(
        (1, 3), np.array([[1, 0], [0, 1], [1, 1], [0, 0.0], [1, 1]]), max_deferred=3)),
}


@pytest.mark.parametrize("case", BY_ROW)
def test_each_row_keeps_its_own_whatever_the_batches(case):
    def of_row(i, leaf):
        return leaf[i].tolist() if np.ndim(leaf) and len(leaf) == len(FIVE) and case != "weights of all" else leaf

    expected = [generate([prompt], seed=5 + i, **jax.tree.map(functools.partial(of_row, i), BY_ROW[case]))
                for i, prompt in enumerate(FIVE)]
    out = generate(FIVE, seed=5, batch_size=4, **BY_ROW[case])  # three idle rows in the second
    assert out.tokens == [one.tokens[0] for one in expected]
    assert out.exit_layers == [one.exit_layers[0] for one in expected]


def test_rows_of_one_batch_keep_their_own():
    temperatures = [0, 9, 3, 9, 0.0]
    settings = dict(sampling=sled.Sampling(temperature=np.array(temperatures)), max_new_tokens=CAPACITY)
    expected = [generate(prompt, seed=i, sampling=sled.Sampling(temperature=temperatures[i])).tokens[0]
                for i, prompt in enumerate(FIVE)]
    assert generate(FIVE, **settings).tokens == expected
    pieces = list(tiny_lm().stream(FIVE, **settings))
    assert [[token for piece in pieces for token in piece.tokens[i]] for i in range(len(FIVE))] == expected


@pytest.mark.parametrize("settings", [
    dict(sampling=sled.Sampling(temperature=SIX)),
    dict(sampling=sled.Sampling(top_p=np.ones((5, 1)))),
    dict(fusion=sled.SLED(rate=SIX)),
    dict(fusion=sled.LayerAverage(np.ones((6, 5)))),
    dict(exits=sled.EarlyExit((1, 2), threshold=np.ones((6, 2)))),
    dict(exits=sled.EarlyExit((1, 2), threshold=np.ones((5, 1, 2)))),
    dict(exits=sled.SelfSpeculation(1, confidence=SIX / 9)),
], ids=str)
def test_rows_that_are_not_the_prompts_are_refused(settings):
    for call in (tiny_lm().generate, tiny_lm().stream):
        with pytest.raises(SettingError, match=r"B is 1 or 5 here; .* prompts"):
            call(FIVE, **settings)


def test_score_and_lens_take_no_rows():
    lm = tiny_lm()
    for fusion in (sled.SLED(rate=SIX), sled.LayerAverage(np.ones((2, 5)))):
        with pytest.raises(SettingError, match=r"B is 1 here; .*score"):
            lm.score([[1], [2]], [[3], [4]], fusion=fusion)
        with pytest.raises(SettingError, match=r"B is 1 here; .*lens"):
            lm.lens([1, 2], fusion=fusion)
    one = lm.score([1], [[2, 3]], fusion=sled.SLED(rate=np.array([2.0])))
    assert one.totals == lm.score([1], [[2, 3]], fusion=sled.SLED(rate=2.0)).totals


def test_an_array_for_one_exit_after_another_is_no_array_of_rows():
    with pytest.raises(SettingError, match="4 numbers for 2 exits"):
        sled.EarlyExit((1, 2), threshold=np.ones(4))
    for build in (lambda x: sled.EarlyExit((1, 2), threshold=(x, x)), lambda x: sled.LayerAverage((x, x))):
        build(np.float32(1)), build(np.array(1.0))
        with pytest.raises(SettingError):
            build(np.ones(2))
    check_rows(object(), 2, hint="")  # a strategy of one's own may know nothing of rows
