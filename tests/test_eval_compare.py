"""Comparing methods on the same samples: hand-computed tests, coverage of the intervals, what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sled.errors import SettingError
from sled.eval.report.compare import compare, mcnemar
from sled.eval.report.plot import draw_comparison

RNG = np.random.default_rng(5)
BASE = (RNG.random(80) < 0.6).astype(float)
OTHER = np.where(RNG.random(80) < 0.3, 1 - BASE, BASE)


@pytest.mark.parametrize(("wins", "losses", "p"), [
    (0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 2**5), (6, 0, 2 / 2**6), (0, 6, 2 / 2**6), (7, 7, 1.0),
    (10, 2, 2 * (1 + 12 + 66) / 2**12),  # twice the probability of 0, 1 or 2 of 12 coins
    (8, 1, 2 * (1 + 9) / 2**9),
])
def test_mcnemar_by_hand(wins, losses, p):
    assert mcnemar(wins, losses) == pytest.approx(p, rel=1e-12)


def test_rows_are_what_was_counted():
    outcomes = {"base": np.array([1, 1, 0, 0, 1]), "other": np.array([1, 0, 1, 1, 1]), "half": np.array([0.5] * 5)}
    base, other, half = compare(outcomes, "base").rows
    assert (base.method, base.n, base.mean, base.difference, base.difference_interval) == ("base", 5, 0.6, 0, (0, 0))
    assert (base.wins, base.losses, base.p_value) == (0, 0, None)
    assert (other.mean, other.wins, other.losses, other.p_value) == (0.8, 2, 1, 1.0)
    assert other.difference == pytest.approx(0.2) and other.interval[0] <= 0.8 <= other.interval[1]
    assert (half.wins, half.losses, half.p_value, half.interval) == (2, 3, None, (0.5, 0.5))
    assert half.difference == pytest.approx(-0.1)


def test_a_difference_is_of_the_same_draw():
    """Two methods that err alike: each mean is uncertain, their difference is not."""
    row = compare({"base": BASE, "same": BASE, "flip": OTHER}, "base").rows
    assert row[1].interval[1] - row[1].interval[0] > 0.15 and row[1].difference_interval == (0, 0)
    assert row[2].difference_interval[0] < 0 < row[2].difference_interval[1]


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(80)), turned=st.booleans(), seed=st.integers(0, 3))
def test_orders_of_samples_and_methods_do_not_matter(order, turned, seed):
    given = {"base": BASE, "other": OTHER, "part": (BASE + OTHER) / 2 + 0.1 * (BASE == OTHER) * (BASE < 1)}
    here = {name: values[order] for name, values in (reversed(given.items()) if turned else given.items())}
    one, other = (compare(x, "base", seed=seed, draws=200) for x in (given, here))
    assert {row.method: row for row in one.rows} == {row.method: row for row in other.rows}
    assert [row.method for row in other.rows] == list(here)


def test_seed_and_draws_decide_the_intervals():
    scores = np.random.default_rng(2).random((2, 50))  # means of 0 and 1 are too coarse to differ by seed
    at = lambda **how: compare(dict(zip("ab", scores, strict=True)), "a", **how).rows[1].interval  # noqa: E731
    assert at() == at(seed=0, draws=10_000) != at(seed=1)
    assert at(draws=1)[0] == at(draws=1)[1]


def test_intervals_cover_the_truth():
    """Of 200 comparisons of 100 samples, 95% intervals hold the true mean and difference about as often."""
    rng, held = np.random.default_rng(1), np.zeros(2)
    for _ in range(200):
        base = rng.random(100) < 0.7
        other = np.where(rng.random(100) < 0.2, rng.random(100) < 0.4, base)  # mean 0.8 * 0.7 + 0.2 * 0.4
        row = compare({"base": base, "other": other}, "base", draws=400, seed=3).rows[1]
        for i, (truth, (low, high)) in enumerate([(0.64, row.interval), (-0.06, row.difference_interval)]):
            held[i] += low <= truth <= high
    assert (held / 200 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200)).all()


def test_many_samples_are_resampled_in_parts():
    rng = np.random.default_rng(0)
    many = {"base": rng.random(300_000), "other": rng.random(300_000)}  # three draws at a time
    low, high = compare(many, "base", draws=10).rows[1].interval
    assert 0.498 < low < high < 0.502


def test_the_report_warns_where_numbers_say_less_than_they_seem_to(tmp_path):
    few = compare({"base": [1, 1, 1], "a | b": [1, 0, 1], "c": [0, 0, 1]}, "base", draws=50)
    said = few.markdown()
    assert "base (baseline)" in said and "a \\| b" in said and "| -0.333 |" in said
    assert "Few samples (3)" in said and "All scores are equal for base" in said and "0.632" in said
    assert "Of the 2 of this table" in said and "compare with 0.025" in said
    written = json.loads(json.dumps(few.json()))
    assert written["against"] == "base" and written["rows"][2]["wins"] == 0 and len(written["rows"]) == 3
    for name in ("a.png", "a.svg"):
        assert draw_comparison(few, tmp_path / name).stat().st_size > 1000
    assert draw_comparison(compare({"base": [1]}, "base", draws=5), tmp_path / "one.png").exists()


def test_differences_without_width_are_noted_as_means_are():
    said = lambda **others: compare({"base": BASE, **others}, "base", draws=50).markdown()  # noqa: E731
    assert "All differences from base are equal for same: an interval without width" in said(same=BASE, flip=OTHER)
    assert "All scores" not in said(same=BASE) and "0.037" in said(same=BASE)  # 1 - 0.05 ** (1 / 80)
    assert "without width" not in said(flip=OTHER) + said() and "Few" not in said(flip=OTHER)


@pytest.mark.parametrize(("outcomes", "how", "says"), [
    ({}, {}, "must be a mapping"), ([[1, 0]], {}, "must be a mapping"),
    ({"base": [1, 0], "b": [1]}, {}, "'b' has 1 scores and 'base' has 2"), ({"base": []}, {}, "at least one sample"),
    ({"base": [[1, 0]]}, {}, r"shape \(1, 2\)"), ({"base": 1.0}, {}, r"shape \(\)"),
    ({"base": [0, 1.5]}, {}, "sample 1 is 1.5"), ({"base": [-0.1]}, {}, "sample 0 is -0.1"),
    ({"base": [0, float("nan")]}, {}, "sample 1 is nan"), ({"base": [float("inf")]}, {}, "is inf"),
    ({"base": ["yes"]}, {}, "are not numbers"), ({"other": [1]}, {}, "against is 'base'.*'other'"),
    *(({"base": [1]}, {name: value}, f"{name} is") for name, value in (("seed", -1), ("draws", 0), ("draws", 2.5))),
], ids=str)
def test_what_cannot_be_compared(outcomes, how, says):
    with pytest.raises(SettingError, match=says):
        compare(outcomes, "base", **how)
