"""How early a token may leave, with a guarantee: the threshold chosen by Learn-then-Test.

Angelopoulos et al., "Learn then Test", 2021 (arXiv 2110.01052), as Schuster et al., "Confident Adaptive Language
Modeling", NeurIPS 2022 (arXiv 2207.07061) use it for early exit.

For each threshold lambda of a descending grid, H(lambda) says: the expected loss at lambda is more than delta. The
grid is walked down from the safest threshold; each H is rejected if its p-value is at most epsilon, and the walk
ends at the first that is not. A wrong rejection on the way takes one at the first true H, which is tested at
level epsilon whatever came before: so with probability 1 - epsilon or more, every rejected lambda, the last one
included, has an expected loss of at most delta. The losses of different thresholds may depend on each other, and
the expected loss need not fall or rise along the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from sled.errors import CalibrationError, SettingError
from sled.settings.rules import Number, Several, Whole

DELTA = Number(0, 1, open_low=True, open_high=True, float32=False,
               hint="it is the mean loss that is tolerated, such as 0.1")
EPSILON = Number(0, 1, open_low=True, open_high=True, float32=False,
                 hint="it is the probability that the tolerated loss is exceeded, such as 0.05")
THRESHOLDS = Several(object, "thresholds, such as (0.95, 0.9, 0.8)", one=False, hint="their order does not matter")
GRID = Number(0, 1, hint="a confidence lies in [0, 1]; 1 never leaves early")
SLACK = 1e-9  # a sum of losses this little above a whole number is that number, and rounding error


class Tested(NamedTuple):
    """One threshold of the walk: its mean loss over the prompts, and the p-value of "the expected loss is more"."""

    threshold: float
    mean_loss: float
    p_value: float


def p_value(mean_loss: float, n: int, delta: float) -> float:
    """The Hoeffding-Bentkus p-value of "the expected loss is more than delta", in [0, 1].

    min( e P[Binomial(n, delta) <= ceil(n r)], exp(-n h1(min(r, delta), delta)) ), with
    h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)), for the mean r of n independent losses in [0, 1].
    Where the hypothesis holds, it is at most u with probability u or less, for every u. Source: Angelopoulos et al.
    2021, there from Bates et al. 2021 (arXiv 2101.02703); tail bounds of Hoeffding 1963 and Bentkus 2004.

    mean_loss: r, in [0, 1]; n: how many losses, at least 1; delta: in (0, 1).
    Raises SettingError for a value out of range.
    """
    r = Number(0, 1, float32=False, hint="losses lie in [0, 1]")("mean_loss", mean_loss)
    n = Whole(1, hint="it counts the losses")("n", n)
    delta = DELTA("delta", delta)
    bentkus = math.e * float(bdtr(math.ceil(n * r - SLACK), n, delta))
    low = min(r, delta)
    h1 = (1 - low) * (math.log1p(-low) - math.log1p(-delta))
    if low > 0:  # a ln a is 0 at 0
        h1 += low * math.log(low / delta)
    return min(bentkus, math.exp(-n * h1))


def can_lose(largest: float, n: int, delta: float, epsilon: float) -> bool:
    """Whether n prompts show, with a confidence of 1 - epsilon, that the largest possible loss is more than delta.

    largest: the mean over the prompts of the largest loss that each could have had: of "solved by the full model and
    not by the early one", the share that the full model solves. Where it is not shown, "the expected loss is at most
    delta" says nothing: it would hold for a model that answers everything wrongly too.
    """
    return p_value(1 - largest, n, 1 - delta) <= epsilon


def fewest_losses(delta: float, epsilon: float) -> float:
    """How many losses, all of them 0, it takes for a p-value of epsilon: ln(epsilon) / ln(1 - delta), rounded up."""
    return float(np.ceil(math.log(epsilon) / math.log1p(-delta)))


def descending(grid: Iterable[float]) -> tuple[float, ...]:
    """The thresholds to walk down: the walk begins at the safest and ends at the first that fails.

    Raises SettingError unless they are in [0, 1], and at least one.
    """
    given = THRESHOLDS("grid", grid)
    if not given:
        raise SettingError(f"grid is {grid!r}, but must hold at least one threshold, such as 0.9")
    return tuple(sorted({GRID(f"grid[{i}]", x) for i, x in enumerate(given)}, reverse=True))


def walk(grid_K: Iterable[float], losses_at: Callable[[float], Sequence[float]], *, delta: float,
         epsilon: float) -> Iterator[Tested]:
    """Tests the thresholds from the largest down, as far as the first that fails (the last one yielded, then).

    grid_K: thresholds, in any order; losses_at: the losses [N] at a threshold, each in [0, 1], asked for only when the
    walk gets there; delta, epsilon: in (0, 1).
    Raises SettingError for settings out of range, CalibrationError for losses out of range.
    """
    delta, epsilon = DELTA("delta", delta), EPSILON("epsilon", epsilon)
    for threshold in descending(grid_K):
        losses = in_unit(losses_at(threshold), f"the loss at threshold {threshold:g}")
        mean = min(math.fsum(losses) / len(losses), 1.0)
        tested = Tested(threshold, mean, p_value(mean, len(losses), delta))
        yield tested
        if tested.p_value > epsilon:
            return


def last_rejected(walked: Iterable[Tested], epsilon: float) -> float | None:
    """The threshold that a walk chose: the last whose hypothesis was rejected; None where the first one failed.

    The threshold at which the walk ended is the first that did NOT pass, and carries no guarantee.
    """
    return next((t.threshold for t in reversed(list(walked)) if t.p_value <= epsilon), None)


def in_unit(values: Sequence[float], what: str) -> np.ndarray:
    """`values` as float64 [N], at least one. Raises CalibrationError for one that is not a number in [0, 1]."""
    try:
        clean = np.asarray(values, np.float64)
    except (TypeError, ValueError) as reason:
        raise CalibrationError(f"{what} is not a number for every prompt ({reason}); give numbers in [0, 1]") from None
    if clean.ndim != 1 or not clean.size:
        raise CalibrationError(f"{what} has shape {clean.shape}, but must be one number per prompt, for at least one")
    [outside] = np.nonzero(~((clean >= 0) & (clean <= 1)))
    if outside.size:
        raise CalibrationError(f"{what} is {clean[outside[0]]:g} for prompt {outside[0]}, but must lie in [0, 1]: the "
                               "guarantee holds for bounded losses only; divide by the largest possible one")
    return clean
