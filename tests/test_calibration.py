"""Calibrated thresholds: p-values, the walk and its guarantee, losses, whole calibrations; and tuning for speed."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import tiny_lm
from scipy.special import rel_entr
from scipy.stats import binom

import sled
from sled.calibration import tune as tuning
from sled.calibration.calibrate import _check_sight
from sled.calibration.learn_then_test import can_lose, fewest_losses, last_rejected, p_value, walk
from sled.calibration.losses import common_subsequence, consistency, rouge
from sled.demo.problems import problems, prompt
from sled.errors import CalibrationError
from sled.eval.numbers import final_answer
from sled.exits import FullDepth
from sled.results import Output, Stats
from sled.timing import Times

DELTA, EPSILON, DRAWS = 0.1, 0.05, 1000
SLACK = 3 * math.sqrt(EPSILON * (1 - EPSILON) / DRAWS)  # three standard deviations of a rate over the draws


def by_the_formula(r, n, delta):
    low = min(r, delta)
    h1 = rel_entr(low, delta) + rel_entr(1 - low, 1 - delta)
    return min(math.e * binom.cdf(math.ceil(round(n * r, 6)), n, delta), math.exp(-n * h1))


@pytest.mark.parametrize("n", [1, 30, 100, 5000])
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5, 0.9])
def test_p_values_are_the_formula(n, delta):
    for r in (0, 1e-9, 0.3 * delta, 0.77 * delta, delta, (1 + delta) / 2, 1):
        assert p_value(r, n, delta) == pytest.approx(by_the_formula(r, n, delta), rel=1e-9, abs=1e-300)


def test_p_values_by_hand_and_at_the_limits():
    assert p_value(0, 29, 0.1) == pytest.approx(0.9**29)  # Hoeffding's side: (1 - delta)^n
    # Bentkus's side: e times the probability of none, one or two of ten, at a half each
    assert p_value(0.2, 10, 0.5) == pytest.approx(min(math.e * 56 / 1024, (5 / 2)**2 * (5 / 8)**8))
    assert p_value(1, 10, 0.1) == p_value(0.1, 10, 0.1) == 1
    values = [p_value(k / 50, 50, 0.2) for k in range(51)]
    assert values == sorted(values) and 0 < values[0] and values[-1] == 1
    assert p_value(0, 10**7, 0.5) == 0  # too small for a float, and no error
    assert 0 <= p_value(1 - 1e-16, 10, 1 - 1e-16) <= 1 and p_value(0, 10, 5e-324) == 1
    noisy = 0.049 * (1 + 1e-14)  # the rounding of a sum does not count a loss more
    assert noisy * 1000 > 49 and p_value(noisy, 1000, 0.07) == pytest.approx(p_value(0.049, 1000, 0.07), rel=1e-9)


@pytest.mark.parametrize("n", [10, 100, 1000])
@pytest.mark.parametrize("delta", [0.02, 0.1, 0.6])
def test_p_values_are_no_smaller_than_chance_allows(n, delta):
    """Exactly, for losses of 0 and 1 whose expectation is delta: P(p <= u) <= u, at every value that p can take."""
    for k in range(n + 1):
        assert binom.cdf(k, n, delta) <= p_value(k / n, n, delta) * (1 + 1e-9)


def test_fewest_losses_is_where_all_zero_begins_to_pass():
    for delta, epsilon in ((0.1, 0.05), (0.05, 0.05), (0.3, 0.01), (0.9, 0.5)):
        n = int(fewest_losses(delta, epsilon))
        assert p_value(0, n, delta) <= epsilon and (n == 1 or p_value(0, n - 1, delta) > epsilon)


def table(*means, n=100):
    """Losses [K, n] of 0 and 1 with these means."""
    return np.array([[1.0] * round(mean * n) + [0.0] * (n - round(mean * n)) for mean in means])


def choose(losses_KN, grid, delta, epsilon):
    """The threshold that a walk down the grid chooses, of losses [K, n] known beforehand."""
    known = iter(losses_KN)
    return last_rejected(walk(grid, lambda _: next(known), delta=delta, epsilon=epsilon), epsilon)


@pytest.mark.parametrize(("means", "chosen"), [
    ((0.0, 0.0, 0.0), 0.7),  # the whole grid passes
    ((0.0, 0.0, 0.3), 0.8),  # the LAST that passed, not the one that failed
    ((0.0, 0.3, 0.3), 0.9),
    ((0.3, 0.0, 0.0), None),  # the first failure ends it, whatever follows
    ((0.0, 0.3, 0.0), 0.9),
    ((0.3, 0.3, 0.3), None),
])
def test_the_last_rejected_threshold_is_chosen(means, chosen):
    assert choose(table(*means), (0.9, 0.8, 0.7), DELTA, EPSILON) == chosen


def test_a_p_value_of_exactly_epsilon_passes():
    losses = table(0.03)
    exactly = p_value(0.03, 100, DELTA)
    assert choose(losses, (0.5,), DELTA, exactly) == 0.5
    assert choose(losses, (0.5,), DELTA, exactly * (1 - 1e-12)) is None


SHAPES = {  # true risks along the grid, and how many losses
    "all just above": ([0.101] * 6, 100),
    "all just above, many losses": ([0.101] * 6, 1000),
    "rising through": ([0.01, 0.02, 0.05, 0.101, 0.15, 0.3], 200),
    "a step": ([0.01, 0.01, 0.01, 0.11, 0.11, 0.11], 400),
    "up and down": ([0.02, 0.105, 0.02, 0.105, 0.02, 0.4], 150),
    "one unsafe at the end": ([0.0, 0.0, 0.0, 0.0, 0.0, 0.102], 300),
}
FALLING = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def draws(risks, n, shared, seed):
    """1,000 tables of losses [K, n] of 0 and 1 with these expectations; `shared`: prompts hard at one threshold are
    hard at all."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield (rng.random((1 if shared else len(risks), n)) < np.array(risks)[:, None]).astype(float)


