"""Results whose `repr` fits the screen, whatever they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sled.io import shown
from sled.settings.rules import is_array

FEW = 4  # entries of a list that are written out
WIDTH = 60  # characters of an entry


def brief(cls: type) -> type:
    """A decorator above `dataclasses.dataclass`: long texts and lists are cut, arrays show their type and shape.

        @brief
        @dataclasses.dataclass(frozen=True)
        class Output: ...
    """

    def __repr__(self) -> str:
        fields = (f"{field.name}={abridged(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{cls.__name__}({', '.join(fields)})"

    cls.__repr__ = __repr__
    return cls


def abridged(value: Any) -> str:
    """A value in a few words: int32[9, 17], [1, 2, 3, 4, ... 61 in all]."""
    if is_array(value):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Mapping):
        return _listed([f"{abridged(key)}: {abridged(entry)}" for key, entry in value.items()], "{}")
    if isinstance(value, (list, tuple)):
        first, rest = [abridged(entry) for entry in value[:FEW]], [""] * (len(value) - FEW)
        return _listed(first + rest, "[]" if isinstance(value, list) else "()")
    if dataclasses.is_dataclass(value):
        return repr(value)
    return shown(value, WIDTH)


def _listed(entries: list[str], brackets: str) -> str:
    more = f", ... {len(entries)} in all" if len(entries) > FEW else ""
    return f"{brackets[0]}{', '.join(entries[:FEW])}{more}{brackets[1]}"
