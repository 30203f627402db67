"""Draws a sweep: what accuracy costs in depth, and what it costs in time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sled.eval.sweep_rows import Row

if TYPE_CHECKING:
    from sled.eval.sweep_result import Swept

# Okabe and Ito's colours, told apart by colour-blind eyes too; a marker each besides.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
INK, FAINT = "#212529", "#adb5bd"


def draw(swept: Swept, path: Path) -> Path:
    """Left, accuracy over mean depth (early exit); right, over speed relative to no exit (everything).

    A colour and marker for each place to leave: full for early exit, its thresholds joined by a line; empty for
    guesses. The star is no exit, with its 95% interval as a band; the grey steps are the Pareto front.
    """
    groups = _groups(swept.rows)
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    depth_front, speed_front = swept.fronts()
    for axes, x, front, rising in ((left, _depth, depth_front, False), (right, _speed, speed_front, True)):
        _front(axes, [x(row) for row in front], [row.accuracy for row in front], rising)
        for (colour, marker), (_, rows) in zip(_styles(groups), groups.items(), strict=True):
            _group(axes, rows, x, colour, marker, with_guesses=axes is right)
        _baselines(axes, swept.rows, x)
        axes.grid(color="#e9ecef", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlim(0, swept.num_layers * 1.04)
    left.set_xlabel(f"mean depth, of {swept.num_layers} layers")
    left.set_ylabel("share of the questions solved")
    left.set_title("What leaving early costs", fontsize=11, loc="left")
    right.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    right.set_xlabel("times as fast as no exit, in the same rounds")
    several = len({row.run for row in swept.rows}) > 1
    right.set_title("and what it gains" + (" (rows of several runs)" if several else ""), fontsize=11, loc="left")
    figure.legend(handles=_legend(groups, swept), loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    figure.suptitle(swept.what, fontsize=9, color="#495057")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    figure.savefig(path, dpi=150)
    return path


def _depth(row: Row) -> float:
    return row.mean_depth


def _speed(row: Row) -> float:
    return row.relative_speed


def _groups(rows) -> dict[str, list[Row]]:
    """Rows with exits by their layers and measure, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.layers:
            groups.setdefault(row.layers, []).append(row)
    return groups


def _styles(groups):
    return [STYLES[i % len(STYLES)] for i in range(len(groups))]


def _front(axes, x, y, rising):
    axes.step(x, y, where="pre" if rising else "post", color=FAINT, linewidth=5, alpha=0.6, zorder=1, solid_capstyle="round")


def _group(axes, rows, x, colour, marker, *, with_guesses):
    early = [row for row in rows if row.draft is None]
    axes.plot([x(r) for r in early], [r.accuracy for r in early], color=colour, marker=marker, markersize=6, linewidth=1.3)
    if with_guesses:
        guesses = [row for row in rows if row.draft is not None]
        axes.plot([x(r) for r in guesses], [r.accuracy for r in guesses], color=colour, marker=marker, markersize=7, linestyle="none", markerfacecolor="white", markeredgewidth=1.4)


def _baselines(axes, rows, x):
    for row in rows:
        if not row.layers:
            axes.plot([x(row)], [row.accuracy], marker="*", color=INK, markersize=15)


def _legend(groups, swept):
    return [Line2D([], [], color=c, marker=m, label=f"after {name}") for (c, m), name in zip(_styles(groups), groups, strict=True)]
