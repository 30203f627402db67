"""Draws a sweep: accuracy over depth and over time, and what guesses gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sled.eval.sweep.rows import Row
from sled.plots import INK, STYLES, grid, new_figure, save_figure

if TYPE_CHECKING:
    from sled.eval.sweep.result import Swept

DASHES = ("-", "--", ":", "-.")
GREY, BAND = "#adb5bd", "#f1f3f5"


def draw(swept: Swept, path: Path) -> Path:
    """Accuracy over mean depth, where there is early exit; accuracy over speed relative to the exits' baseline;
    and speed over the draft length, where there are guesses.

    A colour and marker for each place to leave: full for early exit, the thresholds of one measure joined by a line;
    empty for guesses; small pentagons for what is timed beside plain decoding. The star is the exits' baseline, with
    its interval as a band; the grey line is the Pareto front, the ring the certified choice.
    """
    early = [row for row in swept.rows if row.threshold is not None]
    guesses = [row for row in swept.rows if row.draft is not None]
    base = swept.baseline()
    widths = [3] * bool(early) + [3] + [2.4] * bool(guesses)
    figure = new_figure(1 + 1.5 * sum(widths), 5.2)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    depth_front, speed_front = swept.fronts()
    time = panels[len(widths) - 1 - bool(guesses)]
    if early:
        _accuracy(panels[0], swept, base, lambda row: row.mean_depth, depth_front, swept.by_depth())
        panels[0].set_xlim(0, swept.num_layers * 1.04)
        panels[0].set_xlabel(f"mean depth in layers, of {swept.num_layers}")
        panels[0].set_title("Early exit: depth", fontsize=11, loc="left")
        time.sharey(panels[0])
        time.tick_params(labelleft=False)
    _accuracy(time, swept, base, swept.speed, speed_front, swept.rows)
    time.axvline(1, color=INK, linewidth=0.8, zorder=1)
    time.set_xlabel(f"times as fast as {base.method}")
    time.set_title("Everything: time", fontsize=11, loc="left")
    _stretch(panels[0], min(row.low if row == base else row.accuracy for row in swept.rows))
    panels[0].set_ylabel(f"solved, of {base.n} questions  (stretched towards 100%)")
    if guesses:
        _guesses(panels[-1], guesses, _styles(swept.rows))
    figure.legend(handles=_legend(swept, base), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    several = "; rows of several runs" if len({row.run for row in swept.rows}) > 1 else ""
    figure.suptitle(f"{swept.what}{several}", fontsize=9, color="#495057")
    return save_figure(figure, path)


def _accuracy(axes, swept: Swept, base: Row, x: Callable[[Row], float], front: Sequence[Row],
              shown: Sequence[Row]) -> None:
    """One panel of accuracy over `x`, with the Pareto front."""
    chosen = swept.choice().method
    axes.axhspan(base.low, base.high, color=BAND, zorder=0)
    axes.plot([x(row) for row in front], [row.accuracy for row in front], color=GREY, linewidth=6, zorder=1,
              solid_capstyle="round", solid_joinstyle="round")
    dashes = _dashes(swept.rows)
    for layers, (colour, marker) in _styles(swept.rows).items():
        mine = [row for row in shown if row.layers == layers]
        for measure in dict.fromkeys(row.measure for row in mine if row.measure):
            line = [row for row in mine if row.measure == measure]
            axes.plot([x(row) for row in line], [row.accuracy for row in line], dashes[measure], color=colour,
                      marker=marker, markersize=7, markeredgewidth=0.5, markeredgecolor="white", zorder=3)
        empty = [row for row in mine if row.draft is not None]
        axes.plot([x(row) for row in empty], [row.accuracy for row in empty], linestyle="none", color=colour,
                  marker=marker, markersize=6, markerfacecolor="none", zorder=4)
    for row in shown:
        if not row.layers:
            mark = dict(marker="*", markersize=16) if row == base else dict(marker="p", markersize=9)
            axes.plot([x(row)], [row.accuracy], color=INK, markeredgecolor="white", linestyle="none", zorder=5, **mark)
            if row != base:
                axes.annotate(row.method.removesuffix(", no exit"), (x(row), row.accuracy), xytext=(7, -3),
                              textcoords="offset points", fontsize=7, color="#495057")
        if row.method == chosen:
            axes.plot([x(row)], [row.accuracy], "o", markersize=15, markerfacecolor="none", markeredgecolor=INK,
                      markeredgewidth=1.4, zorder=6)
    _plain(axes)


def _stretch(axes, lowest: float) -> None:
    """Accuracy upwards, the way down from 1 being the root of what is missing: most points lie near the top."""
    height = lambda y: -np.sign(1 - y) * np.sqrt(np.abs(1 - y))  # noqa: E731
    axes.set_yscale("function", functions=(height, lambda h: 1 + h * np.abs(h)))
    ticks = [tick for tick in (0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 1) if tick >= lowest - 0.2]
    axes.set_yticks(ticks, [f"{100 * tick:.0f}%" for tick in ticks])
    axes.set_ylim(max(lowest - 0.05, 0), 1 + (1.05 - lowest) / 400)  # room for markers at 1


def _guesses(axes, rows: Sequence[Row], styles: dict[str, tuple[str, str]]) -> None:
    """Speed of guesses over the draft length, a line for each layer. They have the baseline's accuracy."""
    for layers, (colour, marker) in styles.items():
        line = sorted((row for row in rows if row.layers == layers), key=lambda row: row.draft)
        axes.plot([row.draft for row in line], [row.relative_speed for row in line], color=colour, marker=marker,
                  markersize=7, markerfacecolor="white", linewidth=1.4)
    axes.axhline(1, color=INK, linewidth=0.8, zorder=1)
    axes.set_xticks(sorted({row.draft for row in rows}))
    axes.set_xlabel("tokens guessed at a time")
    axes.set_ylabel(f"times as fast as {rows[0].against}")
    axes.set_title("Verified guesses: time", fontsize=11, loc="left")
    _plain(axes)


