"""What settings may be. A rule takes a setting's name and value; it returns the clean value or raises `SettingError`.

    settle(self, rate=Number(0, hint="0.5 to 3 is usual"))               # fields of a frozen dataclass
    count = Whole(1, hint="it counts the tokens")("count", count)        # an argument

Clean means of one type, so that 2 and 2.0 share a trace. Every `hint` says what to give instead, or what the
setting is for.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from sled.errors import SettingError

LARGEST = 2**31 - 1  # the largest whole number that is traced: they are int32
_SHORT = reprlib.Repr()  # what is no setting at all may be long
_SHORT.maxother = 100


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, as a float. NaN and infinity are refused; minus infinity is, where `low` is more.

    open_low, open_high: whether `low` itself is refused, and `high`.
    """

    low: float = -math.inf
    high: float = math.inf
    _: dataclasses.KW_ONLY
    open_low: bool = False
    open_high: bool = False
    hint: str

    def __call__(self, name: str, value) -> float:
        clean = _as_float(value)
        if clean is None or not self._holds(clean):
            left, right = "(" if self.open_low else "[", ")" if self.open_high or self.high == math.inf else "]"
            interval = f"{left}{self.low:g}, {self.high:g}{right}"
            raise SettingError(f"{name} is {value!r}, but must be a number in {interval}; {self.hint}")
        return clean

    def _holds(self, value) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and value < math.inf


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number of at least `low` and, where given, at most `high`, as an int."""

    low: int
    high: int | None = None
    _: dataclasses.KW_ONLY
    hint: str

    def __call__(self, name: str, value) -> int:
        if not _is_number(value) or not self._holds(value):
            span = f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
            raise SettingError(f"{name} is {value!r}, but must be a whole number {span}; {self.hint}")
        return int(value)

    def _holds(self, value) -> bool:
        return self.low <= value < math.inf and (self.high is None or value <= self.high) and value % 1 == 0


@dataclasses.dataclass(frozen=True)
class Layers:
    """Numbers of hidden states (0 = embeddings), as an ascending tuple without repeats; or one of `words`."""

    words: tuple[str | None, ...] = ()

    def __call__(self, name: str, value) -> tuple[int, ...] | str | None:
        if value is None or isinstance(value, str):
            if value in self.words:
                return value
        elif indices := _indices(value):
            return indices
        choices = " or ".join([*map(repr, self.words), "a tuple of layer indices such as (0, 8, 16)"])
        raise SettingError(f"{name} is {value!r}, but must be {choices}; 0 is the embeddings")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]
    _: dataclasses.KW_ONLY
    hint: str = "choose one of them"

    def __call__(self, name: str, value) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise SettingError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, self.words))}; "
                               f"{self.hint}")
        return value


@dataclasses.dataclass(frozen=True)
class Each:
    """A sequence, as a tuple whose entries satisfy `rule`. What a tracer holds is not known, and passes.

    one: whether a single number will do as well; it stays one.
    """

    rule: Number | Whole
    _: dataclasses.KW_ONLY
    one: bool = False

    def __call__(self, name: str, value):
        if isinstance(value, (list, tuple)):
            return tuple(self._entry(f"{name}[{i}]", entry) for i, entry in enumerate(value))
        if self.one:
            return self.rule(name, value)
        raise SettingError(f"{name} is {value!r}, but must be a tuple of numbers; {self.rule.hint}")

    def _entry(self, name: str, value):
        if isinstance(value, jax.core.Tracer):
            return value
        return self.rule(name, value.item() if is_array(value) and not value.ndim else value)


@dataclasses.dataclass(frozen=True)
class OrNone:
    """None, or what `rule` takes."""

    rule: Callable[[str, object], object]

    def __call__(self, name: str, value):
        return None if value is None else self.rule(name, value)


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object of a class or protocol, as it is; by default one that jax can trace (a pytree)."""

    kind: type
    _: dataclasses.KW_ONLY
    traced: bool = True
    hint: str

    def __call__(self, name: str, value):
        # A class has its instances' attributes, and passes for an instance of a protocol.
        fits = isinstance(value, self.kind) and not isinstance(value, type)
        if not fits or (self.traced and jax.tree_util.all_leaves([value])):
            if fits:
                why = "but must be an instance that jax can trace"
            elif isinstance(value, (type, str)):
                why = "but must be an instance, not its class or name"
            else:
                why = f"which is no {self.kind.__name__}"
            raise SettingError(f"{name} is {_SHORT.repr(value)}, {why}; {self.hint}")
        return value


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False, and nothing that merely counts as one: the string "no" would count as True."""

    _: dataclasses.KW_ONLY
    hint: str

    def __call__(self, name: str, value) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise SettingError(f"{name} is {value!r}, but must be True or False; {self.hint}")
        return bool(value)


def settle(self, **rules) -> None:
    """Check fields of a frozen dataclass, and put the clean values in their place.

    A field that `traced` made a leaf may hold an array instead of a number, each of which keeps the rule; an array
    stays what it is. What a tracer holds is not known, and passes.
    """
    for field, rule in rules.items():
        value, name = getattr(self, field), f"{type(self).__name__}.{field}"
        if not (is_array(value) and field in getattr(self, "traced_fields", ())):
            object.__setattr__(self, field, rule(name, value))
        elif not isinstance(value, jax.core.Tracer):
            for number in np.unique(value).tolist():
                rule(f"{name}, an array,", number)


def settle_bounded(self, field: str, bound: str, *, least: int, hint: str) -> None:
    """Check a traced count that has a static bound in another field: the count is tuned, the bound sets shapes.

    A bound of None becomes the next of `least`, 2 `least`, 4 `least`, ... that holds the count.
    """
    if getattr(self, bound) is not None:
        settle(self, **{bound: Whole(1, LARGEST, hint=f"it is the static bound of {field}, or None")})
        settle(self, **{field: Whole(1, getattr(self, bound), hint=f"{bound} is its bound")})
        return
    settle(self, **{field: Whole(1, LARGEST, hint=hint)})
    if is_array(getattr(self, field)):
        name = type(self).__name__
        raise SettingError(f"{name}.{field} is an array, whose entries need a static bound; give {bound} too")
    size = least
    while size < getattr(self, field):
        size *= 2
    object.__setattr__(self, bound, size)


def check_rows(settings, rows: int, *, hint: str) -> None:
    """Refuse an array in `settings` that fits neither all rows alike nor each of `rows` rows."""
    for field, axes, value in _row_fields(settings):
        if value.ndim > len(axes) or (value.ndim == len(axes) and value.shape[0] not in (1, rows)):
            name, either = f"{type(settings).__name__}.{field}", f"1 or {rows}" if rows > 1 else "1"
            raise SettingError(f"{name} is an array of shape {value.shape}, but its axes are [{', '.join(axes)}], or "
                               f"fewer without B, and B is {either} here; {hint}")


def take_rows(settings, rows: Sequence[int]):
    """`settings` that passed `check_rows`, for these rows in this order: arrays with an entry per row are gathered."""
    index = np.asarray(rows)
    gathered = {field: value[index] for field, axes, value in _row_fields(settings)
                if value.ndim == len(axes) and value.shape[0] > 1}
    return dataclasses.replace(settings, **gathered) if gathered else settings


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
        raise SettingError(f"{name} is {_SHORT.repr(settings)}, but must be of class {type(like).__name__}, as "
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


def is_array(value) -> bool:
    """Whether `value` is an array of numpy or jax; tracers are."""
    return isinstance(value, (jax.Array, np.ndarray))


def _as_float(value) -> float | None:
    """None where `value` is no number, or too large a one."""
    try:
        return float(value) if _is_number(value) else None
    except OverflowError:
        return None


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _indices(value) -> tuple[int, ...]:
    """Ascending indices, or () where `value` holds none or anything else."""
    try:
        given = tuple(value)
    except TypeError:
        return ()
    whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 0 for n in given)
    return tuple(sorted({int(n) for n in given})) if whole else ()