def violations(tables, risks):
    chosen = [choose(losses, FALLING, DELTA, EPSILON) for losses in tables]
    risk = dict(zip(FALLING, risks, strict=True))
    return np.mean([c is not None and risk[c] > DELTA for c in chosen]), chosen


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_guarantee_is_kept_in_simulation(shape, shared):
    risks, n = SHAPES[shape]
    rate, _ = violations(draws(risks, n, shared, seed=0), risks)
    assert rate <= EPSILON + SLACK


def test_the_guarantee_is_kept_for_losses_between_0_and_1():
    rng = np.random.default_rng(0)
    risk = DELTA + 0.002
    for sharpness in (0.3, 5.0, 500.0):  # from nearly 0 or 1, to nearly constant
        rate, _ = violations((rng.beta(sharpness * risk, sharpness * (1 - risk), (6, 200)) for _ in range(DRAWS)),
                             [risk] * 6)
        assert rate <= EPSILON + SLACK


def test_the_simulation_notices_the_threshold_that_failed():
    """Choosing where the walk ended, a known mistake, breaks the guarantee nearly always."""
    risks, n = SHAPES["a step"]
    wrong = 0
    for losses in draws(risks, n, True, seed=1):
        rows = dict(zip(FALLING, losses, strict=True))
        ended = list(walk(FALLING, rows.__getitem__, delta=DELTA, epsilon=EPSILON))[-1].threshold
        wrong += dict(zip(FALLING, risks, strict=True))[ended] > DELTA
    assert wrong / DRAWS > 0.9


@pytest.mark.parametrize(("risks", "n"), [
    ([0.01] * 6, 100), ([0.02] * 6, 200), ([0.01, 0.02, 0.03, 0.2, 0.3, 0.4], 200)])
def test_the_guarantee_is_not_vacuous(risks, n):
    """Small risks: a threshold is chosen nearly always, and nearly always the lowest of the safe ones."""
    _, chosen = violations(draws(risks, n, True, seed=2), risks)
    assert np.mean([c is not None for c in chosen]) > 0.95
    assert np.mean([c == FALLING[sum(r <= DELTA for r in risks) - 1] for c in chosen]) > 0.9


@pytest.mark.parametrize("losses", [[[]], [0.5]])
def test_losses_are_one_per_prompt(losses):
    with pytest.raises(CalibrationError, match="shape"):
        choose(losses, (0.9,), DELTA, EPSILON)


def output(*tokens, texts=None):
    return Output(texts=texts, tokens=list(tokens), finish_reasons=[], exit_layers=[], stats=None)


