"""The settings to choose from, out of many measured on the same samples: certified ones, and the Pareto front.

Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052) with one claim for every setting: "its expected loss is
more than delta". The p-values are those of `sled.calibration.learn_then_test`; `certified` says which of the claims may
be rejected together.
"""

from __future__ import annotations

from collections.abc import Sequence


def certified(p_values: Sequence[Sequence[float]], epsilon: float) -> list[int]:
    """The number of claims that are rejected of each sequence, counted from its beginning.

    p_values: by sequence, the p-values in an order that was fixed before the losses were seen. Sequences may differ in
    length and depend on each other in any way. epsilon: in (0, 1).

    Each sequence is walked from its beginning, as far as its p-values are at most epsilon / m, where m counts the
    sequences not yet walked to their end; a sequence that comes to its end leaves the others more.

    With probability 1 - epsilon or more, every claim rejected is false. For let k sequences hold a true claim. As long
    as only false claims were rejected, none of the k has come to its end, so m >= k. The first wrong rejection, if
    there is one, is then of the first true claim of one of them, at a p-value of at most epsilon / m <= epsilon / k.
    These are k claims, fixed before the losses were seen; by the union bound, one of them has such a p-value with a
    probability of at most epsilon. (Sequences of one claim each: Holm 1979. One sequence: Maurer et al. 1995.)
    """
    walked = [0] * len(p_values)
    going = {i for i, sequence in enumerate(p_values) if sequence}
    moved = True
    while going and moved:
        level, moved = epsilon / len(going), False
        for i in sorted(going):
            while walked[i] < len(p_values[i]) and p_values[i][walked[i]] <= level:
                walked[i] += 1
                moved = True
        going = {i for i in going if walked[i] < len(p_values[i])}
    return walked


def pareto(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the points at least as good as any other in x or in y, larger being better; ascending in x.

    Left out is a point to which another is at least equal in both, and better in one. Of equal points all stay.
    """
    points = list(zip(x, y, strict=True))
    beaten = {(a, b) for a, b in points if any(c >= a and d >= b and (c, d) != (a, b) for c, d in points)}
    return sorted((i for i, point in enumerate(points) if point not in beaten), key=lambda i: (x[i], -y[i]))
