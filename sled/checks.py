"""Checks of settings: each returns the clean value or raises `SettingError`.

Settings are also jax leaves: inside a trace they are tracers, in a serving batch they are arrays.
Only plain Python numbers are judged; everything else passes unchanged.
"""

from __future__ import annotations

import math
import numbers

from sled.errors import SettingError


def number(name: str, value, *, low: float, high: float = math.inf, open_low: bool = False, why: str):
    """`value` as a float if low <= value <= high (low < value with `open_low`)."""
    if not isinstance(value, numbers.Real):
        return value
    value = float(value)
    if not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
        bracket = "(" if open_low else "["
        raise SettingError(f"{name} is {value:g}, outside {bracket}{low:g}, {high:g}]: {why}")
    return value


def whole(name: str, value, *, low: int, high: int | None = None, why: str):
    """`value` as an int if it is a whole number with low <= value (<= high)."""
    if not isinstance(value, numbers.Real):
        return value
    if isinstance(value, bool) or value != int(value) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise SettingError(f"{name} is {value!r}, but must be a whole number of at least {low}{upper}: {why}")
    return int(value)
