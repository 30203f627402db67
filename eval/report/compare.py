"""Methods compared on the same samples: differences with their intervals, and an exact test.

Methods that answer the same questions are right and wrong on much the same ones, so what two means tell apart is seen
in their differences sample by sample, not in two intervals side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import binomtest

from sled.errors import SettingError
from sled.eval.report.tables import table
from sled.settings.brief import brief
from sled.settings.rules import Whole

FEW = 50  # below, percentile intervals are noticeably too narrow
LEVEL = 0.95
TOGETHER = 2**20  # scores that are resampled at a time


@dataclasses.dataclass(frozen=True)
class Compared:
    """One method beside the baseline, on the same n samples.

    mean, interval: of its scores, with 95% bootstrap bounds.
    difference, difference_interval: of its mean less the baseline's, likewise; 0 for the baseline itself.
    wins, losses: samples on which it scored more than the baseline, and less.
    p_value: of McNemar's exact test (two-sided), where all scores of both are 0 or 1; else, and for the baseline, None.
    """

    method: str
    n: int
    mean: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    wins: int
    losses: int
    p_value: float | None


@brief
@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods beside the one named `against`, in the order given; `sled.eval.report.plot.draw_comparison` draws it.

    seed, draws: of the bootstrap.
    """

    rows: tuple[Compared, ...]
    against: str
    seed: int
    draws: int

    @property
    def tested(self) -> int:
        """The number of p-values."""
        return sum(row.p_value is not None for row in self.rows)

    def markdown(self, *, tested: int | None = None) -> str:
        """A table, the baseline marked, and below it what the reader must know of its numbers.

        tested: the p-values of the whole report that this is part of; None: it stands alone.
        """
        cells = [(f"{row.method} (baseline)" if row.method == self.against else row.method, row.n,
                  f"{row.mean:.3f}", _interval(row.interval), f"{row.difference:+.3f}",
                  _interval(row.difference_interval, "+"), row.wins, row.losses,
                  None if row.p_value is None else f"{row.p_value:.2g}") for row in self.rows]
        headings = ("method", "n", "mean", "95%", "difference", "95%", "wins", "losses", "p")
        return "\n\n".join([table(headings, cells), *self.notes(tested=tested)])

    def notes(self, *, tested: int | None = None) -> list[str]:
        """Warnings of few samples, intervals without width, and many p-values. tested: as of `markdown`."""
        notes, n, count = [], self.rows[0].n, self.tested if tested is None else tested
        if n < FEW:
            notes.append(f"Few samples ({n}): the intervals are rough, and rather too narrow. Below 6 samples on which "
                         "two methods differ, no test shows anything at p < 0.05.")
        flat = lambda bounds: bounds[1] - bounds[0] < 1e-12  # noqa: E731
        even = {"All scores": [row.method for row in self.rows if flat(row.interval)],
                f"All differences from {self.against}": [
                    row.method for row in self.rows if row.method != self.against and flat(row.difference_interval)]}
        if said := [f"{what} are equal for {', '.join(methods)}" for what, methods in even.items() if methods]:
            notes.append(f"{'. '.join(said)}: an interval without width says that resampling cannot tell, not that it "
                         f"is certain. What never happened in {n} samples may still happen with a probability of up to "
                         f"{1 - (1 - LEVEL) ** (1 / n):.3f}.")
        if self.tested and count > 1:
            where = "of this table" if tested is None else "in all tables of this report"
            notes.append(f"Each p is of its own comparison. Of the {count} {where}, the smallest is below 0.05 by "
                         f"chance more often than one time in 20: compare with {0.05 / count:.2g} instead "
                         "(Bonferroni).")
        return notes

    def json(self) -> dict[str, Any]:
        """The rows by field name, as JSON has them, and what they were made with."""
        return {"against": self.against, "seed": self.seed, "draws": self.draws, "level": LEVEL,
                "rows": [dataclasses.asdict(row) for row in self.rows]}


