"""Draws how well each layer speaks over a training run: its loss on held-out text, from the metrics file."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from sled.errors import SettingError
from sled.plots import grid, new_figure, save_figure, writable_picture
from sled.train.run.metrics import HELD_OUT, read_metrics

COLOURS = matplotlib.colormaps["viridis_r"]  # dark where the model is deep


def draw(metrics: str | Path, path: str | Path) -> Path:
    """Held-out loss of every layer over the steps of the run; the last layer's is the thick line.

    metrics: the file that `sled.train.run.metrics.Metrics` wrote, which may still be growing. path: .png, .svg or .pdf.
    Raises SettingError where the run has measured nothing yet or the picture cannot be written, CheckpointError for a
    file that cannot be read.
    """
    lines = [line for line in read_metrics(metrics) if HELD_OUT in line]
    if not lines:
        raise SettingError(f"the metrics file is {str(metrics)!r}, which has no {HELD_OUT!r} yet: a list with each "
                           "layer's loss; wait for the run's first evaluation")
    path = writable_picture("the picture", Path(path))
    steps = [line["step"] for line in lines]
    layers = len(lines[0][HELD_OUT])
    number = Normalize(1, max(layers, 2))
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    marker = "o" if len(steps) == 1 else None
    for layer in range(1, layers + 1):
        losses = [float(line[HELD_OUT][layer - 1]) for line in lines]
        axes.plot(steps, losses, color=COLOURS(number(layer)), linewidth=2.4 if layer == layers else 1.2, marker=marker)
    axes.set_title("Held-out loss of every layer", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss in nats per token")
    grid(axes)
    figure.colorbar(ScalarMappable(number, COLOURS), ax=axes, label="layer", pad=0.01,
                    ticks=sorted({1, *range(layers, 1, -max(1, layers // 8))}))
    return save_figure(figure, path)
