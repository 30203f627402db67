"""Rules of settings: a rule takes a setting's name and value, and returns the clean value or raises `SettingError`.

    count = Whole(1, hint="it counts the tokens")("count", count)

Clean means of one type, so that 2 and 2.0 share a trace. `expects` is the rule in words, and `hint` says what to give
instead, or what the setting is for. `entry`, where a rule has one, is the rule for each number in an array.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Set

import jax
import numpy as np

from sled.errors import SettingError
from sled.io import shown

LARGEST = 2**31 - 1  # the largest whole number of a setting: they are int32
WIDE = 1e6  # far beyond any use, and so small that logits times or by several such numbers are finite in float32


class _Rule:
    expects: str
    hint: str

    def __call__(self, name: str, value):
        try:
            return self._clean(value)
        except (TypeError, ValueError, OverflowError):
            raise SettingError(f"{name} is {shown(value)}, but must be {self.expects}; "
                               f"{self.hint or 'choose one of them'}") from None

    @property
    def entry(self) -> Callable:
        return self

    def _clean(self, value):
        """The clean value. Raises TypeError, ValueError or OverflowError for one that is refused."""
        raise ValueError


@dataclasses.dataclass(frozen=True)
class Number(_Rule):
    """A number from `low` to `high`, as a float. NaN and infinity are refused; minus infinity is, where `low` is more.

    Where it is computed with in float32, it must be such a number there too: 1e39 would be infinity, 1e-40 would be 0.

    open_low, open_high: whether `low` itself is refused, and `high`. least: the smallest number above 0, where `low` is
    0 and means something of its own. float32: whether it is computed with there, as all on a device is; statistics are
    not.
    """

    low: float = -math.inf
    high: float = math.inf
    _: dataclasses.KW_ONLY
    open_low: bool = False
    open_high: bool = False
    least: float = 0.0
    float32: bool = True
    hint: str

    def __call__(self, name: str, value) -> float:
        clean = super().__call__(name, value)
        narrow = _as_float32(clean) if self.float32 else clean
        if not self._holds(narrow) or (narrow == 0) != (clean == 0) or math.isinf(narrow) != math.isinf(clean):
            raise SettingError(f"{name} is {shown(value)}, which is {narrow:g} in float32, but must be {self.expects}"
                               f" there too; {self.hint}")
        return clean

    @property
    def expects(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high or self.high == math.inf else "]"
        low, zero = (self.least, "0 or ") if self.least else (self.low, "")
        return f"{zero}a number in {left}{low:g}, {self.high:g}{right}"

    def _clean(self, value) -> float:
        clean = float(_real(value))
        if not self._holds(clean):
            raise ValueError
        return clean

    def _holds(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return above and below and number < math.inf and not 0 < number < self.least


@dataclasses.dataclass(frozen=True)
class Whole(_Rule):
    """A whole number of at least `low` and, where given, at most `high`, as an int."""

    low: int
    high: int | None = None
    _: dataclasses.KW_ONLY
    hint: str

    @property
    def expects(self) -> str:
        span = f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
        return f"a whole number {span}"

    def _clean(self, value) -> int:
        most = math.inf if self.high is None else self.high
        if not self.low <= _real(value) <= most or int(value) != value:
            raise ValueError
        return int(value)


@dataclasses.dataclass(frozen=True)
class Layers(_Rule):
    """Numbers of hidden states (0 = embeddings), as an ascending tuple without repeats; or one of `words`, of which a
    None at their beginning means the next."""

    words: tuple[str | None, ...] = ()
    hint = "0 is the embeddings"

    @property
    def none(self) -> str:
        """What None means."""
        return self.words[1] if self.words[:1] == (None,) else ""

    @property
    def expects(self) -> str:
        return " or ".join([*map(repr, self.words), "a tuple of layer indices such as (0, 8, 16)"])

    def _clean(self, value) -> tuple[int, ...] | str | None:
        if (value is None or isinstance(value, str)) and value in self.words:
            return value
        given = () if isinstance(value, (str, bytes)) else tuple(value)
        if not given or not all(isinstance(n, numbers.Integral) and _real(n) >= 0 for n in given):
            raise ValueError
        return tuple(sorted({int(n) for n in given}))


@dataclasses.dataclass(frozen=True)
class OneOf(_Rule):
    """One of a few words."""

    words: tuple[str, ...]
    _: dataclasses.KW_ONLY
    hint: str = ""

    @property
    def expects(self) -> str:
        return f"one of {', '.join(map(repr, self.words))}"

    def _clean(self, value) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True)
class Flag(_Rule):
    """True or False, and nothing that merely counts as one: the string "no" would count as True."""

    _: dataclasses.KW_ONLY
    hint: str
    expects = "True or False"

    def _clean(self, value) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError
        return bool(value)


class _Around(_Rule):
    """A rule that hands what it takes to another one, `rule`."""

    @property
    def hint(self) -> str:
        return self.rule.hint

    @property
    def entry(self) -> Callable:
        return self.rule.entry


@dataclasses.dataclass(frozen=True)
class Each(_Around):
    """A sequence, as a tuple whose entries satisfy `rule`. What a tracer holds is not known, and passes.

    one: whether a single number will do as well; it stays one.
    """

    rule: Number | Whole
    _: dataclasses.KW_ONLY
    one: bool = False

    def __call__(self, name: str, value):
        if isinstance(value, (list, tuple)):
            return tuple(self._entry(f"{name}[{i}]", entry) for i, entry in enumerate(value))
        return (self.rule if self.one else super().__call__)(name, value)

    @property
    def expects(self) -> str:
        return "a number or a tuple of them" if self.one else "a tuple of numbers"

    def _entry(self, name: str, value):
        if isinstance(value, jax.core.Tracer):
            return value
        return self.rule(name, value.item() if is_array(value) and not value.ndim else value)


@dataclasses.dataclass(frozen=True)
class Several(_Rule):
    """Several of a kind, or one, as a list. A string is one thing: it is never taken for a list of its letters.

    what: what they are, in words. one: whether one by itself will do; else only a list does.
    """

    kind: type | tuple[type, ...]
    what: str
    _: dataclasses.KW_ONLY
    one: bool = True
    hint: str

    @property
    def expects(self) -> str:
        return f"{'one or several' if self.one else 'a list of'} {self.what}"

    def _clean(self, value) -> list:
        if self.one and isinstance(value, self.kind):
            return [value]
        if isinstance(value, (str, bytes, Mapping, Set)):  # what has no order is no list
            raise TypeError
        given = list(value)
        if not all(isinstance(each, self.kind) for each in given):
            raise TypeError
        return given


@dataclasses.dataclass(frozen=True)
class OrNone(_Around):
    """None, or what `rule` takes. none: what None means, in words; the command says it as the option's default."""

    rule: Callable[[str, object], object]
    none: str = ""

    @property
    def hint(self) -> str:
        return "; ".join(filter(None, (self.rule.hint, self.none and f"None is {self.none}")))

    def __call__(self, name: str, value):
        return None if value is None else self.rule(name, value)

    @property
    def expects(self) -> str:
        return f"None or {self.rule.expects}"


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
                why = ("but must be an instance that jax can trace (its class decorated with "
                       "sled.settings.decorator.settings)")
            elif isinstance(value, (type, str)):
                why = "but must be an instance, not its class or name"
            else:
                why = f"which is no {self.kind.__name__}"
            raise SettingError(f"{name} is {shown(value)}, {why}; {self.hint}")
        return value


def is_array(value) -> bool:
    """True for an array of numpy or jax; tracers are arrays."""
    return isinstance(value, (jax.Array, np.ndarray))


def _as_float32(number: float) -> float:
    """The number as devices compute with it: those that are too small for full precision are 0."""
    with np.errstate(over="ignore"):
        narrow = float(np.float32(number))
    return narrow if abs(narrow) >= np.finfo(np.float32).tiny else 0.0


def _real(value):
    """The value; TypeError where it is no real number. True and False are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError
    return value
