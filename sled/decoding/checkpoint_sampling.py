"""The sampling that a checkpoint's own `generation_config.json` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sled.decoding.sampling import Sampling
from sled.errors import SettingError
from sled.io import shown
from sled.models.generation import ALWAYS, DRAWING, ONLY_DRAWING, PENALTY, acting

WORD = "checkpoint"  # in place of a `Sampling`: the checkpoint's own


def checkpoint_sampling(fields: Mapping[str, Any], source: str) -> Sampling:
    """The sampling of these `fields` (`sled.models.generation.read_generation`): what transformers' `generate` does.

    Without a true do_sample that is greedy, with the repetition penalty; with it, what is left out has transformers'
    values, top_k 50 among them.
    Raises SettingError, which begins with `source`, for settings that are not to be had here and for values that
    cannot be.
    """
    draws, given = fields.get("do_sample", False), acting(fields)
    defaults = DRAWING | PENALTY if draws else PENALTY
    numbers = {name: fields.get(name, value) for name, value in defaults.items()}
    if not isinstance(draws, bool):
        raise _cannot(source, f"do_sample is {shown(draws, 40)}, but must be true or false")
    if missing := {name: value for name, value in given.items() if name in ALWAYS or name in ONLY_DRAWING}:
        raise _cannot(source, f"{listed(missing)} is not to be had here")
    try:
        sampling = Sampling(**numbers)
    except SettingError as reason:
        raise _cannot(source, str(reason)) from None
    if draws and not sampling.temperature:
        raise _cannot(source, "do_sample is true, but at temperature 0 nothing is drawn")
    return sampling


def listed(settings: Mapping[str, Any]) -> str:
    """Settings of a file on one line."""
    return ", ".join(f"{name} {shown(value, 60)}" for name, value in settings.items())


def _cannot(source: str, why: str) -> SettingError:
    return SettingError(f"{source}: its generation_config.json cannot be followed: {why}; give a sled.Sampling(...) of "
                        "your own")
