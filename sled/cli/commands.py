"""The commands of `sled` by name, and what runs the one that was asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import logging
import shutil
import sys
import textwrap
import threading
import warnings
from collections.abc import Sequence

from sled.cli.bench import BENCHES
from sled.cli.calibrate import Calibrate
from sled.cli.demo import Demo
from sled.cli.evaluate import Eval
from sled.cli.export import Export
from sled.cli.generate import Generate
from sled.cli.lens import Lens
from sled.cli.line import in_options, parse
from sled.cli.score import Score
from sled.cli.sweep import Sweep
from sled.cli.train import Train
from sled.cli.tune import Tune
from sled.decoding.memory import LOWER, is_shortage
from sled.errors import SledError, SledWarning
from sled.io import disk_failure, first_line


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands under one name. about: what they are; end: what their list ends with."""

    about: str
    commands: dict[str, type | Group]
    end: str = ""

    def help(self, prog: str) -> str:
        """The commands with a line for each."""
        width = shutil.get_terminal_size().columns
        column = max(map(len, self.commands)) + 4
        lines = [f"usage: {prog} COMMAND [OPTION ...]", "", *textwrap.wrap(self.about, width), ""]
        for name, command in self.commands.items():
            said = command.about if isinstance(command, Group) else command.__doc__.partition("\n\n")[0]
            lines += textwrap.wrap(" ".join(said.split()), width, initial_indent=f"  {name}".ljust(column),
                                   subsequent_indent=" " * column)
        end = f"{prog} COMMAND --help explains a command, with examples. {self.end}"
        return "\n".join([*lines, "", *textwrap.wrap(end, width)])


SLED = Group("Let every layer of a language model speak.", {
    "demo": Demo, "generate": Generate, "score": Score, "lens": Lens, "eval": Eval, "sweep": Sweep, "train": Train,
    "export": Export, "calibrate": Calibrate, "tune": Tune,
    "bench": Group("Measure speed and early layers here, rivals and floors in the same run.", BENCHES)},
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
            command.run()
    except SledError as error:
        print(f"sled: {type(error).__name__}: {in_options(str(error), kind, words)}", file=sys.stderr)
        return 1
    except Exception as error:
        if (said := _of_the_machine(error)) is None:
            raise
        print(f"sled: {said}", file=sys.stderr)
        return 1
    finally:
        threading.excepthook = others
        logging.getLogger("absl").removeFilter(_no_traceback)
    return 0


def _of_the_machine(error: Exception) -> str | None:
    """What to say of an error that is no fault of this program, wherever it came from: a full disk, too little memory.
    """
    if why := disk_failure(error):
        return f"a file {why}"
    return f"there was too little memory ({first_line(error)}); {LOWER}" if is_shortage(error) else None


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
            sys.exit(2)
        prog, chosen = f"{prog} {name}", chosen.commands[name]
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