def test_rouge_by_hand_and_common_subsequences_by_the_recursion():
    assert common_subsequence([1, 2, 3, 4, 5], [2, 9, 4, 5, 1]) == 3
    assert rouge([1, 2, 3], [1, 2, 3]) == rouge([], []) == 0 and rouge([1, 2], [3, 4]) == rouge([], [1]) == 1
    assert rouge([1, 2, 3, 4], [1, 9, 3, 4]) == pytest.approx(1 - 6 / 8)

    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(0, 5, rng.integers(0, 12)).tolist() for _ in range(2))
        best = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                best[i + 1, j + 1] = best[i, j] + 1 if x == y else max(best[i, j + 1], best[i + 1, j])
        assert common_subsequence(a, b) == best[-1, -1]


def test_losses_by_name_and_by_function():
    early, full = output([1, 2], [3], texts=["ab", "c"]), output([1, 2], [4], texts=["ab", "d"])
    name, losses = consistency("exact", None, None)
    assert name == "exact" and losses(early, full).tolist() == [0, 1]
    assert consistency(None, None, None).name == "rouge"
    assert consistency(lambda a, b: a != b, None, None).losses(early, full).tolist() == [0, 1]
    seen = []
    consistency(lambda a, b: seen.append((a, b)) or 0, None, None).losses(output([1], texts=None), output([2]))
    assert seen == [([1], [2])]  # without a tokenizer, token ids


def test_risks_count_only_what_early_exit_made_worse():
    early, full = output([1], [1], [1], texts=["r", "w", "w"]), output([1], [1], [1], texts=["w", "r", "w"])

    def wrong(text, reference):
        return text != reference

    name, losses = consistency(None, ["r"] * 3, wrong)
    assert name.startswith("risk ") and name.endswith("wrong") and losses(early, full).tolist() == [0, 1, 0]
    with pytest.raises(CalibrationError, match=r"risk .* full output is 5"):  # a difference would hide it
        consistency(None, ["r"], lambda text, _: 5 if text == "f" else 0).losses(output([1], texts=["e"]),
                                                                                output([1], texts=["f"]))


ASKED = problems("train", 24, seed=3)
PROMPTS, SOLUTIONS = [prompt(p.question) for p in ASKED], [p.solution for p in ASKED]
QUICK = dict(exits=sled.EarlyExit(1), delta=0.2, epsilon=0.1, max_new_tokens=40, batch_size=12, progress=False)


def test_a_whole_calibration_of_the_bundled_model(demo, capsys):
    before, *_ = tiny_lm.compiled()
    made = sled.calibrate(demo, PROMPTS, **{**QUICK, "progress": True}, grid=(0.99, 0.98, 0.05, 0.01))
    assert tiny_lm.compiled()[0] <= before + 4  # with and without exits, two lengths: no threshold compiles again
    assert made.threshold in (0.99, 0.98) and made.loss == "rouge" and made.prompts == 24
    assert [step.threshold for step in made.steps] == [0.99, 0.98, 0.05]  # ended at the first that failed
    assert made.steps[0].mean_depth >= made.steps[1].mean_depth > made.steps[2].mean_depth >= 1
    assert made.steps[2].p_value > 0.1 >= made.steps[1].p_value
    assert "threshold 0.05" in capsys.readouterr().err
    assert f"{made.threshold:g}" in made.verdict() and "<- chosen" in made.table() and "fails" in made.table()

    exits = made.policy(demo, max_new_tokens=40)
    assert exits == sled.EarlyExit(1, threshold=made.threshold)
    served = demo.generate(PROMPTS, exits=exits, max_new_tokens=40, batch_size=12)
    full = demo.generate(PROMPTS, max_new_tokens=40, batch_size=12)
    loss = np.mean([rouge(*pair) for pair in zip(served.tokens, full.tokens, strict=True)])
    chosen = next(step for step in made.steps if step.threshold == made.threshold)
    assert (loss, served.stats.mean_depth) == pytest.approx((chosen.mean_loss, chosen.mean_depth))


