"""Draws a lens with matplotlib, without touching the user's own figures or backend."""

from __future__ import annotations

from pathlib import Path

from sled.errors import SettingError
from sled.lens.lens import Lens, show
from sled.plots import DPI, INK, new_figure, save_figure, writable_picture

CELL_WIDTH, CELL_HEIGHT = 0.62, 0.3  # inches
LEGEND_WIDTH, LEGEND_HEIGHT = 3.0, 0.2  # of an entry
LINE, CHANGED = "#d9480f", "#c92a2a"


def picture(lens: Lens, path: str | Path, *, title: str | None = None, first: int = 0, count: int = 48) -> Path:
    """Draws the lens into an image file (format by its ending: .png, .svg or .pdf) and returns its path.

    Layers upwards, positions first .. first + count - 1 to the right; colour = probability of the layer's own choice.
    A bold cell agrees with the final layer; the line marks from where on all layers do. Where a
    fusion was given, its choice stands on top, red where it differs from the final layer's. A legend tells it.

    Raises SettingError for another ending, a path that cannot be written, and more positions than an image holds.
    """
    from matplotlib.lines import Line2D  # imported here: it is slow, and few draw
    from matplotlib.patches import Rectangle

    path = writable_picture("the lens picture", path)
    shown, rows = lens.columns(first, count), len(lens.top)
    columns, last = len(shown), shown.stop
    width = 1.9 + columns * CELL_WIDTH
    entries = 3 + (lens.fused is not None)
    beside = max(1, min(entries, int(width / LEGEND_WIDTH)))
    height = 1.9 + rows * CELL_HEIGHT + -(-entries // beside) * LEGEND_HEIGHT
    if max(width, height) * DPI >= 2**16 and path.suffix.lower() == ".png":
        raise SettingError(f"a picture of {columns} positions and {rows} layers has more pixels than matplotlib draws; "
                           "show fewer positions, or draw a .svg or .pdf")
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    image = axes.imshow(lens.probability[:, first:last], origin="lower", aspect="auto", cmap="YlGnBu", vmin=0, vmax=1)
    for n in range(rows):
        for x, t in enumerate(shown):
            axes.text(x, n, _short(lens.names[n][t]), ha="center", va="center", fontsize=7,
                      color="white" if lens.probability[n, t] > 0.55 else "black",
                      fontweight="bold" if lens.agreement[n, t] else "normal")
    for x, layer in enumerate(lens.agrees_from[first:last]):
        axes.plot([x - 0.5, x + 0.5], [layer - 0.5] * 2, color=LINE, linewidth=2)
    axes.set_yticks(range(rows), ["embed", *(f"layer {n}" for n in range(1, rows))], fontsize=8)
    axes.set_xticks(range(columns), [_short(lens.tokens[t]) for t in shown], fontsize=8, rotation=45,
                    ha="right", rotation_mode="anchor")
    axes.set_xlabel("token read  (the column shows what each layer expects next)")
    if lens.fused is not None:
        for x, t in enumerate(shown):
            changed = lens.fused[t] != lens.top[-1, t]
            axes.text(x, rows - 0.35, _short(lens.fused_names[t]), ha="center", va="bottom", fontsize=7,
                      color=CHANGED if changed else "#495057", fontweight="bold" if changed else "normal")
        axes.text(-0.6, rows - 0.35, "fused", ha="right", va="bottom", fontsize=8)
    last_layer = axes.add_patch(Rectangle((-0.5, rows - 1.5), columns, 1, fill=False, edgecolor=INK, linewidth=1.2,
                                          label="the last layer's choice"))
    axes.set_title(title or "What each layer would say next", fontsize=11, pad=22 if lens.fused is not None else 8)
    figure.colorbar(image, ax=axes, label="probability of the layer's choice", pad=0.01, fraction=0.02)
    letter = lambda form, **how: Line2D([], [], linestyle="none", marker=form, markeredgewidth=0, **how)  # noqa: E731
    handles = [last_layer, letter(r"$\mathbf{a}$", color=INK, label="bold: the same choice as the last layer's"),
               Line2D([], [], color=LINE, linewidth=2, label="from here up, all layers make that choice")]
    if lens.fused is not None:
        handles.append(letter(r"$\mathbf{a}$", color=CHANGED, label="red: the fusion chooses otherwise"))
    figure.legend(handles=handles, loc="outside lower left", ncols=beside, fontsize=8, frameon=False)
    return save_figure(figure, path)


def _short(name: str) -> str:
    text = show(name).replace("$", r"\$")
    return text if len(text) <= 8 else text[:7] + "…"
