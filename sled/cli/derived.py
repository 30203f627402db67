"""Options derived from settings: an option's type, default and help are those of the field that it sets."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from sled.cli.line import Sets, dashed
from sled.cli.values import Layer
from sled.errors import SettingError
from sled.exits.policy import Exits
from sled.settings.decorator import Rule, Setting, declared
from sled.settings.rules import Each, Flag, Layers, Number, OneOf, OrNone, Whole

UNSERVED = ("classifier",)  # a measure that no option can give its trained weights


class Offer(NamedTuple):
    """A class of settings that the command can build. options: its fields, by the names that they have as options."""

    kind: type
    options: Mapping[str, str]


def offer(kind: type, *fields: str) -> Offer:
    """The settings of a class, or of them these fields, as options under the names that they declare."""
    return Offer(kind, {of.option or field: field for field, of in declared(kind).items()
                        if of.option is not None and (not fields or field in fields)})


def offers(register: Mapping[str, type]) -> dict[str, Offer]:
    """Every class of a register by its word, with all its options."""
    return {word: offer(kind) for word, kind in register.items()}


def explained(register: Mapping[str, type]) -> str:
    """The help of the option that chooses from a register: each word, and what its class says of itself first."""
    return "\n".join(f"{word}: {kind.__doc__.partition(chr(10))[0]}" for word, kind in register.items())


def left_out(default: str, *aliases: str, metavar: str | None = None):
    """Beside an option's type: what it means to leave it out, in words, and what else it is called."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {default})", aliases=aliases or None, metavar=metavar)


def derive(name: str, *fields: tuple[str, Any, Any]) -> type:
    """A frozen dataclass of options to inherit from."""
    return dataclasses.make_dataclass(name, fields, frozen=True)


def choice(name: str, of: Collection[str], *, default: str | None, help: str,
           hint: str | None = None) -> tuple[str, Any, Any]:
    """The option that chooses among classes by name. hint: its default in words, where None is one."""
    words = Literal[tuple(dict.fromkeys([*filter(None, [default]), *of]))]
    return name, Annotated[words if default else words | None, tyro.conf.arg(
        help=help, help_behavior_hint=hint)], default


def settings_of(of: Offer) -> list[tuple[str, Any, Any]]:
    """An option for each field on offer of one class, with its default."""
    options = []
    for name, field in of.options.items():
        default, kind = getattr(of.kind, field, dataclasses.MISSING), option_type(of.kind, field)
        argument = tyro.conf.arg(help=option_help(of.kind, field),
                                 help_behavior_hint=None if default is not None else _hint(_default(of.kind, field)))
        options.append((name, Annotated[kind | None if default is None else kind, argument, sets(of.kind, field)],
                        dataclasses.field(default=default)))
    return options


def settings_by_choice(offers: Mapping[str, Offer]) -> list[tuple[str, Any, Any]]:
    """An option for each field of the classes that a choice builds, by whose words its help is told.

    Left out, it is None and the class's default holds; a flag that is False by default is a plain switch.
    """
    options = []
    for name in dict.fromkeys(name for of in offers.values() for name in of.options):
        fields = {word: (of.kind, of.options[name]) for word, of in offers.items() if name in of.options}
        of_type = functools.reduce(operator.or_, (option_type(*field) for field in fields.values()))
        switch = of_type is bool and not any(getattr(*field) for field in fields.values())
        texts = _grouped({word: _explanation(declared(kind)[field]) for word, (kind, field) in fields.items()})
        help = "\n".join(f"{', '.join(words)}: {text}." for text, words in texts.items())
        argument = tyro.conf.arg(help=help, help_behavior_hint=_hint(_defaults(fields)))
        options.append((name, Annotated[of_type if switch else of_type | None, argument,
                                        Sets(tuple(name for field in fields.values() for name in sets(*field).names))],
                        False if switch else None))
    return options


def overrides(kind: type, *fields: str, default: str = "", **aliases: str) -> list[tuple[str, Any, Any]]:
    """An option for each of these fields, which is None where it is left out; `default` tells what it is then, or else
    the field's own default holds."""
    def told(field: str) -> str:
        return ", or ".join(filter(None, (default, getattr(declared(kind)[field].rule, "none", ""))))

    return [(declared(kind)[field].option or field, Annotated[
        option_type(kind, field) | None, sets(kind, field), tyro.conf.arg(
            help=option_help(kind, field), aliases=[aliases[field]] if field in aliases else None,
            help_behavior_hint=_hint(told(field) if default else _default(kind, field)))], None) for field in fields]


