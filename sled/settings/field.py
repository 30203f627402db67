"""One declared setting: its rule, whether it is traced, which axes it has by row, and what it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sled.settings.rules import LARGEST, OrNone, Whole

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

        rate: float = setting(Number(0, hint="0.5 to 3 is usual"), default=2.0, rows="B", help="evolution rate")

    rule: of `sled.settings.rules`, or any function of a name and a value that returns the clean value or raises
        SettingError; None checks nothing. The rule of numbers holds for every entry of an array.
    rows: the axes of an array with an entry per row of a batch, the rows' first: weights "BC". With fewer axes (weights
        [C], or a number) a value is the same for every row. Such a field is traced: other values never recompile.
    traced: a traced field that means the same for every row, whatever its shape. Other fields are static.
    help: what it sets, as the class's documentation and the command's options say it; the rule's hint follows.
    option: what the command calls it where the field's name would not do; None withholds it.
    """
    traced = traced or rows is not None
    if traced and isinstance(rule, Whole) and rule.high is None:
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
