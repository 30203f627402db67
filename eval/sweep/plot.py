"""Draws a sweep: accuracy over depth and over time, and the speed of verified drafts."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sled.eval.sweep.result import SweepRow, Swept
from sled.plots import INK, STYLES, grid, new_figure, save_figure, writable_picture

DASHES = ("-", "--", ":", "-.")
GREY, BAND = "#adb5bd", "#f1f3f5"
PER_INCH = 12  # letters of a title


def draw_sweep(swept: Swept, path: str | os.PathLike) -> Path:
    """Accuracy over mean depth, where there is early exit; accuracy over speed relative to the exits' baseline;
    and speed over the draft length, where drafts are verified. path: .png, .svg or .pdf.

    A colour and marker for each place to leave: full for early exit, the methods of one program joined by a line;
    empty for verified drafts; small pentagons for what is timed beside plain decoding. The star is the exits' baseline,
    with its interval as a band; the grey line is the Pareto front, the ring the certified choice.
    """
    path = writable_picture("the picture", path)
    early, drafted = _lines(swept, verifies=False), _lines(swept, verifies=True)
    base = swept.baseline()
    widths = [3] * bool(early) + [3] + [2.4] * bool(drafted)
    figure = new_figure(1 + 1.5 * sum(widths), 5.2)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    depth_front, speed_front = swept.fronts()
    time = panels[len(widths) - 1 - bool(drafted)]
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
    _scale(panels[0], base, swept.rows)
    if drafted:
        _drafts(panels[-1], drafted, _styles(swept))
    figure.legend(handles=_legend(swept, base), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    several = "; rows of several runs" if len({row.run for row in swept.rows}) > 1 else ""
    lines = textwrap.wrap(f"{swept.what}{several}", int(PER_INCH * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=9, color="#495057")
    return save_figure(figure, path)


def _accuracy(axes, swept: Swept, base: SweepRow, x: Callable[[SweepRow], float], front: Sequence[SweepRow],
              shown: Sequence[SweepRow]) -> None:
    """One panel of accuracy over `x`, with the Pareto front."""
    chosen = swept.choice().method
    axes.axhspan(base.low, base.high, color=BAND, zorder=0)
    axes.plot([x(row) for row in front], [row.accuracy for row in front], color=GREY, linewidth=6, zorder=1,
              solid_capstyle="round", solid_joinstyle="round")
    styles, dashes = _styles(swept), _dashes(swept)
    for line in _lines(swept, verifies=False):
        colour, marker = styles[line[0].layers]
        axes.plot([x(row) for row in line], [row.accuracy for row in line], dashes[_variant(swept, line)], color=colour,
                  marker=marker, markersize=7, markeredgewidth=0.5, markeredgecolor="white", zorder=3)
    for row in shown:
        if row.verifies:
            colour, marker = styles[row.layers]
            axes.plot([x(row)], [row.accuracy], linestyle="none", color=colour, marker=marker, markersize=6,
                      markerfacecolor="none", zorder=4)
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


def _scale(axes, base: SweepRow, rows: Sequence[SweepRow]) -> None:
    """The axis of accuracy: most points lie near the top, so that the way down from 1 is the root of what is missing;
    evenly spaced where no method solves much. There is room for whole markers at the lowest and the highest."""
    lowest, highest = min(base.low, *(row.accuracy for row in rows)), max(row.accuracy for row in rows)
    if highest < 0.7:
        top = max(base.high, highest)
        axes.set_ylim(lowest - 0.06 * (top - lowest), top + 0.06 * (top - lowest))
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%" if y >= 0 else "")
        axes.set_ylabel(f"solved, of {base.n} questions")
        if not highest:
            axes.text(0.5, 0.5, "no method solves any question", transform=axes.transAxes, ha="center", color=INK)
        return
    height = lambda y: -np.sign(1 - y) * np.sqrt(np.abs(1 - y))  # noqa: E731
    axes.set_yscale("function", functions=(height, lambda h: 1 + h * np.abs(h)))
    ticks = [tick for tick in (0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 1) if tick >= lowest - 0.2]
    axes.set_yticks(ticks, [f"{100 * tick:.0f}%" for tick in ticks])
    axes.set_ylim(lowest - 0.05, 1 + (1.05 - lowest) / 400)
    axes.set_ylabel(f"solved, of {base.n} questions  (stretched towards 100%)")


def _drafts(axes, lines: Sequence[Sequence[SweepRow]], styles: dict[str, tuple[str, str]]) -> None:
    """Speed of verified drafts over what is swept in each program, such as the draft length. They have the baseline's
    accuracy."""
    rows = [row for line in lines for row in line]
    names = {name for line in lines for name in _differing(line)}
    [name, *others] = names or {"draft"}
    at = lambda row: row.settings.get(name)  # noqa: E731
    if others or not all(isinstance(at(row), int | float) for row in rows):  # no one number: by place in the program
        name, at = "place in the order of the sweep", lambda row: next(line.index(row) for line in lines if row in line)
    for line in lines:
        colour, marker = styles[line[0].layers]
        ordered = sorted(line, key=at)
        axes.plot(list(map(at, ordered)), [row.relative_speed for row in ordered], color=colour, marker=marker,
                  markersize=7, markerfacecolor="white", linewidth=1.4)
    axes.axhline(1, color=INK, linewidth=0.8, zorder=1)
    axes.set_xticks(sorted({at(row) for row in rows}))
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel(f"times as fast as {rows[0].against}")
    axes.set_title("Verified drafts: time", fontsize=11, loc="left")
    _plain(axes)


def _plain(axes) -> None:
    grid(axes)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(swept: Swept, *, verifies: bool) -> list[list[SweepRow]]:
    """The rows of each compiled program whose tokens may leave early, in the order of the sweep."""
    rows = {row.method: row for row in swept.rows}
    lines = [[rows[name] for name in names] for names in swept.sequences]
    return [line for line in lines if line[0].verifies == verifies]


def _differing(rows: Sequence[SweepRow]) -> list[str]:
    """Names of the exits' settings that are not the same in all rows."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.settings.items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1]


