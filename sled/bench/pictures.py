"""The pictures of the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sled.plots import INK, STYLES, grid, new_figure, save_figure

KV_DASHES = {"exact": "-", "propagate": "--"}
DASHES = ("-", "--", "-.", ":")
PANELS = (("loss", "Loss on given solutions", "nats per token"),
          ("agreement", "Tokens as the last layer's", None),
          ("solved", "Problems solved, all tokens leaving here", None))


def draw_exits(rows, path: Path) -> Path:
    """What a threshold costs and gives: tokens per second above, agreement and mean depth below (evenly spaced).

    rows: `EarlyExitRow`s, the one without threshold being no early exit: the star at the right, and its level.
    Immediate is left out: with early exit it is lockstep.
    """
    [full] = [row for row in rows if row.threshold is None]
    lines = {}
    for row in rows:
        if row is not full and row.schedule != "immediate":
            lines.setdefault((row.schedule, row.kv), []).append(row)
    names = [f"{row.threshold:g}" for row in next(iter(lines.values()))]
    places = range(len(names))
    styles = dict(zip(dict.fromkeys(schedule for schedule, _ in lines), STYLES, strict=False))
    figure = new_figure(8, 8)
    speed, agreement = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    depth = agreement.twinx()

    for (schedule, kv), line in lines.items():
        colour, marker = styles[schedule]
        speed.plot(places, [row.tokens_per_second for row in line], KV_DASHES[kv], color=colour, marker=marker,
                   markersize=5, label=f"{schedule}, {kv} K/V")
        if schedule == "lockstep":  # neither text nor depth depends on the schedule, in float32
            agreement.plot(places, [row.same_tokens for row in line], KV_DASHES[kv], color="#D55E00", marker="o",
                           label=f"share of tokens, {kv} K/V")
            depth.plot(places, [row.depth for row in line], KV_DASHES[kv], color="#0072B2", marker="s", markersize=4,
                       label=f"mean depth, {kv} K/V")
    star = dict(marker="*", color="black", markersize=14, linestyle="none")
    speed.axhline(full.tokens_per_second, color="#495057", linewidth=1)
    speed.plot([len(names)], [full.tokens_per_second], label="no early exit", **star)
    depth.plot([len(names)], [full.depth], **star)

    speed.set_title(f"Early exit, batch {full.batch}: what a threshold gives and costs", fontsize=11)
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    speed.legend(fontsize=8, ncols=2)
    agreement.set_ylabel("tokens as the full model's", color="#D55E00")
    agreement.set_ylim(0, 1.03)
    agreement.set_xticks(range(len(names) + 1), [*names, "no exit"])
    agreement.set_xlabel("threshold")
    depth.set_ylabel("mean depth in layers", color="#0072B2")
    depth.set_ylim(0, 1.03 * full.depth)
    agreement.legend(handles=[*agreement.lines, *depth.lines[:-1]], fontsize=8, loc="lower right")
    return save_figure(figure, path)


def draw_layers(rows: Sequence, path: Path) -> Path:
    """Every layer of several models side by side: loss, agreement with the last layer, problems solved.

    rows: `LayerRow`s of up to as many models as there are styles. path: .png, .svg or .pdf.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    figure = new_figure(12, 4)
    for axes, (field, title, unit) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for name, (colour, marker), dash in zip(models, STYLES, DASHES, strict=False):
            own = [row for row in rows if row.model == name]
            axes.plot([row.layer for row in own], [getattr(row, field) for row in own], dash, color=colour,
                      marker=marker, markersize=5, label=name)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid(axes)
        if unit is None:
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_ylabel(unit)
            axes.set_yscale("log")
    figure.axes[0].legend(frameon=False)
    return save_figure(figure, path)


def draw_exactness(usual, differences: Sequence, dtype: str, path: Path) -> Path:
    """Where texts first differ, on the scale of how far apart the two best tokens usually are: the share of tokens
    with a gap up to each, and a mark for each first difference.

    usual: gaps between the two best logits, of every token of plain decoding; differences: `DifferenceRow`s.
    """
    figure = new_figure(8, 4)
    axes = figure.subplots()
    gaps, ways = np.sort(usual), list(dict.fromkeys(row.way for row in differences))
    axes.plot(gaps, np.arange(1, len(gaps) + 1) / len(gaps), color=INK, drawstyle="steps-post",
              label="all tokens of plain decoding")
    for way, (colour, marker) in zip(ways, itertools.cycle(STYLES)):
        own = [row.gap for row in differences if row.way == way]
        axes.plot(own, np.searchsorted(gaps, own, "right") / len(gaps), marker, color=colour, markersize=7, label=way)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel("gap between the two logits")
    axes.set_title(f"First differences from plain decoding in {dtype}: where the best tokens nearly tie", fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    grid(axes)
    return save_figure(figure, path)
