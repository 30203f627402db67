"""Draws a comparison: every method's difference from the baseline, with its interval."""

from __future__ import annotations

import os
from pathlib import Path

from sled.eval.report.compare import Comparison
from sled.plots import INK, STYLES, grid, new_figure, save_figure, writable_picture

APART, UNDECIDED = STYLES[0][0], "#495057"


def draw_comparison(comparison: Comparison, path: str | os.PathLike) -> Path:
    """A line for each method: a full circle where its interval leaves out 0, else an empty one; counts at the right.

    Raises SettingError unless the path ends in .png, .svg or .pdf.
    """
    path = writable_picture("the picture", path)
    others = [row for row in comparison.rows if row.method != comparison.against]
    [base] = [row for row in comparison.rows if row.method == comparison.against]
    figure = new_figure(8, 1.6 + 0.42 * max(len(others), 1))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=1.4)
    for place, row in enumerate(others):
        low, high = row.difference_interval
        apart = low > 0 or high < 0
        colour = APART if apart else UNDECIDED
        axes.plot([low, high], [place, place], color=colour, linewidth=2 if apart else 1.2, solid_capstyle="butt")
        axes.plot([row.difference], [place], "o", markersize=7, markeredgecolor=colour, markeredgewidth=1.4,
                  markerfacecolor=colour if apart else "white")
        p = "" if row.p_value is None else f"   p {row.p_value:.2g}"
        axes.annotate(f"+{row.wins} \N{MINUS SIGN}{row.losses}{p}", (1.01, place), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8, color=UNDECIDED)
    axes.set_yticks(range(len(others)), [f"{row.method}  ({row.mean:.3f})" for row in others])
    axes.set_ylim(max(len(others), 1) - 0.5, -0.5)  # the first on top
    axes.set_xlabel(f"difference of the mean score from {comparison.against}  ({base.mean:.3f}, n = {base.n}), with "
                    "95% intervals", fontsize=9)
    grid(axes, "x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return save_figure(figure, path)
