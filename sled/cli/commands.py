"""The commands of `sled` by name, and what runs the one that was asked for."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import logging
import pkgutil
import shutil
import sys
import textwrap
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from sled.cli.line import MISUSE, in_options, parse
from sled.cli.programs import keep_programs
from sled.errors import SledError, SledWarning
from sled.io import disk_failure, first_line


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands under one name. about: what they are; commands: their modules and classes, which are imported when one
    is chosen; end: what their list ends with."""

    about: str
    commands: Mapping[str, str | Group]
    end: str = ""

    def __getitem__(self, name: str) -> type | Group:
        command = self.commands[name]
        return pkgutil.resolve_name(command) if isinstance(command, str) else command

    def help(self, prog: str) -> str:
        """The commands with a line for each."""
        width = shutil.get_terminal_size().columns
        column = max(map(len, self.commands)) + 4
        lines = [f"usage: {prog} COMMAND [OPTION ...]", "", *textwrap.wrap(self.about, width), ""]
        for name, command in self.commands.items():
            said = command.about if isinstance(command, Group) else _summary(command)
            lines += textwrap.wrap(" ".join(said.split()), width, initial_indent=f"  {name}".ljust(column),
                                   subsequent_indent=" " * column)
        end = f"{prog} COMMAND --help explains a command, with examples. {self.end}"
        return "\n".join([*lines, "", *textwrap.wrap(end, width)])


def _summary(command: str) -> str:
    """The first paragraph on a command, read from its file: to import them all takes seconds."""
    module, _, name = command.partition(":")
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    [found] = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    return ast.get_docstring(found).partition("\n\n")[0]


SLED = Group("Let every layer of a language model speak.", {
    **{name: f"sled.cli.{name}:{name.capitalize()}" for name in ("demo", "generate", "score", "lens")},
    "eval": "sled.cli.evaluate:Eval",
    **{name: f"sled.cli.{name}:{name.capitalize()}"
       for name in ("layers", "sweep", "train", "export", "calibrate", "tune", "plan")},
    "bench": Group("Measure speed and early layers here, rivals and floors in the same run.", {
        name: f"sled.cli.bench:{name.capitalize()}"
        for name in ("fusion", "decode", "exits", "engine", "layers", "claims", "exactness", "loss", "stages")})},
    'Begin with sled demo. A model is "demo" (bundled), a Hugging Face folder, or a hub id. sled --version says which '
    "version this is.")


def run(words: Sequence[str]) -> int:
    """Runs the command; its exit status. Known errors are one line on standard error, misuse ends in SystemExit(2)."""
    if list(words) == ["--version"]:
        print(f"sled {importlib.metadata.version('sled-jax')}")
        return 0
    prog, kind, words = _chosen(words)
    if kind is None:
        return 0
    command = parse(kind, prog, words)
    others, threading.excepthook = threading.excepthook, _print_first_line
    logging.getLogger("absl").addFilter(_no_traceback)
    try:
        with warnings.catch_warnings():
            _print_in_one_line(SledWarning)
            keep_programs()
            command.run()
    except SledError as error:
        print(f"sled: {type(error).__name__}: {in_options(str(error), kind, words)}", file=sys.stderr)
        return _failed()
    except Exception as error:
        if (said := _of_the_machine(error)) is None:
            _failed(error)
            raise
        print(f"sled: {said}", file=sys.stderr)
        return _failed()
    finally:
        threading.excepthook = others
        logging.getLogger("absl").removeFilter(_no_traceback)
    return 0


def _of_the_machine(error: Exception) -> str | None:
    """What to say of an error that is no fault of this program, wherever it came from: a full disk, too little memory.
    """
    from sled.cli.devices import lost_process  # imported here: it takes time, and nearly all goes well
    from sled.decoding.memory import LOWER, is_shortage

    if why := disk_failure(error):
        return f"a file {why}"
    if is_shortage(error):
        return f"there was too little memory ({first_line(error)}); {LOWER}"
    return lost_process(error)


def _failed(error: Exception | None = None) -> int:
    """The exit status; of several processes this one ends here, and shows the error that was not expected."""
    from sled.cli.devices import end_for_all

    end_for_all(error)
    return 1


def _chosen(words: Sequence[str]) -> tuple[str, type | None, Sequence[str]]:
    """The command with its whole name and its own words; None where help was asked for, and is printed."""
    prog, chosen = "sled", SLED
    while isinstance(chosen, Group):
        if not words or words[0] in ("-h", "--help"):
            print(chosen.help(prog))
            return prog, None, ()
        name, *words = words
        if name not in chosen.commands:
            near = difflib.get_close_matches(name, chosen.commands, 1)
            advice = (f"did you mean {prog} {near[0]}?" if near else
                      f"options stand behind a command, as in {prog} {next(iter(chosen.commands))} {name}"
                      if name.startswith("-") else f"there are {', '.join(chosen.commands)}")
            print(f"sled: {prog} has no command {name!r}; {advice}", file=sys.stderr)
            sys.exit(MISUSE)
        prog, chosen = f"{prog} {name}", chosen[name]
    return prog, chosen, words


def _print_first_line(of) -> None:
    """For `threading.excepthook`: of an error in another thread, such as one that writes a checkpoint."""
    print(f"sled: a thread ended: {type(of.exc_value).__name__}: {first_line(of.exc_value)}", file=sys.stderr)


def _no_traceback(record: logging.LogRecord) -> bool:
    """For the log of Orbax: where a checkpoint cannot be written, each of its threads writes pages, and then raises
    what our own error tells in a line."""
    return record.exc_info is None and "Traceback" not in record.getMessage()


def _print_in_one_line(kind: type[Warning]) -> None:
    """Within `warnings.catch_warnings`: such warnings are for the user, who has no line of source to look at."""
    others, said = warnings.showwarning, set()

    def show(message, category, *where, **more):
        if issubclass(category, kind):
            if str(message) not in said:  # a folder may be read more than once
                from tqdm import tqdm  # imported here: few commands warn

                with tqdm.external_write_mode(sys.stderr):  # not behind a bar
                    print(f"warning: {message}", file=sys.stderr)
            said.add(str(message))
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show