def sets(kind: type, field: str) -> Sets:
    """That an option sets this field, for messages of errors."""
    return Sets((f"{kind.__name__}.{field}",))


def option_help(kind: type, field: str) -> str:
    text = _explanation(declared(kind)[field])
    if re.match(r"[\w-]+", text)[0] in get_args(option_type(kind, field)):  # a word that one writes as it stands
        return f"{text}."
    return f"{text[0].upper()}{text[1:]}."


def _explanation(setting: Setting) -> str:
    """As the setting's own, but that what None means is told as the default."""
    if isinstance(setting.rule, OrNone):
        setting = dataclasses.replace(setting, rule=setting.rule.rule)
    return setting.explanation


def _hint(default: str) -> str:
    return f"(default: {default})" if default else ""


def _default(kind: type, field: str) -> str:
    """A field's default in words; "" where it has none, or None that means nothing in particular."""
    value, rule = getattr(kind, field, None), declared(kind)[field].rule
    if value is None:
        return getattr(rule, "none", "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _defaults(fields: Mapping[str, tuple[type, str]]) -> str:
    """The defaults of an option's classes."""
    texts = _grouped({word: _default(*field) for word, field in fields.items()})
    return ", ".join(text if len(texts) == 1 else f"{text} for {' and '.join(words)}" for text, words in texts.items())


def _grouped(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The words that have a text in common, by that text."""
    words: dict[str, list[str]] = {}
    for word, text in texts.items():
        words.setdefault(text, []).append(word)
    return words


def option_type(kind: type, field: str) -> Any:
    return _type(declared(kind)[field].rule)


def _type(rule: Rule | None) -> Any:
    """The type of what satisfies a rule, as one can write it behind an option."""
    match rule:
        case Number():
            return float
        case Whole():
            return int
        case Flag():
            return bool
        case OneOf(words):
            return Literal[tuple(word for word in words if word not in UNSERVED)]
        case Layers(words) if any(words):
            return Literal[tuple(filter(None, words))] | tuple[Layer, ...]
        case Layers() | Exits():
            return tuple[Layer, ...]
        case Each(entry):
            return tuple[_type(entry), ...]
        case OrNone(rule):
            return _type(rule)
        case None:
            return str
    raise TypeError(rule)


def given(options) -> dict[str, Any]:
    """The options that were given: those that are not at their default."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if getattr(options, field.name) != field.default}


def arguments(options, function: Callable) -> dict[str, Any]:
    """The options that a function, or a class, takes as arguments of the same names."""
    taken = inspect.signature(function).parameters
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in taken}


def build(options, of: Offer):
    """Build what is on offer, of the options that were given for it."""
    return of.kind(**given_for(options, of))


def given_for(options, of: Offer) -> dict[str, Any]:
    """The settings of what is on offer that were given, by field."""
    values = {of.options[name]: value for name, value in given(options).items() if name in of.options}
    for field, value in values.items():
        rule = declared(of.kind)[field].rule
        if isinstance(rule, Each) and rule.one and len(value) == 1:
            values[field] = value[0]
    return values


def written(settings, of: Offer) -> list[str]:
    """The options that make these settings, those at their defaults left out: --exit-layers 2 4."""
    words = []
    for name, field in of.options.items():
        value = getattr(settings, field)
        if value != getattr(of.kind, field, dataclasses.MISSING):
            values = value if isinstance(value, tuple) else (value,)
            words += [dashed(name)] if value is True else [dashed(name), *map(str, values)]
    return words


def refuse_others(options, choice: str, has: Collection[str]) -> None:
    """Raises SettingError for an option given that what --`choice` chose does not have (`has`)."""
    for name in given(options):
        if name != choice and name not in has:
            chosen = getattr(options, choice)
            where = f"without --{choice}" if chosen is None else f"for --{choice} {chosen}"
            raise SettingError(f"{dashed(name)} has no meaning {where}; leave it out or choose another --{choice}")
