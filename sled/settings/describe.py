"""Settings in a form to write down and compare: by value, arrays by digest."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sled.errors import SettingError
from sled.io import add_array, json_numbers, shown
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


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two descriptions differ: each field by its dotted name, or the whole where the kinds differ, then and now.

    What is too large to be written down, such as data, stands as {"name": ..., "digest": ..., ...}: the digest decides,
    and the rest, how it came to be, is for messages.
    """
    if then == now:
        return
    if not isinstance(then, dict) or not isinstance(now, dict) or then.get("kind") != now.get("kind") or "array" in now:
        yield name, then, now
    elif "digest" not in now:
        yield from _of_fields(then, now, name)
    elif then.get("digest") != now["digest"]:
        alike = then.keys() == now.keys()
        how = list(_of_fields(then, now, name, but=("name", "digest"))) if alike else []
        if then["name"] != now["name"] or not how:
            yield name, then, now
        yield from how


def changes(then: Any, now: Any) -> list[str]:
    """The differences in words."""
    return [in_words(*difference) for difference in differences(then, now)]


def in_words(name: str, then: Any, now: Any) -> str:
    before, after = _short(then), _short(now)
    if before != after:
        return f"{name} was {before} and is {after}"
    if isinstance(now, dict):  # data and arrays, of which a digest tells
        return f"{name} is {after} as before, but holds something else"
    return f"{name} was {then!r} and is {now!r}"


def _of_fields(then: dict, now: dict, name: str, but: Sequence[str] = ()) -> Iterator[tuple[str, Any, Any]]:
    for field in dict.fromkeys(field for field in (*then, *now) if field not in but):
        yield from differences(then.get(field), now.get(field), f"{name}.{field}" if name else field)


def _kind(cls: type) -> str:
    """A class by its package and name, which stay when it moves to another module of the package."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _short(described: Any) -> str:
    if not isinstance(described, dict):
        return shown(described, 40)
    if "name" in described:
        return repr(described["name"])
    kind = described.get("kind", "an array")
    return f"{kind} with SHA-256 {described['sha256'][:12]}..." if "sha256" in described else kind
