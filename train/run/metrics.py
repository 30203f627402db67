"""Metrics of a training run: one JSON object per step in a file that survives kills and resumes.

    {"step": 100, "loss": 2.31, "held_out": [4.1, 3.2, 2.4], "tokens_per_second": 5121.4}

`held_out` is the loss of each layer 1..L on held-out text, in nats per token, which `draw` draws.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from tqdm import tqdm

from sled.errors import CheckpointError, SettingError
from sled.io import json_numbers, made_writable
from sled.plots import grid, new_figure, save_figure, writable_picture

HELD_OUT = "held_out"
COLOURS = matplotlib.colormaps["viridis_r"]  # dark where the model is deep


class Metrics(contextlib.AbstractContextManager):
    """Appends a line per step to a JSON Lines file; a context manager.

    path: the file. What it holds of steps after `resumed_from` is cut off, as is a last line that a kill tore, so the
    file goes on as if the run had never stopped and has each step once. -1 begins a run: all that is there goes, and
    step 0 may tell what was measured before the first step.
    tensorboard: a folder to write the same numbers to, for TensorBoard; a list becomes one curve for each entry.
    With several processes only the first one writes.
    Raises SettingError where the file cannot be written, or where tensorboardX is missing; CheckpointError for a file
    that is damaged before its last line.
    """

    def __init__(self, path: str | Path, *, resumed_from: int = -1, tensorboard: str | Path | None = None):
        self._step = resumed_from
        self._file = self._board = None
        if jax.process_index() == 0:
            path = made_writable("the metrics file", path)
            _cut(path, resumed_from)
            self._board = _board(tensorboard, resumed_from) if tensorboard is not None else None
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the line of `step`: numbers, strings, arrays or lists of numbers by name.

        Arrays are fetched, which waits for the devices. JSON has no NaN and no infinity: they stand as strings.
        Raises SettingError for a step that is not after the last one.
        """
        if step <= self._step:
            raise SettingError(f"step is {step}, but the metrics file holds step {self._step} already; write each step "
                               "once, in ascending order")
        self._step = step
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        self._file.flush()  # to the operating system, which outlives this process
        if self._board is not None:
            for name, value in _scalars(plain):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for opened in (self._file, self._board):
            if opened is not None:
                opened.close()

    def __exit__(self, kind, error, trace) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill tore, or that is being written, is left out.

    Raises CheckpointError for a file that is missing, or damaged before its last line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as reason:
        raise CheckpointError(f"the metrics file {path} cannot be read ({reason.strerror}); give the file that a "
                              "training run wrote") from None
    return [line for line, _ in _lines(path, data)]


def progress_bar(steps: int, start: int) -> tqdm:
    """A progress bar over a run's steps, from step `start` on; only in the first of several processes."""
    return tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=jax.process_index() != 0)


def progress_line(values: Mapping[str, Any]) -> str:
    """The text behind the bar: each number by its name, short, the last entry of a list (the last layer's)."""
    shown = {name.replace("_", " "): _plain(value) for name, value in values.items()}
    return ", ".join(f"{name} {_short(value[-1] if isinstance(value, list) and value else value)}"
                     for name, value in shown.items())


def draw(metrics: str | Path, path: str | Path) -> Path:
    """Held-out loss of every layer over the steps of the run; the last layer's is the thick line.

    metrics: the file that `Metrics` wrote, which may still be growing. path: .png, .svg or .pdf.
    Raises SettingError where the run has measured nothing yet or the picture cannot be written, CheckpointError for a
    file that cannot be read.
    """
    lines = [line for line in read_metrics(metrics) if HELD_OUT in line]
    if not lines:
        raise SettingError(f"the metrics file is {str(metrics)!r}, which has no {HELD_OUT!r} yet: a list with each "
                           "layer's loss; wait for the run's first evaluation")
    path = writable_picture("the picture", path)
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


def _cut(path: Path, last: int) -> None:
    """Cut the file where the lines of steps after `last` begin."""
    if not path.exists():
        return
    data = path.read_bytes()
    ends = [end for line, end in _lines(path, data) if line["step"] <= last]
    os.truncate(path, max(ends, default=0))


def _lines(path, data: bytes):
    """Each whole line with the place where it ends, in bytes; steps ascend."""
    found, end = [], 0
    for number, text in enumerate(data.splitlines(keepends=True), 1):
        end += len(text)
        if not text.endswith(b"\n"):
            break
        try:
            line = json.loads(text)
            whole = isinstance(line["step"], int) and (not found or line["step"] > found[-1][0]["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise CheckpointError(f"line {number} of the metrics file {path} is damaged ({text[:60]!r}); each line is "
                                  'an object with an ascending "step": restore the file, or move it away')
        found.append((line, end))
    return found


def _plain(value):
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        array = array.astype(np.float32)  # bfloat16 and the like; raises for what is no number
    return json_numbers(array.tolist())


def _scalars(plain: Mapping[str, Any]):
    """Curves for TensorBoard: a list's entries count from 1, as layers do; text has no curve."""
    for name, value in plain.items():
        if isinstance(value, list):
            yield from _scalars({f"{name}/{place}": entry for place, entry in enumerate(value, 1)})
        elif not isinstance(value, str) or value in ("nan", "inf", "-inf"):
            yield name, float(value)


def _board(folder: str | Path, last: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise SettingError(f"tensorboard is {str(folder)!r}, but tensorboardX is not installed; install it with "
                           'pip install "sled-jax[tensorboard]", or leave tensorboard out') from None
    return SummaryWriter(str(folder), purge_step=last + 1)


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
