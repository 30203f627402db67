"""Rules of settings: a rule takes a setting's name and value, and returns the clean value or raises `SettingError`.

    rate: float = setting(Number(0, hint="0.5 to 3 is usual"), default=2.0)     # a field of a `settings` class
    count = Whole(1, hint="it counts the tokens")("count", count)               # an argument

Clean means of one type, so that 2 and 2.0 share a trace. `expects` is the rule in words, and `hint` says what to give
instead, or what the setting is for. `entry`, where a rule has one, is the rule for each number in an array.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable

import jax
import numpy as np

from sled.errors import SettingError

LARGEST = 2**31 - 1  # the largest whole number that is traced: they are int32
_SHORT = reprlib.Repr()
_SHORT.maxother = 100


class _Rule:
    expects: str
    hint: str

    @property
    def entry(self) -> Callable:
        return self

    def _refusal(self, name: str, value) -> SettingError:
        return SettingError(f"{name} is {value!r}, but must be {self.expects}; {self.hint or 'choose one of them'}")


@dataclasses.dataclass(frozen=True)
class Number(_Rule):
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
            raise self._refusal(name, value)
        return clean

    @property
    def expects(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high or self.high == math.inf else "]"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"

    def _holds(self, value) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and value < math.inf


@dataclasses.dataclass(frozen=True)
class Whole(_Rule):
    """A whole number of at least `low` and, where given, at most `high`, as an int."""

    low: int
    high: int | None = None
    _: dataclasses.KW_ONLY
    hint: str

    def __call__(self, name: str, value) -> int:
        if not _is_number(value) or not self._holds(value):
            raise self._refusal(name, value)
        return int(value)

    @property
    def expects(self) -> str:
        span = f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
        return f"a whole number {span}"

    def _holds(self, value) -> bool:
        return self.low <= value < math.inf and (self.high is None or value <= self.high) and value % 1 == 0


@dataclasses.dataclass(frozen=True)
class Layers(_Rule):
    """Numbers of hidden states (0 = embeddings), as an ascending tuple without repeats; or one of `words`."""

    words: tuple[str | None, ...] = ()
    hint = "0 is the embeddings"

    def __call__(self, name: str, value) -> tuple[int, ...] | str | None:
        if value is None or isinstance(value, str):
            if value in self.words:
                return value
        elif indices := _indices(value):
            return indices
        raise self._refusal(name, value)

    @property
    def expects(self) -> str:
        return " or ".join([*map(repr, self.words), "a tuple of layer indices such as (0, 8, 16)"])


@dataclasses.dataclass(frozen=True)
class OneOf(_Rule):
    """One of a few words."""

    words: tuple[str, ...]
    _: dataclasses.KW_ONLY
    hint: str = ""

    def __call__(self, name: str, value) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise self._refusal(name, value)
        return value

    @property
    def expects(self) -> str:
        return f"one of {', '.join(map(repr, self.words))}"


@dataclasses.dataclass(frozen=True)
class Each(_Rule):
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
        raise self._refusal(name, value)

    @property
    def expects(self) -> str:
        return "a number or a tuple of them" if self.one else "a tuple of numbers"

    @property
    def hint(self) -> str:
        return self.rule.hint

    @property
    def entry(self) -> Number | Whole:
        return self.rule

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

    @property
    def expects(self) -> str:
        return f"None or {self.rule.expects}"

    @property
    def hint(self) -> str:
        return self.rule.hint

    @property
    def entry(self) -> Number | Whole:
        return self.rule.entry


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
            raise SettingError(f"{name} is {shorten(value)}, {why}; {self.hint}")
        return value


@dataclasses.dataclass(frozen=True)
class Flag(_Rule):
    """True or False, and nothing that merely counts as one: the string "no" would count as True."""

    _: dataclasses.KW_ONLY
    hint: str
    expects = "True or False"

    def __call__(self, name: str, value) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise self._refusal(name, value)
        return bool(value)


def is_array(value) -> bool:
    """True for an array of numpy or jax; tracers are arrays."""
    return isinstance(value, (jax.Array, np.ndarray))


def shorten(value) -> str:
    """`value` in an error, in which it may be of any kind and length."""
    return _SHORT.repr(value)


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