def _variant(swept: Swept, line: Sequence[SweepRow]) -> str:
    """The settings that tell a program of early exit from others, besides its layers and those swept: "margin"."""
    lines = _lines(swept, verifies=False)
    swept_names = {name for each in lines for name in _differing(each)}
    apart = [name for name in _differing([each[0] for each in lines]) if name not in swept_names]
    values = [line[0].settings.get(name) for name in apart]
    return ", ".join(str(value).replace("_", " ") for value in values if _listed(value) != line[0].layers)


def _listed(value: Any) -> str:
    return " ".join(map(str, value if isinstance(value, list) else [value]))


def _styles(swept: Swept) -> dict[str, tuple[str, str]]:
    """Colour and marker by layers."""
    layers = list(dict.fromkeys(row.layers for row in swept.rows if row.layers))
    return {each: STYLES[i % len(STYLES)] for i, each in enumerate(layers)}


def _dashes(swept: Swept) -> dict[str, str]:
    """Kinds of lines by variant of early exit."""
    variants = dict.fromkeys(_variant(swept, line) for line in _lines(swept, verifies=False))
    return {variant: DASHES[i % len(DASHES)] for i, variant in enumerate(variants)}


def _legend(swept: Swept, base: SweepRow) -> list:
    handles = [Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=1.4, markeredgecolor="white",
                      label=f"after layer{'s' if ' ' in layers else ''} {layers}")
               for layers, (colour, marker) in _styles(swept).items()]
    dashes = _dashes(swept)
    if len(dashes) > 1:
        handles += [Line2D([], [], color=INK, linestyle=dash, linewidth=1.4, label=variant)
                    for variant, dash in dashes.items()]
    if any(row.verifies for row in swept.rows):
        handles.append(Line2D([], [], color=INK, marker="o", markersize=7, markerfacecolor="none", linestyle="none",
                              markeredgewidth=1.3, label="empty: verified drafts"))
    if swept.choice().method:
        handles.append(Line2D([], [], color=INK, marker="o", markersize=14, markerfacecolor="none", linestyle="none",
                              markeredgewidth=1.6, label=f"fastest that is certified\nto lose {swept.delta:g} at most"))
    return [*handles, Line2D([], [], color=INK, marker="*", markersize=14, markeredgecolor="white", linestyle="none",
                             label=base.method),
            Patch(color=BAND, label=f"95% interval of {base.method}"),
            *[Line2D([], [], color=GREY, linewidth=6, label="Pareto front")] * any(swept.fronts())]
