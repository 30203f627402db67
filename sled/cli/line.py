"""A command line, from what its command's dataclass says: read, explained, and errors told in its words."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import docstring_parser
import tyro

from sled.cli.values import REGISTRY, spec_of
from sled.settings.unknown import nearest

MISUSE = 2  # the exit status where a command line is wrong


@dataclasses.dataclass(frozen=True)
class Sets:
    """Beside an option's type: the names, in Python, of what it sets, as errors say them."""

    names: tuple[str, ...]


class Option(NamedTuple):
    """A field of a command, with what stands beside its type. spellings: as one writes it; none where it is an
    argument by its place."""

    field: str
    spellings: tuple[str, ...]
    kind: Any
    beside: tuple

    @property
    def sets(self) -> list[str]:
        return [name for extra in self.beside if isinstance(extra, Sets) for name in extra.names]


def options_of(command: type) -> Iterator[Option]:
    """The options of a command, and its arguments, those of its groups included."""
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, beside = hints[field.name], ()
        if get_origin(kind) is Annotated:
            kind, *beside = get_args(kind)
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind)
            continue
        aliases = [alias for extra in beside for alias in getattr(extra, "aliases", None) or ()]
        here = tyro.conf.Positional in beside
        yield Option(field.name, () if here else (dashed(field.name), *aliases), hints[field.name], tuple(beside))


def dashed(name: str) -> str:
    """An option as one writes it: --exit-layers."""
    return f"--{name.replace('_', '-')}"


def parse(command: type, prog: str, words: Sequence[str]):
    """The command that these words describe. Prints help, or in a line what is wrong with them, and raises SystemExit.
    """
    _explain(command)
    said = io.StringIO()
    try:
        with REGISTRY, contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=prog, description=description(command), args=ordered(command, words),
                            config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone,
                                    tyro.conf.PositionalMetavarFromFieldName))
    except SystemExit as end:
        if end.code == MISUSE:
            print(f"sled: {_misuse(command, prog, said.getvalue())} ({prog} --help explains it)", file=sys.stderr)
        raise


def _misuse(command: type, prog: str, box: str) -> str:
    """What is wrong, of the box that tyro draws around it: of its first part the lines that are not the help's."""
    _, *lines = re.sub("[\u256d\u256e\u2570\u256f\u2502]", " ", box).replace("\u2500", "-").splitlines()
    rule = re.compile(" *-+ *").fullmatch
    part = list(itertools.takewhile(lambda line: not rule(line), itertools.dropwhile(rule, lines)))
    depths = [len(line) - len(line.lstrip()) for line in part]
    text = " ".join(" ".join(line for line, deep in zip(part, depths, strict=True) if deep < depths[0] + 8).split())
    if unknown := re.match(r"Unrecognized options: ([^\s,]+)", text):
        if not (option := unknown[1]).startswith("-"):
            return f"{prog} takes no further word, but {option!r} was given"
        known = {name.lstrip("-").replace("-", "_"): name for each in options_of(command) for name in each.spellings}
        meant = nearest(option.strip("-").partition("=")[0].replace("-", "_"), known)
        return f"{prog} has no option {option}" + (f"; did you mean {known[meant]}?" if meant else "")
    return text.removeprefix("Error parsing ").rstrip(".")


@functools.cache
def _explain(command: type) -> None:
    """Puts beside the types of a command's fields what tyro is to say of them: it would break the lines of the help as
    those of the source, and tell a switch's default as Python does."""
    texts = {each.arg_name: each.description for base in reversed(command.__mro__) if base.__module__ != "builtins"
             for each in docstring_parser.parse_from_object(base).params}
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, beside = hints[field.name], ()
        if get_origin(kind) is Annotated:
            kind, *beside = get_args(kind)
        if dataclasses.is_dataclass(kind):  # a group of options, whose title the help takes from the field
            _explain(kind)
            said = tyro.conf.arg(name=field.name.removesuffix("_options"))
        else:
            text = texts.get(field.name)
            default = {True: "yes", False: "no"}.get(field.default) if kind is bool else None
            said = tyro.conf.arg(help=text and _joined(text),
                                 help_behavior_hint=default and f"(default: {default})")
        command.__annotations__[field.name] = Annotated[(kind, said, *beside)]  # what stands there already holds


