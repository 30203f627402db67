"""Draws every layer of several models side by side: loss, agreement with the last layer, problems solved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator, PercentFormatter

from sled.plots import STYLES, grid, new_figure, save_figure

DASHES = ("-", "--", "-.", ":")
PANELS = (("loss", "Loss on given solutions", "nats per token"),
          ("agreement", "Tokens as the last layer's", None),
          ("solved", "Problems solved, all tokens leaving here", None))


def draw(rows: Sequence, path: Path) -> Path:
    """rows: `LayerRow`s of up to as many models as there are styles. path: .png, .svg or .pdf."""
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
