"""The `sled` command. Each subcommand is a dataclass whose fields are its options."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings

import tyro

from sled.cli.bench import Bench
from sled.cli.calibrate import Calibrate
from sled.cli.demo import Demo
from sled.cli.evaluate import Eval
from sled.cli.export import Export
from sled.cli.generate import Generate
from sled.cli.lens import Lens
from sled.cli.score import Score
from sled.cli.sweep import Sweep
from sled.cli.train import Train
from sled.errors import SledError, SledWarning

Command = Demo | Generate | Score | Lens | Eval | Sweep | Train | Export | Calibrate | Bench

DESCRIPTION = """Let every layer of a language model speak.

Start with `sled demo`. A model is "demo" (bundled), a Hugging Face folder, or a hub id. Every
subcommand explains itself with --help; `sled --version` says which version this is."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 on success, 1 with one line on standard error for a known error."""
    if (sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(f"sled {importlib.metadata.version('sled-jax')}")
        return 0
    command = tyro.cli(Command, prog="sled", description=DESCRIPTION, args=argv,
                       config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes))
    try:
        with warnings.catch_warnings():
            _print_in_one_line(SledWarning)
            command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SledError as error:
        print(f"sled: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sled: interrupted", file=sys.stderr)
        if argv is None:  # the process is this command's alone: end it before threads that compile bring it down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130
    return 0


def _print_in_one_line(kind: type[Warning]) -> None:
    """Within `warnings.catch_warnings`: such warnings are for the user, who has no line of source to look at."""
    others = warnings.showwarning

    def show(message, category, *where, **more):
        if issubclass(category, kind):
            print(f"warning: {message}", file=sys.stderr)
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show