def test_risk_and_sampling_are_calibrated_by_the_same_streams(demo):
    def wrong(text, answer):
        return final_answer(text) != answer

    sampling = sled.Sampling(temperature=0.7)
    made = sled.calibrate(demo, PROMPTS, **QUICK, grid=(1.0, 0.9), references=[p.answer for p in ASKED], risk=wrong,
                          sampling=sampling, seed=5)
    assert made.steps[0].mean_loss == 0 and made.steps[0].mean_depth == 4  # threshold 1: the full model's very draws
    assert made.loss.startswith("risk") and made.policy(demo, sampling=sampling, max_new_tokens=40).threshold <= 1


def test_no_safe_threshold_means_no_early_exit(demo):
    made = sled.calibrate(demo, PROMPTS, **QUICK, grid=(0.01,), loss="exact")
    assert made.threshold is None and made.policy(demo, max_new_tokens=40) == FullDepth()
    assert "No early exit" in made.verdict() and "fails" in made.table()


def same_answer(text, full):
    return float(final_answer(text) != final_answer(full))


def unlike(text, answer):
    return float(final_answer(text) != answer)


# Where the full model is at the floor, or a loss is blind, no loss is possible, and any threshold would pass.
@pytest.mark.parametrize(("texts", "loss", "references", "risk", "delta"), [
    (SOLUTIONS, None, [-1] * 24, unlike, 0.2),  # it solves nothing
    (SOLUTIONS, None, [p.answer if i < 3 else -1 for i, p in enumerate(ASKED)], unlike, 0.2),  # next to nothing
    (["I do not know."] * 24, same_answer, None, None, 0.2),  # no answer in any text
    ([""] * 24, lambda text, full: float(text != full), None, None, 0.2),  # nothing in any text
    (SOLUTIONS, lambda text, full: 0.0, None, None, 0.2), (SOLUTIONS, None, ASKED, lambda text, problem: 0.9, 0.2),
    (["Yes."] * 24, "exact", None, None, 0.2), (["Yes."] * 24, "rouge", None, None, 0.2),
    (SOLUTIONS, "rouge", None, None, 0.99),
], ids=range(9))
def test_a_loss_that_cannot_be_seen_is_refused(texts, loss, references, risk, delta):
    full = output(*([*map(ord, text)] for text in texts), texts=texts)
    with pytest.raises(CalibrationError, match=r"answers nothing could be called safe.* its first text is '"):
        _check_sight(consistency(loss, references, risk), full, delta, 0.1)


@pytest.mark.parametrize("how", [(None,) * 3, ("exact", None, None), (same_answer, None, None),
                                 (None, [p.answer for p in ASKED], unlike)], ids=["rouge", "exact", "own", "risk"])
def test_a_loss_that_can_be_seen_is_not(how):
    _check_sight(consistency(*how), output(*([*map(ord, text)] for text in SOLUTIONS), texts=SOLUTIONS), 0.2, 0.1)


def test_calibration_refuses_a_model_that_solves_nothing(demo):
    with pytest.raises(CalibrationError, match="answers nothing could be called safe"):
        sled.calibrate(demo, PROMPTS, **QUICK, grid=(0.9,), references=[-1] * 24, risk=unlike)


@pytest.mark.parametrize(("largest", "n", "delta", "enough"), [
    (0, 1000, 0.01, False), (0.05, 10**6, 0.05, False), (0.06, 50, 0.05, False), (0.06, 10**5, 0.05, True),
    (1, 3, 0.05, True), (1, 3, 1e-12, True), (0.5, 24, 0.2, True), (0.1, 160, 0.05, True), (0.1, 30, 0.05, False),
])
def test_what_can_be_lost_must_be_shown(largest, n, delta, enough):
    assert can_lose(largest, n, delta, 0.05) == enough


# Tuning: what it tries, and what it chooses from what was measured.

EARLY, GUESSES = sled.EarlyExit((1, 3), threshold=(0.08, 0.07), max_deferred=3), sled.SelfSpeculation(2)
COUNT = 20  # with the longest prompt, as much room as the other tests have


def pretend(monkeypatch, *seconds):
    """Every way takes as long as it says, in the order they are tried."""

    def interleave(calls, rounds, bar):
        for call in calls.values():
            call()
        return {way: Times([seconds[way], 9.0]) for way in calls}

    monkeypatch.setattr(tuning, "interleave", interleave)


def tune(prompts, **settings):
    return sled.tune(tiny_lm.tiny_lm(), prompts, max_new_tokens=COUNT, progress=False, **settings)


