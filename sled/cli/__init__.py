"""The `sled` command. Each subcommand is a dataclass whose fields are its options."""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 on success, 1 with one line on standard error for a known error."""
    try:
        from sled.cli.commands import run  # takes a second, in which one may interrupt it too

        try:
            return run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("sled: interrupted", file=sys.stderr)
        if argv is None:  # the process is this command's alone: end it before threads that compile bring it down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130
