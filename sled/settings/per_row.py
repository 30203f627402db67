"""Settings with an entry per row of a batch: checked against the rows, taken apart by row, and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from sled.errors import SettingError
from sled.io import shown
from sled.settings.rules import is_array


def check_rows(settings, rows: int, *, hint: str) -> None:
    """Refuse an array in `settings` that fits neither all rows alike nor each of `rows` rows."""
    for field, axes, value in _row_fields(settings):
        if value.ndim > len(axes) or (value.ndim == len(axes) and value.shape[0] not in (1, rows)):
            name, either = f"{type(settings).__name__}.{field}", f"1 or {rows}" if rows > 1 else "1"
            raise SettingError(f"{name} is an array of shape {value.shape}, but its axes are [{', '.join(axes)}], or "
                               f"fewer without B, and B is {either} here; {hint}")


def take_rows(settings, rows: Sequence[int] | jax.Array):
    """`settings` that passed `check_rows`, for these rows in this order: arrays with an entry per row are gathered.

    `rows` may be traced, where the settings' arrays are.
    """
    index = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    gathered = {field: value[index] for field, axes, value in _row_fields(settings)
                if value.ndim == len(axes) and value.shape[0] != 1}
    return dataclasses.replace(settings, **gathered) if gathered else settings


def by_row(settings, each, shared):
    """A pytree as `settings`, which passed `check_rows`: `each` for arrays with an entry per row, `shared` for others.
    """
    rows = {field for field, axes, value in _row_fields(settings) if value.ndim == len(axes) and value.shape[0] != 1}
    return jax.tree_util.tree_map_with_path(lambda path, _: each if path[0].name in rows else shared, settings)


def one_row(settings):
    """`settings` that passed `check_rows` for one row, with plain numbers in place of arrays.

    So the rules hold for what was in the arrays too, nobody can change it afterwards, and all rows' numbers have the
    same types. Raises SettingError.
    """
    plain = {}
    for field, axes in getattr(settings, "row_axes", {}).items():
        value = getattr(settings, field)
        if is_array(value) or isinstance(value, tuple):
            value = np.asarray(value)
            plain[field] = value.tolist()[0] if value.ndim == len(axes) else value.tolist()
    return dataclasses.replace(settings, **plain) if plain else settings


def check_alike(name: str, settings, like) -> None:
    """Refuse settings that cannot share a batch with `like`: of another class, or with other values in a field that
    is the same for all rows."""
    if type(settings) is not type(like):
        raise SettingError(f"{name} is {shown(settings)}, but must be of class {type(like).__name__}, as "
                           "for every row, for only its numbers may differ; leave it out, or make all rows of the "
                           "class you need")
    row_axes = getattr(settings, "row_axes", {})
    for field in (f.name for f in dataclasses.fields(like)):
        mine, theirs = getattr(settings, field), getattr(like, field)
        same = (mine is None) == (theirs is None) if field in row_axes else _equal(mine, theirs)
        if not same:
            raise SettingError(f"{type(like).__name__}.{field} is {mine!r}, but {theirs!r} for every row; "
                               f"it cannot differ by row: give {field}={theirs!r}, or that to all")


def stack_rows(rows: Sequence, like, sizes: Mapping[str, int]):
    """Settings for a batch from settings for each row, that passed `check_alike` and `one_row`: arrays [B, ...] in
    every field that may differ by row, so that other numbers have the same shapes.

    sizes: of axes other than B, by letter; an axis that is not among them has the size it has in `like`.
    """
    stacked = {}
    for field, axes in getattr(like, "row_axes", {}).items():
        values = [getattr(settings, field) for settings in rows]
        if getattr(like, field) is None:
            continue
        shape = [sizes.get(axis, size) for axis, size in zip(axes[1:], _shape(getattr(like, field), axes), strict=True)]
        stacked[field] = np.stack([_of_row(f"{type(like).__name__}.{field}", value, shape) for value in values])
    return dataclasses.replace(like, **stacked) if stacked else like


def _shape(value, axes: str) -> tuple[int, ...]:
    """The sizes of the axes after B, 1 where the value has none."""
    shape = np.shape(value)[-(len(axes) - 1):] if len(axes) > 1 else ()
    return (1,) * (len(axes) - 1 - len(shape)) + shape


def _of_row(name: str, value, shape: list[int]) -> np.ndarray:
    """One row's value of a field, in the shape [sizes of the axes after B]."""
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        raise SettingError(f"{name} has the shape {np.shape(value)}, but {tuple(shape)} for every row; "
                           "give as many numbers, or one") from None


def _equal(a, b) -> bool:
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x is y or np.array_equal(x, y) for x, y in zip(leaves, others, strict=True))


def _row_fields(settings):
    """Fields that may hold an entry per row and are arrays: name, axes, value. None in a class that names none."""
    return [(field, axes, getattr(settings, field)) for field, axes in getattr(settings, "row_axes", {}).items()
            if is_array(getattr(settings, field))]