def test_the_fastest_way_is_chosen(monkeypatch):
    pretend(monkeypatch, 3, 2, 1, 4, 5, 6, 7, 8)
    tuned = tune(tiny_lm.PROMPTS, exits=[EARLY, GUESSES], batch_size=4)
    tried = [(trial.exits, trial.schedule) for trial in sorted(tuned.trials, key=lambda trial: trial.exits == GUESSES)]
    assert (FullDepth(), sled.Immediate()) in tried and len(tried) == 8
    assert [schedule for exits, schedule in tried if exits == EARLY] == [
        sled.Gather(2), sled.Immediate(), sled.Gather(4)]
    assert [schedule for exits, schedule in tried if exits == GUESSES] == [
        sled.Lockstep(), sled.Immediate(), sled.Gather(2), sled.Gather(4)]
    assert (tuned.exits, tuned.schedule) == (EARLY, sled.Gather(2))
    best = tuned.trials[0]
    count = tiny_lm.generate(exits=EARLY, max_new_tokens=COUNT).stats.new_tokens
    assert (best.seconds, best.new_tokens, best.tokens_per_second) == (1, count, count) and best.mean_depth < 4
    guessed = tuned.trials[-1]
    assert guessed.exits == GUESSES and guessed.same_texts == 1
    table = tuned.table().splitlines()
    assert len(table) == 9
    assert "EarlyExit(layers=(1, 3), threshold=(0.08, 0.07), max_deferred=3), Gather(rows=2)" in table[1]
    assert table[3].split()[1] == "1.00" and table[3].endswith("no early exit")


def test_leaving_early_is_declined_where_it_does_not_pay(monkeypatch):
    pretend(monkeypatch, 1, 2)
    tuned = tune(tiny_lm.PROMPTS[2:3], exits=EARLY)
    assert tuned.exits == FullDepth() and len(tuned.trials) == 2  # one row: no schedule differs from another
    assert tiny_lm.generate(exits=tuned.exits, schedule=tuned.schedule).stats.mean_depth == 4


def test_the_real_clock():
    tuned = tune(tiny_lm.PROMPTS[2:3], exits=EARLY, rounds=1)
    assert all(trial.seconds > 0 for trial in tuned.trials)


@pytest.mark.parametrize(("ways", "says"), [
    ([(FullDepth(), 1.0, 1.0, 1.0), (EARLY, 2.0, 2.0, 0.0)], "Nothing was faster than no early exit."),
    ([(FullDepth(), 2.0, 2.2, 1.0), (EARLY, 1.0, 1.1, 0.0)], "2.00 times .* changed 100% of the texts. An exit may be"),
    ([(FullDepth(), 2.0, 2.2, 1.0), (EARLY, 1.0, 1.1, 0.75)], "2.00 times .*, and changed 25% of the texts"),
    ([(FullDepth(), 2.0, 2.2, 1.0), (GUESSES, 1.0, 1.1, 1.0)], "2.00 times .* exit, and the same texts"),
    ([(FullDepth(), 2.0, 2.5, 1.0), (GUESSES, 1.9, 2.0, 1.0)], "1.05 times .* rounds differ by: noise, and the same"),
    ([(FullDepth(), 2.0, 2.0, 1.0), (EARLY, 1.9, 2.9, 0.5)], "noise, and changed 50%"),
])
def test_the_fastest_way_in_words(ways, says):
    trials = [tuning.Trial(exits, sled.Immediate(), seconds, median, 100, 2.0, same)
              for exits, seconds, median, same in ways]
    tuned = tuning.Tuned(tuple(sorted(trials, key=lambda trial: trial.seconds)))
    assert re.search(says, tuned.verdict())


def test_texts_of_one_token_are_not_tuned():
    lm = copy.copy(tiny_lm.tiny_lm())
    stats = Stats(prompt_tokens=9, new_tokens=2, prefill_seconds=0, decode_seconds=1, mean_depth=4)
    lm.decode = lambda *_, **__: dataclasses.replace(output([1], [1]), stats=stats)
    with pytest.raises(CalibrationError, match="all 2 texts end with their first token"):
        sled.tune(lm, tiny_lm.PROMPTS[:2], exits=EARLY, progress=False)
