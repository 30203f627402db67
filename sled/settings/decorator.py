"""Classes of settings: frozen, checked on construction, and jax pytrees whose tuned numbers never recompile."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sled.errors import SettingError
from sled.io import shown
from sled.settings.rules import LARGEST, Layers, OrNone, Whole, is_array
from sled.settings.unknown import naming_unknown

Rule = Callable[[str, Any], Any]
_KEY = "sled.setting"  # in a dataclass field's metadata


@dataclasses.dataclass(frozen=True)
class Setting:
    """The declaration of a field of a `settings` class; see `setting` and `bound_of`.

    option: what the command calls it; "" as the field, None for a field that the command does not offer.
    bounds: the field that this one is the static bound of, or None; `least` is then the smallest bound chosen.
    """

    rule: Rule | None = None
    rows: str | None = None
    traced: bool = False
    help: str = ""
    option: str | None = ""
    bounds: str | None = None
    least: int = 1

    @property
    def explanation(self) -> str:
        """The help, and what the rule advises."""
        return "; ".join(filter(None, (self.help, getattr(self.rule, "hint", ""))))


def setting(rule: Rule | None = None, *, default: Any = dataclasses.MISSING, rows: str | None = None,
            traced: bool = False, help: str = "", option: str | None = "") -> Any:
    """A field of a `settings` class.

    rule: of `sled.settings.rules`, or any function of a name and a value that returns the clean value or raises
        SettingError; None checks nothing. The rule of numbers holds for every entry of an array.
    rows: the axes of an array with an entry per row of a batch, the rows' first: weights "BC". With fewer axes (weights
        [C], or a number) a value is the same for every row. Such a field is traced: other values never recompile.
    traced: a traced field that means the same for every row, whatever its shape. Other fields are static.
    help: what it sets, as the class's documentation and the command's options say it; the rule's hint follows.
    option: what the command calls it where the field's name would not do; None withholds it.
    """
    traced = traced or rows is not None
    if isinstance(rule, Whole) and rule.high is None:
        rule = dataclasses.replace(rule, high=LARGEST)
    return dataclasses.field(default=default, metadata={_KEY: Setting(rule, rows, traced, help, option)})


def bound_of(field: str, *, least: int) -> Any:
    """The static bound of a traced count: the count is tuned, the bound sets shapes.

    None, the default, becomes the next of `least`, 2 `least`, 4 `least`, ... that holds the count.
    """
    rule = OrNone(Whole(1, LARGEST, hint=f"it is static, and None takes the next of {least}, {2 * least}, "
                                         f"{4 * least} and so on"))
    return dataclasses.field(default=None, metadata={
        _KEY: Setting(rule, help=f"the most that {field} may be", option=None, bounds=field, least=least)})


def declared(cls: type) -> dict[str, Setting]:
    """The settings that a class declares, by field, in order; none in a class of another kind."""
    fields = getattr(cls, "__dataclass_fields__", {})
    return {name: field.metadata[_KEY] for name, field in fields.items() if _KEY in field.metadata}


@typing.dataclass_transform(frozen_default=True, field_specifiers=(setting, bound_of))
def settings(cls: type) -> type:
    """Make a frozen dataclass and a jax pytree of a class whose fields are declared by `setting`.

        @settings
        class Top:
            scale: int = setting(Whole(1, hint="5 to 20 is usual"), default=10, rows="B", help="tokens that take part")
            log_softmax: bool = setting(Flag(hint="True gives log-probabilities"), default=False)

    Construction checks every field by its rule and puts the clean value in its place: of one type, so that 2 and 2.0
    share a trace. A traced field may hold an array or a tracer. Then the class's own `__post_init__` runs, where it has
    one, for what its fields must be together. A field without `setting` is static, and is not checked.

    Traced fields are the pytree's leaves. Rebuilding one from leaves checks nothing: leaves are then whatever a
    transformation puts there. The class keeps their names as `traced_fields`, and those that may differ by row, with
    their axes, as `row_axes`.
    """
    together = getattr(cls, "__post_init__", lambda self: None)

    def __post_init__(self):
        for name, of in fields.items():
            _clean(self, name, of)
        for name, of in fields.items():
            if of.bounds:
                _hold(self, name, of, fields[of.bounds])
        together(self)

    cls.__post_init__ = __post_init__
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__init__ = naming_unknown(cls.__init__, cls.__name__)
    fields = declared(cls)
    cls.traced_fields = tuple(name for name, of in fields.items() if of.traced)
    cls.row_axes = {name: of.rows for name, of in fields.items() if of.rows}
    cls.__doc__ = _documentation(cls)
    _register(cls)
    return cls


def _clean(self, field: str, of: Setting) -> None:
    """Check a field, and put the clean value in its place."""
    name, value = f"{type(self).__name__}.{field}", getattr(self, field)
    if of.rule is None or (of.traced and isinstance(value, jax.core.Tracer)):  # what a tracer holds is not known
        return
    if of.traced and is_array(value) and hasattr(of.rule, "entry"):
        entries = np.ravel(value) if value.dtype == object else np.unique(value)
        for number in entries.tolist():
            of.rule.entry(f"{name}, an array,", number)
        if isinstance(of.rule.entry, Whole) and value.dtype != np.int32:  # as one number would be
            object.__setattr__(self, field, value.astype(np.int32))
        return
    try:
        object.__setattr__(self, field, of.rule(name, value))
    except SettingError as refused:
        if not of.rows or not isinstance(value, (list, tuple)):
            raise
        raise SettingError(f"{refused}; numbers for the rows are a NumPy array [{', '.join(of.rows)}], as "
                           f"np.array({shown(list(value))}) is one") from None


def _hold(self, bound: str, of: Setting, counted: Setting) -> None:
    """Hold a count to its static bound, or choose the bound where it is None."""
    most, count = getattr(self, bound), getattr(self, of.bounds)
    if most is not None:
        within = dataclasses.replace(counted.rule, high=most, hint=f"{bound} is its bound")
        _clean(self, of.bounds, dataclasses.replace(counted, rule=within))
        return
    if is_array(count):
        raise SettingError(f"{type(self).__name__}.{of.bounds} is an array, whose entries need a static bound; "
                           f"give {bound} too")
    most = of.least
    while most < count:
        most *= 2
    object.__setattr__(self, bound, most)


def _documentation(cls: type) -> str:
    """The class's documentation, and what each field with a `help` sets."""
    entries = []
    for field in dataclasses.fields(cls):
        of = declared(cls).get(field.name)
        if of and of.help:
            kinds = [getattr(of.rule, "expects", ""), f"an array [{', '.join(of.rows)}]" if of.rows else ""]
            takes = f" It is {' or '.join(filter(None, kinds))}." if any(kinds) else ""
            default = "" if field.default is dataclasses.MISSING else f" Default: {field.default!r}."
            if isinstance(of.rule, Layers) and of.rule.none:
                default = f" Default: None, which is {of.rule.none}."
            entry = f"{field.name}: {of.explanation}.{takes}{default}"
            entries.append(textwrap.fill(entry, 110, initial_indent="    ", subsequent_indent="        "))
    return "\n".join([inspect.cleandoc(cls.__doc__ or ""), *(("", "Settings:", *entries) if entries else ())])


def _register(cls: type) -> None:
    names = cls.traced_fields
    static = tuple(f.name for f in dataclasses.fields(cls) if f.name not in names)

    def flatten(self):
        return tuple(getattr(self, n) for n in names), tuple(getattr(self, n) for n in static)

    def flatten_with_keys(self):
        leaves, meta = flatten(self)
        return tuple(zip(map(jax.tree_util.GetAttrKey, names), leaves, strict=True)), meta

    def unflatten(meta, leaves):
        self = object.__new__(cls)
        for name, value in zip((*names, *static), (*leaves, *meta), strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
