"""The points that no other point beats."""

from __future__ import annotations

from collections.abc import Sequence


def pareto(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the points at least as good as any other in x or in y, larger being better; ascending in x.

    Left out is a point to which another is at least equal in both, and better in one. Of equal points all stay.
    """
    front: list[int] = []
    best_right, best = -float("inf"), -float("inf")  # the largest y of greater x, and of x so far
    at = None
    for i in sorted(range(len(x)), key=lambda i: (-x[i], -y[i])):
        if x[i] != at:
            at, best_right, highest_here = x[i], best, y[i]
        if y[i] == highest_here and y[i] > best_right:
            front.append(i)
        best = max(best, y[i])
    return front[::-1]