def _plain(axes) -> None:
    grid(axes)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker by layers."""
    layers = list(dict.fromkeys(row.layers for row in rows if row.layers))
    return {each: STYLES[i % len(STYLES)] for i, each in enumerate(layers)}


def _dashes(rows: Sequence[Row]) -> dict[str, str]:
    measures = dict.fromkeys(row.measure for row in rows if row.measure)
    return {measure: DASHES[i % len(DASHES)] for i, measure in enumerate(measures)}


def _legend(swept: Swept, base: Row) -> list:
    handles = [Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=1.4, markeredgecolor="white",
                      label=f"after layer{'s' if ' ' in layers else ''} {layers}")
               for layers, (colour, marker) in _styles(swept.rows).items()]
    dashes = _dashes(swept.rows)
    if len(dashes) > 1:
        handles += [Line2D([], [], color=INK, linestyle=dash, linewidth=1.4, label=measure.replace("_", " "))
                    for measure, dash in dashes.items()]
    if any(row.draft is not None for row in swept.rows):
        handles.append(Line2D([], [], color=INK, marker="o", markersize=7, markerfacecolor="none", linestyle="none",
                              markeredgewidth=1.3, label="empty: verified guesses"))
    if swept.choice().method:
        handles.append(Line2D([], [], color=INK, marker="o", markersize=14, markerfacecolor="none", linestyle="none",
                              markeredgewidth=1.6, label=f"fastest that is certified\nto lose {swept.delta:g} at most"))
    return [*handles, Line2D([], [], color=INK, marker="*", markersize=14, markeredgecolor="white", linestyle="none",
                             label=base.method),
            Patch(color=BAND, label=f"95% interval of {base.method}"),
            Line2D([], [], color=GREY, linewidth=6, label="Pareto front")]
