"""Settings taken apart into the arrays that an exported program takes, and put together again inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sled.settings.decorator import declared
from sled.settings.per_row import check_rows, one_row, stack_rows

NARROW = {"f": np.float32, "i": np.int32}  # what a traced number is, by the kind of a Python one


class Number(NamedTuple):
    """A setting that stays an argument. default: of one row, with whatever axes it has besides. most: its static
    bound, fixed at export, or None."""

    default: np.ndarray
    most: int | None


class Parts(NamedTuple):
    """Settings in parts. numbers: by names such as "fusion.rate", an entry per row in the program; arrays: by names
    such as "settings.exits.vocabulary", the same for all rows, kept with the weights."""

    name: str
    whole: Any
    numbers: dict[str, Number]
    arrays: dict[str, np.ndarray]

    def put_together(self, numbers: Mapping[str, jax.Array], arrays: Mapping[str, jax.Array]):
        """The settings with these numbers [B, ...] and arrays, which may be traced."""
        changed = {name.rpartition(".")[2]: numbers[name] for name in self.numbers}
        for field in _shared(self.whole):
            leaves, tree = jax.tree_util.tree_flatten_with_path(getattr(self.whole, field))
            changed[field] = tree.unflatten([arrays[_array_name(self.name, field, path)] for path, _ in leaves])
        return dataclasses.replace(self.whole, **changed) if changed else self.whole


def take_apart(name: str, settings, sizes: Mapping[str, int]) -> Parts:
    """`settings` (a strategy, a policy, `Sampling`) in parts; its strings, layers and bounds are fixed.

    sizes: of axes other than rows, by letter (see `sled.settings.decorator.setting`).
    Raises SettingError for an array with an entry per row: the rows come when the program runs.
    """
    check_rows(settings, 1, hint="a program gets its rows when it runs, so give one value")
    whole = one_row(settings)
    of_rows = stack_rows([whole], whole, sizes)
    numbers, bounds = {}, {of.bounds: bound for bound, of in declared(type(whole)).items()}
    for field in getattr(whole, "row_axes", {}):
        if getattr(whole, field) is not None:
            default = getattr(of_rows, field)[0]
            numbers[f"{name}.{field}"] = Number(default.astype(NARROW[default.dtype.kind]),
                                                getattr(whole, bounds[field]) if field in bounds else None)
    arrays = {_array_name(name, field, path): np.asarray(jnp.asarray(leaf)) for field in _shared(whole)
              for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(whole, field))[0]}
    return Parts(name, whole, numbers, arrays)


def _shared(settings) -> list[str]:
    """Fields of arrays that are the same for all rows."""
    return [field for field in getattr(settings, "traced_fields", ())
            if field not in settings.row_axes and getattr(settings, field) is not None]


def _array_name(name: str, field: str, path) -> str:
    return ".".join(["settings", name, field, *(jax.tree_util.keystr((key,), simple=True) for key in path)])
