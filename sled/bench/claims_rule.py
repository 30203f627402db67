"""When a claim holds: a rule on figures and their intervals, so that no verdict is written by hand; and the intervals.

Shares have Wilson's interval. What is measured per text or batch, as seconds are, is resampled over these in pairs
(Efron's bootstrap), so that what compared ways have in common does not widen it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest, rankdata

HOLDS, IN_PART, DOES_NOT_HOLD = "holds", "holds in part", "does not hold"
RULE = (
    "Verdicts follow from figures and intervals alone. A figure reaches a claim where it is what is claimed, or better, "
    "and the whole interval lies beyond no effect (1 for speeds, 0 for differences). It fails where the interval does "
    "not; or, of a figure that has no such point, as quality kept, where the whole interval falls short of what is "
    "claimed. A claim holds where all of its figures reach it. It does not hold where an effect fails to show, or all "
    "figures fail. Else it holds in part.")
DRAWS = 2000
SHARE, SPEED, DIFFERENCE, CORRELATION = "{:.1%}", "{:.2f}x", "{:+.1%}", "{:+.2f}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure measured for a claim, with its 95% interval.

    form: how its numbers are written. claimed: what the claim says that it is at least, or, if `at_most`, at most;
    None: only that there is an effect. no_effect: the value that means none, below `claimed`; None where a figure has
    no such value.
    """

    name: str
    value: float
    low: float
    high: float
    form: str
    claimed: float | None = None
    no_effect: float | None = None
    at_most: bool = False

    @property
    def reaches(self) -> bool:
        """It is as good as is claimed, and an effect, where there is to be one, is beyond doubt."""
        if self.no_effect is not None and self.fails:
            return False
        return self.claimed is None or (self.value <= self.claimed if self.at_most else self.value >= self.claimed)

    @property
    def fails(self) -> bool:
        """No effect is shown; or, where there is no such value, the interval excludes what is claimed."""
        if self.no_effect is not None:
            return self.low <= self.no_effect
        return self.low > self.claimed if self.at_most else self.high < self.claimed

    def __str__(self) -> str:
        value, low, high = (self.form.format(number) for number in (self.value, self.low, self.high))
        return f"{self.name} {value} [{low}, {high}]"


def verdict(figures: Sequence[Figure]) -> str:
    """Whether the claim holds that these figures, at least one, were measured for: see `RULE`."""
    if all(figure.fails for figure in figures) or any(
            figure.fails and figure.no_effect is not None for figure in figures):
        return DOES_NOT_HOLD
    return HOLDS if all(figure.reaches for figure in figures) else IN_PART


def share(name: str, hits: Sequence[bool], **claim) -> Figure:
    """The share of the cases, at least one, that are hits; Wilson's interval."""
    count, n = sum(map(bool, hits)), len(hits)
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return Figure(name, count / n, float(low), float(high), SHARE, **claim)


def speed(name: str, theirs_N: np.ndarray, ours_N: np.ndarray, **claim) -> Figure:
    """How many times as fast we are, by the seconds that both took for the same N pieces of work."""
    return resampled(name, SPEED, lambda theirs, ours: theirs.sum() / ours.sum(), theirs_N, ours_N,
                     **{"no_effect": 1.0, **claim})


def correlation(name: str, one_N: np.ndarray, other_N: np.ndarray, known_NK: np.ndarray) -> Figure:
    """The partial rank correlation (Spearman) of two columns: what one tells of the other beyond K known ones."""
    return resampled(name, CORRELATION, partial_rank_correlation, one_N, other_N, known_NK, no_effect=0.0)


def resampled(name: str, form: str, statistic: Callable[..., float], *columns, **claim) -> Figure:
    """A statistic of columns of N, and the percentiles of it over samples of N rows drawn with replacement."""
    columns = [np.asarray(column, np.float64) for column in columns]
    n = len(columns[0])
    drawn = [statistic(*(column[index_N] for column in columns))
             for index_N in np.random.default_rng(0).integers(n, size=(DRAWS, n))]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Figure(name, float(statistic(*columns)), float(low), float(high), form, **claim)


def partial_rank_correlation(one_N: np.ndarray, other_N: np.ndarray, known_NK: np.ndarray) -> float:
    """The correlation of the ranks of two columns, less what is linear in the ranks of K others; 0 where nothing of a
    column is left."""
    known = np.column_stack([np.ones(len(one_N)), rankdata(known_NK, axis=0)])
    both_N2 = np.column_stack([rankdata(one_N), rankdata(other_N)])
    rest_N2 = both_N2 - known @ np.linalg.lstsq(known, both_N2, rcond=None)[0]
    sizes = np.linalg.norm(rest_N2, axis=0)
    if (sizes < 1e-6 * len(one_N)).any():
        return 0.0
    return float(rest_N2[:, 0] @ rest_N2[:, 1] / sizes.prod())