def compare(outcomes: Mapping[str, np.ndarray], against: str, *, seed: int = 0, draws: int = 10_000) -> Comparison:
    """Each method's mean score, and its difference from the baseline's on the same samples.

    outcomes: by method, the scores [N] in [0, 1] of the same N samples in the same order.
    against: the name of the baseline.
    seed, draws: of the bootstrap (Efron 1979): percentiles of the means over `draws` samples of N, drawn with
        replacement once for all methods, so that a difference is always that of one draw. The result depends neither
        on the order of the samples nor on that of the methods.

    McNemar's test (McNemar 1947), exact, asks whether a sample that only one of two methods solved is as likely to be
    solved by the one as by the other: a two-sided binomial test of `wins` among such samples at 1/2. Where no sample
    tells the two apart, p is 1.

    Raises SettingError for scores that are not N numbers in [0, 1] for every method, N at least 1, and for an unknown
    baseline.
    """
    seed = Whole(0, hint="it is the bootstrap's random seed")("seed", seed)
    draws = Whole(1, hint="it counts the bootstrap's samples; 10,000 is usual")("draws", draws)
    scores = _scores(outcomes)
    if against not in scores:
        raise SettingError(f"against is {against!r}, which is none of the methods compared; "
                           f"choose one of {', '.join(map(repr, scores))}")
    # Samples in an order of their own, so that the draws do not depend on how they were given.
    order = np.lexsort([scores[name] for name in sorted(scores)])
    scores = {name: values[order] for name, values in scores.items()}
    drawn = _bootstrap(scores, np.random.default_rng(seed), draws)
    return Comparison(tuple(_row(name, scores, drawn, against) for name in scores), against, seed, draws)


def _row(name: str, scores, drawn, against: str) -> Compared:
    mine, base = scores[name], scores[against]
    wins, losses = int((mine > base).sum()), int((mine < base).sum())
    binary = all(np.isin(values, (0, 1)).all() for values in (mine, base))
    return Compared(
        method=name, n=len(mine), mean=float(mine.mean()), interval=_percentiles(drawn[name]),
        difference=float((mine - base).mean()), difference_interval=_percentiles(drawn[name] - drawn[against]),
        wins=wins, losses=losses, p_value=mcnemar(wins, losses) if binary and name != against else None)


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value for so many samples that only one of two methods, or only the other, solved."""
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def _bootstrap(scores: Mapping[str, np.ndarray], rng: np.random.Generator, draws: int) -> dict[str, np.ndarray]:
    """Each method's mean in every draw [draws], a draw taking the same samples of all."""
    n = len(next(iter(scores.values())))
    means: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for begun in range(0, draws, together := max(1, TOGETHER // n)):
        index = rng.integers(n, size=(min(together, draws - begun), n))
        for name, values in scores.items():
            means[name].append(values[index].mean(axis=1))
    return {name: np.concatenate(parts) for name, parts in means.items()}


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _scores(outcomes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not isinstance(outcomes, Mapping) or not outcomes:
        raise SettingError(f"outcomes is {outcomes!r}, but must be a mapping from each method's name to its scores")
    scores = {}
    for name, given in outcomes.items():
        try:
            values = np.asarray(given, np.float64)
        except (TypeError, ValueError) as reason:
            raise SettingError(f"the scores of {name!r} are not numbers ({reason}); "
                               "give one in [0, 1] per sample") from None
        if values.ndim != 1 or not values.size:
            raise SettingError(f"the scores of {name!r} have the shape {values.shape}, but must be one number per "
                               "sample, for at least one sample")
        [outside] = np.nonzero(~((values >= 0) & (values <= 1)))
        if outside.size:
            raise SettingError(f"the score of {name!r} for sample {outside[0]} is {values[outside[0]]:g}, but scores "
                               "must lie in [0, 1]; divide by the largest possible one")
        scores[name] = values
    first = next(iter(scores))
    for name, values in scores.items():
        if len(values) != len(scores[first]):
            raise SettingError(f"{name!r} has {len(values)} scores and {first!r} has {len(scores[first])}; methods are "
                               "compared on the same samples, so give as many for each, in the same order")
    return scores


def _interval(bounds: tuple[float, float], sign: str = "") -> str:
    return f"[{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"