def _joined(text: str) -> str:
    """A text of the source with its lines joined, but where one begins with a word that it explains, as in "drop: "."""
    return re.sub(r"\n(?![\w-]+(?:, [\w-]+)*: )", " ", inspect.cleandoc(text))


def ordered(command: type, words: Sequence[str]) -> list[str]:
    """The words, every option of several values behind those that stand by their place.

    Such an option takes what can be a value of it, and its first word in any case; so a prompt may follow it.
    """
    options = list(options_of(command))
    if all(option.spellings for option in options):
        return list(words)
    several = {name: spec for option in options if tyro.conf.UseAppendAction not in option.beside
               for spec in [spec_of(option.kind)] if spec.nargs == "*" for name in option.spellings}
    first, last, rest = [], [], list(words)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        name, given, _ = word.partition("=")
        spec = several.get(name.replace("_", "-"))
        if spec is None:
            first.append(word)
            continue
        last.append(word)
        count = bool(given)
        while rest and not re.match(r"--?[A-Za-z]|--$", rest[0]) and (not count or _fits(spec, rest[0])):
            last.append(rest.pop(0))
            count = True
    return [*first, *last, *rest]


def _fits(spec, word: str) -> bool:
    try:
        spec.instance_from_str([word])
    except ValueError:
        return False
    return True


def description(command: type) -> str:
    """What a command's class says of it, within the terminal's width; its examples may be copied as they stand."""
    width = shutil.get_terminal_size().columns
    said = ""
    for block in inspect.cleandoc(command.__doc__).split("\n\n"):
        if block.startswith("sled "):
            said += "".join(f"\n{_example(example, width)}" for example in re.split(r"\n(?=sled )", block))
        else:  # tyro joins lines that begin with a letter
            said += "\n\n" + textwrap.fill(" ".join(block.split()), width, subsequent_indent=" ")
    return said.strip()


def _example(text: str, width: int) -> str:
    lines = [""]
    for word in re.findall(r'(?:"[^"]*"|\S)+', text):
        if lines[-1] and len(f"    {lines[-1]} {word} \\") > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return "    " + " \\\n    ".join(lines)


def in_options(message: str, command: type, words: Sequence[str]) -> str:
    """An error's message, which names what Python calls settings, with the options that set them in their place.

    Names are those that a setting's check gives (EarlyExit.threshold, at the beginning a field alone), those of a
    difference between settings (recipe.steps), and fields that are no words of English (max_new_tokens).
    """
    known: dict[str, str] = {}
    for option in options_of(command):
        if option.spellings:
            written = next((name for name in option.spellings if name in words), option.spellings[0])
            known |= dict.fromkeys((option.field, *option.sets), written)

    def said(match: re.Match) -> str:
        name, place = match["name"], match["place"]
        of, _, field = name.rpartition(".")
        option = known.get(name[0].upper() + name[1:])
        if not of or of[0].isupper() or "_" in field:
            option = option or known.get(field)
        if not option:
            return match[0]
        return f"number {int(place) + 1} of {option}" if place else option

    for names in (r"[A-Za-z]\w*\.[a-z]\w*", r"[a-z]+(?:_[a-z]+)+", r"^[a-z]+(?= (?:is|has|was)\b|\[)"):
        message = re.sub(rf"(?<![\w./'\"-])(?P<name>{names})(?:\[(?P<place>\d+)\])?(?![\w'\"/=(])", said, message)
    message = re.sub(r"(--[\w-]+ is) \(([\d., ]+)\)", lambda m: f"{m[1]} {m[2].replace(',', '')}", message)  # as typed
    return message.replace("must be None or ", "must be ")
