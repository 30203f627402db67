"""Draws a survey: what every layer says, how far it may be believed, and what drafting or leaving there would give."""

from __future__ import annotations

from pathlib import Path

from sled.plots import STYLES, grid, new_figure, save_figure, writable_picture
from sled.survey.result import SURE, Survey


def picture(survey: Survey, path: str | Path) -> Path:
    """Draws it into an image file (format by its ending: .png, .svg or .pdf) and returns its path.

    Left, by layer: agreement with the last layer; confidence, as the share of tokens that get more than 0.9, and how
    many of these agree; the calibration error. Right: the expected speeds of the best draft and the best exit.
    Raises SettingError for another ending, and a path that cannot be written.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter  # imported here: it is slow, and few draw

    path = writable_picture("the picture of the layers", path)
    figure = new_figure(11, 4.5)
    says, gives = figure.subplots(1, 2)
    numbers = [said.layer for said in survey.layers]
    for (field, name), (colour, marker) in zip(
            (("agreement", "agrees with the last layer"), ("sure", f"gives more than {SURE:g}"),
             ("sure_agreement", "of these, agree"), ("calibration_error", "calibration error")), STYLES, strict=False):
        points = [(n, getattr(said, field)) for n, said in zip(numbers, survey.layers, strict=True)]
        says.plot(*zip(*((n, y) for n, y in points if y is not None), strict=True), color=colour, marker=marker,
                  markersize=4, label=name)
    for best, name, (colour, marker) in zip((survey.best_drafting, survey.best_leaving),
                                            ("drafting, text unchanged", "leaving, 98% of the tokens kept"), STYLES,
                                            strict=False):
        ways = [way for n in numbers if (way := best(n)) is not None]
        gives.plot([way.layer for way in ways], [way.speed for way in ways], color=colour, marker=marker, markersize=4,
                   label=name)
    gives.axhline(1, color="#495057", linewidth=1, label="plain greedy decoding")
    says.set_ylim(-0.03, 1.03)
    says.yaxis.set_major_formatter(PercentFormatter(1.0))
    says.set_title(f"What each layer of {survey.model} says", fontsize=11)
    where = "on this machine" if survey.costs else "on a device bound by memory"
    gives.set_title(f"Expected speed {where}, batch {survey.batch_size}", fontsize=11)
    gives.set_ylim(bottom=0)
    for axes in (says, gives):
        axes.set_xlabel("layer")
        axes.set_xlim(0.5, survey.num_layers + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, frameon=False)
        grid(axes)
    return save_figure(figure, path)
