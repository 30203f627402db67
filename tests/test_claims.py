"""What popular accounts claim: verdicts of scripted figures, intervals against known ones, parts of the measuring."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from demo_toy import demo_toy

import sled
from sled.bench import claims, claims_runs, claims_table
from sled.bench.claims_rule import (
    DOES_NOT_HOLD,
    HOLDS,
    IN_PART,
    NOT_SHOWN,
    SHARE,
    SMALLER,
    SPEED,
    Figure,
    correlation,
    partial_correlation,
    share,
    speed,
    verdict,
)
from sled.bench.claims_runs import Answers, Together, let_through, memory_saved, over_budget
from sled.bench.claims_table import APART, BATCH, DRAFTED, GREEDY, LOCKED, SLED, SLED_DRAFTED, Chosen, Measured
from sled.cli import main
from sled.errors import SettingError
from sled.eval.questions import demo_questions
from sled.exits.policy import ExitView
from sled.survey.result import Drafting


def kept(value, low, high):
    return Figure("quality kept", value, low, high, SHARE, claimed=0.99)


def faster(value, low, high, claimed=1.5):
    return Figure("speed", value, low, high, SPEED, claimed=claimed, no_effect=1.0)


def no_gain(value, low, high):
    return Figure("speed", value, low, high, SPEED, claimed=1.0, at_most=True)


@pytest.mark.parametrize(("figures", "says"), [
    ([kept(1.0, 0.97, 1.0), faster(1.6, 1.4, 1.8)], HOLDS),
    ([kept(0.99, 0.95, 1.0), faster(1.5, 1.01, 1.9)], HOLDS),
    ([kept(1.0, 0.97, 1.0), faster(1.4, 1.3, 1.45)], IN_PART),  # a gain, but not so large
    ([kept(0.98, 0.95, 0.995), faster(1.6, 1.4, 1.8)], IN_PART),  # cannot be told from what is claimed
    ([kept(0.90, 0.85, 0.94), faster(3.0, 2.8, 3.2)], IN_PART),  # what is claimed of quality is excluded
    ([kept(0.90, 0.85, 0.94), faster(1.2, 1.1, 1.3)], DOES_NOT_HOLD),  # and of speed too, though there is a gain
    ([faster(1.34, 1.27, 1.41, claimed=3.0)], SMALLER),
    ([kept(1.0, 0.97, 1.0), faster(1.02, 0.97, 1.1)], DOES_NOT_HOLD),  # too slow, and maybe no faster at all
    ([kept(1.0, 0.97, 1.0), faster(0.8, 0.7, 0.9)], DOES_NOT_HOLD),
    ([kept(1.0, 0.97, 1.0), faster(1.6, 1.0, 2.2)], NOT_SHOWN),  # it may be no faster, or as fast as is claimed
    ([kept(0.9, 0.85, 0.94)], DOES_NOT_HOLD),
    ([kept(0.98, 0.95, 0.995)], NOT_SHOWN),
    ([kept(0.98, 0.95, 0.995), faster(1.2, 1.1, 1.3)], NOT_SHOWN),  # no figure reaches
    ([faster(1.1, 1.05, 1.2, claimed=None)], HOLDS),  # that it is faster is all that is claimed
    ([faster(0.7, 0.6, 0.8, claimed=None)], DOES_NOT_HOLD),
    ([faster(1.02, 0.96, 1.08, claimed=None)], NOT_SHOWN),
    ([faster(1.2, 1.1, 1.3, claimed=None), faster(0.9, 0.6, 1.4, claimed=None)], NOT_SHOWN),
    ([faster(1.6, None, None)], NOT_SHOWN), ([kept(1.0, 0.97, 1.0), faster(1.6, None, None)], NOT_SHOWN),
    ([no_gain(0.9, None, None)], NOT_SHOWN),
    ([no_gain(0.9, 0.8, 0.95)], HOLDS), ([no_gain(1.05, 0.98, 1.1)], NOT_SHOWN),
    ([no_gain(1.2, 1.1, 1.3)], DOES_NOT_HOLD),
    ([no_gain(1.2, 1.1, 1.3), no_gain(0.8, 0.7, 0.9)], IN_PART)])
def test_verdicts_follow_from_figures_and_intervals(figures, says):
    assert verdict(figures) == says


def test_a_figure_is_written_with_its_interval():
    assert str(faster(1.504, 1.4, 1.6)) == "speed 1.50x [1.40x, 1.60x]"
    assert str(faster(1.504, None, None)) == "speed 1.50x (too few for an interval)"


def test_few_texts_or_batches_have_no_interval():
    seconds_N = np.arange(1.0, 7)
    for count in range(1, 7):
        found = speed("speed", 2 * seconds_N[:count], seconds_N[:count])
        assert found.value == 2 and (found.low is None) == (found.high is None) == (count < 6) == (not found.reaches)
        assert not found.fails
    none = share("hits", [], claimed=0.05)
    assert (none.value, none.low, verdict([none])) == (0, None, NOT_SHOWN)


@pytest.mark.parametrize(("lost", "says"), [(0, DOES_NOT_HOLD), (1, DOES_NOT_HOLD), (6, NOT_SHOWN), (40, HOLDS)])
def test_a_single_lost_answer_is_no_damage(lost, says):
    found = share("lost", [i < lost for i in range(170)], claimed=claims_table.DAMAGE)
    assert verdict([found]) == says


def test_intervals_of_shares_and_speeds():
    found = share("hits", [True] * 24, claimed=0.9)
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(24 / (24 + 1.959964**2))  # Wilson
    slow_N = np.random.default_rng(1).uniform(1, 9, 16)
    even = speed("speed", slow_N, slow_N / 2)
    assert (even.value, even.low, even.high, even.no_effect) == (2.0, pytest.approx(2), pytest.approx(2), 1.0)
    uneven = speed("speed", slow_N, np.sort(slow_N))
    assert uneven.low < uneven.value == 1.0 < uneven.high


def test_a_correlation_is_what_is_told_beyond_what_is_known():
    rng = np.random.default_rng(0)
    length_N, hidden_N = rng.normal(size=(2, 400))
    like, also_like = (length_N + 0.1 * rng.normal(size=400) for _ in range(2))
    assert abs(partial_correlation(like, also_like, length_N)) < 0.15 < 0.9 < partial_correlation(like, also_like)
    assert partial_correlation(hidden_N + length_N, hidden_N, length_N) > 0.9
    assert partial_correlation(hidden_N, -hidden_N, length_N) == pytest.approx(-1, abs=1e-3)
    assert partial_correlation(np.ones(400), hidden_N, length_N) == 0  # a constant tells nothing
    assert abs(partial_correlation(length_N, hidden_N, length_N, np.ones(400))) < 0.01
    told = correlation("tells", hidden_N[:50]**3, hidden_N[:50], length_N[:50])
    assert told.value == pytest.approx(1, abs=1e-2) and not told.fails


# The table, of scripted answers

N = 96
HARD_N = np.random.default_rng(0).permutation(N) / N  # how hard each question is


def answers(seconds: float, *, texts=0, count=N) -> Answers:
    """Of the first questions; the first `texts` of the texts are others. Hard ones take longer and go deeper."""
    layers = [[2] * (40 - deep) + [3] * deep for deep in (40 * HARD_N[:count]).astype(int).tolist()]
    return Answers([[i, int(i < texts)] * 20 for i in range(count)], layers, seconds * (1 + 0.5 * HARD_N[:count]))


def few(seconds: float, **settings) -> Answers:
    return answers(seconds, count=claims.ALONE, **settings)


def many(seconds: float, **settings) -> Answers:
    return answers(seconds, count=claims.IN_BATCHES, **settings)


def drafts(layer: int, draft: int, first_ids=None) -> Drafting:
    return Drafting(layer, draft, first_ids, acceptance=0.9, accepted=draft * 0.8, speed=1.5, bound_speed=2.0)


def measured() -> Measured:
    """A world in which every claim is true; the chosen threshold loses 5%: few enough for 3, and enough for 6c."""
    full = HARD_N < 80 / N
    right = dict.fromkeys((GREEDY, 0.95, 0.7, 0.8, DRAFTED), full) | {
        0.8: full & (HARD_N >= 4 / N), SLED: HARD_N < 0.95, 0.0: HARD_N < 0.1}
    return Measured(
        chosen=Chosen((2, 4), 0.8, drafts(2, 6)), right=right,
        every=dict.fromkeys(right, answers(1)),
        alone={GREEDY: few(8), 0.95: few(4), 0.7: few(2), 0.8: few(2), 1.0: few(9), DRAFTED: few(3),
               SLED: few(7), SLED_DRAFTED: few(3)},
        batched={GREEDY: many(4), APART: many(5, texts=9), LOCKED: many(4)},
        all_alone={GREEDY: answers(8), 0.8: answers(2)},
        prompt_lengths=np.full(N, 30), saved=np.full(claims.ALONE, 0.2), taken=[True] * 9, over=[True] * claims.ALONE)


def verdicts(of: Measured) -> dict[str, str]:
    return {row.number: row.verdict for row in claims_table.claims(of)}


def test_every_claim_may_hold():
    found = verdicts(measured())
    assert len(found) == 18 and set(found.values()) == {HOLDS}, found


def test_and_every_claim_may_not():
    world, none = measured(), np.zeros(N, bool)
    steady_N = 0.02 * (10 - HARD_N)  # seconds per token: the harder, the fewer
    full = world.right[GREEDY]
    alone = dict.fromkeys(world.alone, few(10)) | {GREEDY: few(9), 1.0: few(9), SLED: few(9.9)}
    even = {way: each._replace(seconds_M=np.full(claims.ALONE, each.seconds_M[0])) for way, each in alone.items()}
    found = verdicts(dataclasses.replace(
        world, right=dict.fromkeys(world.right, none) | {GREEDY: full, 0.0: full},
        every=world.every | {DRAFTED: answers(1, texts=40)}, alone=even,
        batched={GREEDY: many(4), APART: many(3), LOCKED: many(4)},
        all_alone={way: each._replace(seconds_M=steady_N) for way, each in world.all_alone.items()},
        saved=-world.saved, taken=[False] * 240, over=[False] * N))
    assert found.pop("6c") == HOLDS  # the answers that 3 lacks are lost at the floor
    assert set(found.values()) == {DOES_NOT_HOLD}, found


def test_what_is_too_little_to_tell_is_not_shown():
    world = measured()
    alone = {way: each._replace(seconds_M=each.seconds_M[:5]) for way, each in world.alone.items()}
    even = world.all_alone[GREEDY]._replace(seconds_M=np.random.default_rng(0).uniform(1, 2, N))
    found = verdicts(dataclasses.replace(world, alone=alone, all_alone=world.all_alone | {GREEDY: even}, over=[]))
    assert {number for number, says in found.items() if says == NOT_SHOWN} == {
        "1a", "1b", "2a", "3", "4b", "4c", "4d", "6d", "6e", "6g"}


def test_drafts_and_conditions_are_told_in_full():
    world = measured()
    chosen = dataclasses.replace(world.chosen, drafts=drafts(2, 6, first_ids=640))
    rows = {row.number: row for row in claims_table.claims(dataclasses.replace(world, chosen=chosen))}
    for number in ("2a", "2b", "4c", "4d"):
        assert "sled.SelfSpeculation(2, draft=6, first_ids=640)" in rows[number].conditions
    for number in ("1a", "1b", "2a", "3"):
        assert rows[number].conditions.endswith("; answers in batches of 32, speed one by one")


def test_texts_in_batches_are_held_against_other_batches_and_alone():
    world = measured()
    changed = lambda **other: sum(claims_table.changed(dataclasses.replace(world, **other)))  # noqa: E731
    like = {0.8: answers(1, texts=9)}
    assert changed() == changed(every=like) == changed(all_alone=like) == 9
    assert changed(all_alone=like, every=like) == 0
    assert changed(every={0.8: answers(1, texts=80)}) == 80  # those that were asked in large batches alone, too


def test_positions_at_which_rows_leave_apart_are_counted_where_there_are_several_rows():
    layers = [[2, 2, 4], [2, 4], *[[2]] * (BATCH - 2), *[[4]] * BATCH]
    assert claims_table.left_apart(Answers([], layers, np.zeros(0))) == 1 / 3


# The parts

def test_the_first_questions_choose_settings():
    for problems in (1, 3, 4, 7, 24, 500):
        aside, asked = claims.set_aside(demo_questions(claims.with_aside(problems)))
        assert len(asked.prompts) == problems and 1 <= len(aside.prompts) <= claims.ASIDE
    with pytest.raises(SettingError, match="holds 1"):
        claims.set_aside(demo_questions(1))


def test_other_models_need_questions(capsys):
    assert main(["bench", "claims", "-m", "other"]) == 1
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "says"), [(dict(problems=0), "at least 1"), (dict(rounds=0), "at least 1"),
                                                (dict(new_tokens=1), "from 2 to 512"), (dict(), "solves none")])
def test_what_measures_nothing_is_refused(settings, says, monkeypatch):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo_toy())
    monkeypatch.setattr(claims, "choose", lambda *_: measured().chosen)
    monkeypatch.setattr(claims, "answered", lambda _, prompts, __, ways, *___: {
        way: Answers([[9]] * len(prompts), [[1]] * len(prompts), np.ones(1)) for way in ways})
    with pytest.raises(SettingError, match=says):
        claims.run_claims_bench(**dict(problems=4) | settings)


def test_all_questions_are_asked_one_by_one_in_two_ways(monkeypatch):
    def answer(_, prompts, batch, ways, __, rounds, ___):
        count = -(-len(prompts) // batch) if rounds else 0
        return {way: Answers([[9, 9]] * len(prompts), [[1, 2]] * len(prompts), np.ones(count)) for way in ways}

    monkeypatch.setattr(claims, "choose", lambda *_: Chosen((1,), 0.8, drafts(1, 4)))
    monkeypatch.setattr(claims, "answered", answer)
    monkeypatch.setattr(claims, "solved", lambda _, __, answers: np.ones(len(answers.tokens), bool))
    monkeypatch.setattr(claims, "over_budget", lambda _, prompts, *__: [False] * len(prompts))
    of = claims.measure_claims(demo_toy(), demo_questions(4), demo_questions(30), 4, 1)
    assert {way: len(each.seconds_M) for way, each in of.all_alone.items()} == {GREEDY: 30, 0.8: 30}
    assert {len(each.seconds_M) for each in of.alone.values()} == {claims.ALONE} and len(of.over) == 30
    assert len(verdicts(of)) == 18


def test_the_lowest_threshold_is_chosen_down_to_which_enough_is_kept(monkeypatch):
    """With the answer to each question as its text, or none at lower thresholds."""
    asked, lm = demo_questions(80), demo_toy()
    survey = types.SimpleNamespace(speaking_layers=lambda _: (1,), best_drafting=lambda: drafts(1, 4))
    monkeypatch.setattr(sled, "layers", lambda *_, **__: survey)

    def generate(_, prompts, __, ways, *___):
        texts = {way: [f"#### {a}" if way == GREEDY or way >= lowest else "####" for a in asked.answers]
                 for way in ways}
        return {way: Answers([lm.text.encode(text) for text in each], [[1]] * 80, np.ones(1))
                for way, each in texts.items()}

    monkeypatch.setattr(claims, "answered", generate)
    for lowest in (0.6, 0.4, 0.95):
        assert claims.choose(lm, asked, 4, None).threshold == lowest
    lowest = 1.0  # none keeps enough
    assert claims.choose(lm, asked, 4, None).threshold == 0.95


def test_a_threshold_is_chosen_with_a_margin():
    assert claims.keeps_enough([True] * 80) and claims.keeps_enough([True] * 112 + [False])
    assert not claims.keeps_enough([True] * 76 + [False] * 4)  # 95% by chance
    assert not claims.keeps_enough([True] * 8) and not claims.keeps_enough([])


@pytest.mark.parametrize(("sure", "here", "leaves"), [
    ([1, 1, 1], [1, 1, 1], [1, 1, 1]), ([1, 0, 1], [1, 1, 1], [0, 0, 0]), ([1, 0, 1], [1, 0, 1], [1, 0, 1])])
def test_rows_that_must_leave_together_do(sure, here, leaves):
    """A row that is not at the exit holds nobody back."""
    logits_BV = jnp.array([[9.0, 0.0] if each else [0.0, 0.0] for each in sure])
    view = ExitView(index=0, layer=1, here_B=jnp.array(here, bool), states={0: None, 1: None}, most_B=jnp.full(3, 9),
                    fused_logits=lambda: logits_BV, emitted_B=jnp.zeros(3), unverified_B=None, memory=(), prepared=None)
    assert Together(1, 0.8).at_exit(view).leaves_B.tolist() == [bool(each) for each in leaves]


def test_bytes_are_counted_by_shapes():
    """Of the toy, whose embedding is its head: a model to draft has one of its two layers."""
    lm = demo_toy()
    c = lm.config
    layer = 4 * (4 * c.width * 16 + 3 * c.width * c.mlp_width + 2 * c.width)
    shared = 4 * (c.vocab_size * c.width + c.width)
    kv = 2 * 4 * c.num_kv_heads * c.head_dim * (10 + 1)  # a slot more than the text's tokens
    one = shared + 2 * layer + 2 * kv + 4 * 5 * c.width
    assert memory_saved(lm, 1, 4, [10]) == pytest.approx([1 - one / (2 * shared + 3 * layer + 3 * kv)])


def test_limits_are_tried_on_an_engine(monkeypatch):
    assert let_through(demo_toy(), [1, 2], (1,), 0.8) == [False] * 80
    monkeypatch.setattr(sled, "Limits", lambda **_: sled.serving.request.Limits())
    assert let_through(demo_toy(), [1, 2], (1,), 0.8) == [True] * 80


def test_requests_beyond_what_was_granted_are_told(monkeypatch):
    """Granted are 2 layers of the longest prompt, 3 tokens, and one more; only the texts of two prompts need more."""
    made, moved, submitted = iter((1, 3)), [], []
    result = lambda: types.SimpleNamespace(tokens=[7] * next(made))  # noqa: E731

    def submit(prompt, **_):
        submitted.append(prompt)
        return types.SimpleNamespace(result=result)

    monkeypatch.setattr(sled, "Engine", lambda *_, limits, capacity, **__: types.SimpleNamespace(
        submit=submit) if (limits.budget, capacity) == (2 * 4, 8) else None)
    bar = types.SimpleNamespace(update=lambda by=1: moved.append(by))
    prompts, lengths_N = [[1, 2, 3], [1, 2], [4, 5]], np.array([5, 2, 3])
    assert over_budget(demo_toy(), prompts, lengths_N, (1,), bar) == [False, True]
    assert submitted == [[1, 2, 3], [4, 5]] and sum(moved) == 3
    assert over_budget(demo_toy(), prompts, np.ones(3, int), (1,), bar) == []


def test_a_budget_ends_requests_that_need_more():
    lm, prompts = demo_toy(), [[1, 2, 3], [4, 5]]
    lengths_N = np.array([len(tokens) for tokens in lm.generate(prompts, max_new_tokens=6).tokens])
    assert (lengths_N > 2).all()
    bar = types.SimpleNamespace(update=lambda by=1: None)
    assert over_budget(lm, prompts, lengths_N, (1,), bar) == [False, False]


def test_ways_answer_and_are_timed_batch_by_batch():
    """Two batches of three prompts, in turn, with what each way is given besides."""
    asked = []

    def generate(ids, *, batch_size, max_new_tokens, **how):
        asked.append((ids, how))
        assert (batch_size, max_new_tokens) == (2, 9)
        return types.SimpleNamespace(tokens=[[n, n] for [n] in ids], exit_layers=[[2, n] for [n] in ids])

    lm, bar = types.SimpleNamespace(generate=generate), types.SimpleNamespace(update=lambda: None)
    found = claims_runs.answered(lm, [[4], [6], [8]], 2, {"plain": {}, "other": dict(seed=1)}, 9, 2, bar)
    assert asked == 3 * [([[4], [6]], {}), ([[4], [6]], dict(seed=1)), ([[8]], {}), ([[8]], dict(seed=1))]
    for each in found.values():
        assert each.tokens == [[4, 4], [6, 6], [8, 8]] and each.seconds_M.shape == (2,) and (each.seconds_M > 0).all()
        assert each.depth_N.tolist() == [3, 4, 5] and each.length_N.tolist() == [2, 2, 2]
    assert found["plain"].same(found["other"]) == [True] * 3
    untimed = claims_runs.answered(lm, [[4]], 2, {"plain": {}}, 9, 0, bar)["plain"]
    assert untimed.tokens == [[4, 4]] and not untimed.seconds_M.size


def test_the_report_has_the_table_and_all_numbers(monkeypatch):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo_toy())
    monkeypatch.setattr(claims, "measure_claims", lambda *_: measured())
    report = claims.run_claims_bench(problems=4, rounds=1)
    text, found = report.markdown(), json.loads(report.json())
    assert text.count("\n| ") == 1 + len(report.rows) and "quality kept 100.0% [" in text and "Verdicts" in text
    assert found["rows"][0]["figures"][1]["value"] == 2 and found["rows"][0]["figures"][0]["claimed"] == 0.99
