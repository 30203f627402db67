"""When a claim holds: a rule on figures and their intervals, so that no verdict is written by hand; and the intervals.

Shares have Wilson's interval. What is measured per text or batch, as seconds are, is resampled over these in pairs
(Efron's bootstrap), so that what compared ways have in common does not widen it. Of few texts or batches it would come
out too narrow, so these have no interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest, rankdata

HOLDS, IN_PART, NOT_SHOWN, DOES_NOT_HOLD = "holds", "holds in part", "not shown", "does not hold"
SMALLER = f"{DOES_NOT_HOLD} (a smaller gain)"
ENOUGH = 6  # texts or batches, to resample them
RULE = (
    "Verdicts follow from figures and intervals alone. A figure reaches a claim where it is what is claimed or better "
    "and, if some value of it means no effect (1 for speeds, 0 for differences, bytes spared and correlations), the "
    "whole interval lies beyond that. It fails where the whole interval falls short of what is claimed, or lies at no "
    "effect or on its wrong side. Else it is undecided; so is every figure without an interval, of fewer than "
    f"{ENOUGH} texts or batches. A claim holds where all of its figures reach it. It does not hold where all fail, or "
    "where one fails that is not beyond no effect; where all fail and each is an effect beyond doubt, the gain is "
    "called a smaller one. It is not shown where no figure reaches it and not all fail, where an interval allows for "
    "no effect, or where one is missing. Else it holds in part.")
DRAWS = 2000
SHARE, SPEED, DIFFERENCE, CORRELATION = "{:.1%}", "{:.2f}x", "{:+.1%}", "{:+.2f}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure measured for a claim, with its 95% interval, or None for both of its ends.

    form: how its numbers are written. claimed: what the claim says that it is at least, or, if `at_most`, at most;
    None: only that there is an effect. no_effect: the value that means none, below `claimed`; None where a figure has
    no such value.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    form: str
    claimed: float | None = None
    no_effect: float | None = None
    at_most: bool = False

    @property
    def shows(self) -> bool:
        """There is an interval, and an effect, where there is to be one, is beyond doubt."""
        return self.low is not None and (self.no_effect is None or self.low > self.no_effect)

    @property
    def reaches(self) -> bool:
        """It is as good as is claimed, and shows it."""
        good = self.claimed is None or (self.value <= self.claimed if self.at_most else self.value >= self.claimed)
        return self.shows and good

    @property
    def fails(self) -> bool:
        """The interval excludes what is claimed, or an effect that there is to be."""
        if self.low is None:
            return False
        if self.claimed is not None and (self.low > self.claimed if self.at_most else self.high < self.claimed):
            return True
        return self.no_effect is not None and self.high <= self.no_effect

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.name} {self.form.format(self.value)} (too few for an interval)"
        value, low, high = (self.form.format(number) for number in (self.value, self.low, self.high))
        return f"{self.name} {value} [{low}, {high}]"


def verdict(figures: Sequence[Figure]) -> str:
    """Whether the claim holds that these figures, at least one, were measured for: see `RULE`."""
    if all(figure.reaches for figure in figures):
        return HOLDS
    if any(figure.fails and not figure.shows for figure in figures):
        return DOES_NOT_HOLD
    if all(figure.fails for figure in figures):
        return SMALLER if all(figure.no_effect is not None for figure in figures) else DOES_NOT_HOLD
    in_part = any(figure.reaches for figure in figures) and all(figure.shows for figure in figures)
    return IN_PART if in_part else NOT_SHOWN


def share(name: str, hits: Sequence[bool], **claim) -> Figure:
    """The share of the cases that are hits; Wilson's interval. Of no cases it is 0, without an interval."""
    count, n = sum(map(bool, hits)), len(hits)
    if not n:
        return Figure(name, 0.0, None, None, SHARE, **claim)
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return Figure(name, count / n, float(low), float(high), SHARE, **claim)


def speed(name: str, theirs_N: np.ndarray, ours_N: np.ndarray, **claim) -> Figure:
    """How many times as fast we are, by the seconds that both took for the same N pieces of work."""
    return resampled(name, SPEED, lambda theirs, ours: theirs.sum(-1) / ours.sum(-1), theirs_N, ours_N,
                     **{"no_effect": 1.0, **claim})


def correlation(name: str, one_N: np.ndarray, other_N: np.ndarray, *known_N: np.ndarray) -> Figure:
    """The partial rank correlation (Spearman) of two columns: what one tells of the other beyond those known."""
    return resampled(name, CORRELATION, partial_correlation, *map(rankdata, (one_N, other_N, *known_N)), no_effect=0.0)


def resampled(name: str, form: str, statistic: Callable, *columns: np.ndarray, **claim) -> Figure:
    """A statistic over the last axis of columns [N], and its percentiles over samples of N rows drawn with replacement;
    without these where N is less than `ENOUGH`."""
    value = float(statistic(*columns))
    if len(columns[0]) < ENOUGH:
        return Figure(name, value, None, None, form, **claim)
    index_DN = np.random.default_rng(0).integers(len(columns[0]), size=(DRAWS, len(columns[0])))
    low, high = np.quantile(statistic(*(column[index_DN] for column in columns)), [0.025, 0.975])
    return Figure(name, value, float(low), float(high), form, **claim)


def partial_correlation(*columns: np.ndarray) -> np.ndarray:
    """Over the last axis, the correlation of what is left of the first two columns where the others are subtracted, as
    far as they are linear in them; 0 where nothing is left of one."""
    rows = np.stack([column - column.mean(-1, keepdims=True) for column in columns], axis=-2)
    spread = rows @ rows.swapaxes(-1, -2)
    inverse = np.linalg.inv(spread + 1e-9 * rows.shape[-1]**3 * np.eye(len(columns)))  # where columns are constant, too
    return -inverse[..., 0, 1] / np.sqrt(inverse[..., 0, 0] * inverse[..., 1, 1])
