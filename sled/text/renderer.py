"""The process that renders chat templates, `render_templates.py`, as this one sees it: started when first needed."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sled.errors import PromptError, TemplateError

SECONDS = 3  # for one rendering, which takes a millisecond; the first of a template, which is compiled, some tens
LONGEST_TEMPLATE = 2**20  # characters
ROOM = 2**20  # characters that a template may write of its own, besides four times what it is given
REMEDY = "mend it, fetch the model again, or go without a chat"
INSTALL = "install it by `pip install 'jinja2>=3.1.6'`, or give token ids"
SCRIPT = Path(__file__).with_name("render_templates.py")
OUT_OF_TIME, NO_JINJA2 = 1, 3  # what it ends with, as it says there: it is run by itself, and not imported


class Rendered(NamedTuple):
    """What a template wrote. generated: the characters from and to which it marks what the assistant says."""

    text: str
    generated: list[tuple[int, int]]


class Renderer:
    """Renders templates one at a time, for all threads."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._owner = 0  # a fork of the owner has its pipes, which it must leave alone
        self._lock = threading.Lock()

    def __call__(self, template: str, variables: Sequence[Mapping[str, Any]], *,
                 now: datetime.datetime) -> list[Rendered]:
        """A template's text for each of some variables. Raises TemplateError, and PromptError for what JSON lacks."""
        if len(template) > LONGEST_TEMPLATE:
            raise TemplateError(f"the model's chat template is {len(template):,} characters long, but at most "
                                f"{LONGEST_TEMPLATE:,} are rendered; {REMEDY}")
        try:
            given = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as reason:
            raise PromptError(f"the conversation cannot be given to a template ({reason}); make it of strings, "
                              "numbers, lists and dicts") from None
        limits = dict(seconds=SECONDS, characters=ROOM + 4 * len(given))  # of all variables: they are of one kind
        request = json.dumps(dict(template=template, now=now.isoformat(), **limits))
        with self._lock:
            answers = self._ask(f'{request[:-1]}, "variables": {given}}}\n'.encode())
        if "error" in answers[-1]:
            error, reason = answers[-1]["error"], answers[-1]["reason"]
            untaken = ("leave out what it does not take, such as a system message or content that is no string; or "
                       if "messages" in error else "")
            raise TemplateError(f"the model's chat template {error} ({reason}); {untaken}{REMEDY}")
        return [Rendered(answer["text"], [tuple(span) for span in answer["generated"]]) for answer in answers]

    def _ask(self, request: bytes) -> list[dict[str, Any]]:
        """The answers to a request. Raises TemplateError where the process ends instead."""
        process = self._running()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
            if line.endswith(b"\n"):
                return json.loads(line)
        except OSError:  # a pipe whose other end is gone: BrokenPipeError, on Windows another
            pass
        except BaseException:  # such as Ctrl-C: what comes later answers nobody's request
            self.stop()
            raise
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
        code = process.returncode
        self.stop()
        if code == NO_JINJA2:
            raise TemplateError(f"jinja2, which renders chat templates, cannot be imported; {INSTALL}")
        how = (f"does not end within {SECONDS} seconds" if code == OUT_OF_TIME else
               "ends the process that renders it, as too deep a recursion does")
        raise TemplateError(f"the model's chat template {how}; {REMEDY}")

    def _running(self) -> subprocess.Popen:
        if self._owner != os.getpid():
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self.stop()
            if importlib.util.find_spec("jinja2") is None:
                raise TemplateError(f"jinja2, which renders chat templates, is not installed; {INSTALL}")
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(SCRIPT), json.dumps(sys.path)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            except OSError as reason:
                raise TemplateError(f"the process that renders chat templates cannot be started ({reason}); make room "
                                    "for it, or give token ids") from reason
        return self._process

    def stop(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


render_template = Renderer()
atexit.register(render_template.stop)
