"""Pictures drawn with matplotlib, without touching the user's own figures or backend."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sled.errors import SettingError
from sled.io import path_of, writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
DPI = 150
# Okabe and Ito's colours, told apart by colour-blind eyes too; a marker each besides.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "P"), ("#56B4E9", "X"))
INK = "#212529"


def writable_picture(name: str, path: str | os.PathLike) -> Path:
    """As `sled.io.writable`, for a picture, whose format is its ending."""
    path = path_of(name, path)
    if path.suffix.lower() not in PICTURES:
        raise SettingError(f"{name} is {str(path)!r}, whose ending is none of {', '.join(PICTURES)}; "
                           "the ending chooses the format, so give one of these")
    return writable(name, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: it is slow, and few draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid(axes: Axes, axis: str = "both") -> None:
    """Pale lines behind what is drawn."""
    axes.grid(axis=axis, color="#dee2e6", linewidth=0.6)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the figure in the format of the path's ending, into a folder that is made; returns the path."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns of each letter that no font has
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
