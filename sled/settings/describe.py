"""Settings in a form to write down and compare: by value, arrays by digest."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sled.errors import SettingError
from sled.io import add_array, json_numbers, shorten
from sled.settings.rules import is_array


def describe(value, *, leave_out: Sequence[str] = ()) -> Any:
    """A setting as JSON has it: a dataclass by its class and fields, an array by its type, shape and SHA-256.

    leave_out: fields of `value` itself to leave out.
    Raises SettingError for what is neither of these nor a number, a string, None, or a sequence of such.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_array(value):
        if not value.ndim:
            return describe(value.item())
        total = hashlib.sha256()
        add_array(total, np.asarray(value))
        return {"array": str(value.dtype), "shape": list(value.shape), "sha256": total.hexdigest()}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return json_numbers(float(value))
    if isinstance(value, (tuple, list)):
        return [describe(x) for x in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)
                  if f.name not in leave_out}
        return {"kind": _kind(type(value)), **fields}
    raise SettingError(f"{value!r} cannot be written down, as what keeps its settings by value does; make a class of "
                       "your own a frozen dataclass of numbers, strings, tuples and arrays")


def differences(name: str, then: Any, now: Any) -> Iterator[str]:
    """Where two descriptions differ, in words: one line for each field, or for the whole where the kinds differ."""
    if then == now:
        return
    if isinstance(then, dict) and isinstance(now, dict) and then.get("kind") == now.get("kind") and "array" not in now:
        for field in dict.fromkeys([*then, *now]):
            yield from differences(f"{name}.{field}", then.get(field), now.get(field))
        return
    yield f"{name} was {_short(then)} and is {_short(now)}"


def _kind(cls: type) -> str:
    """A class by its package and name, which stay when it moves to another module of the package."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _short(described: Any) -> str:
    if isinstance(described, dict):
        kind = described.get("kind", "an array")
        return f"{kind} with SHA-256 {described['sha256'][:12]}..." if "sha256" in described else kind
    return shorten(repr(described), 40)
