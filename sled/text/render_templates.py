"""Renders chat templates, in a process of its own: requests come in as lines of JSON, and answers go out so.

A template is a program from a model's folder: it may never end, or fill the memory within one operation, which nothing
stops from within the process. So `sled.text.renderer` starts this file by its path, and all that goes wrong ends this
process at worst. It needs the standard library and jinja2, and knows nothing of sled.

A request has `template`, `now` (for `strftime_now`), its limits `seconds` and `characters`, and `variables`, a list of
which each is rendered. An answer is a list, up to the first failure: of `text` and `generated`, or of `error` with
`reason`.
"""

import datetime
import faulthandler
import functools
import json
import os
import signal
import sys

MEMORY = 2**30  # bytes that the process may have, this interpreter's share (about 30 MB) among them
LONGEST_REASON = 300
# What the process ends with, besides 0 at the end of its input and 1 where a rendering takes too long (faulthandler's).
NO_JINJA2, FAILED = 3, 4


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the isolated interpreter has only its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one ends with its input
    try:
        import jinja2  # noqa: F401  before the memory is bounded, and before the first request's time runs
    except Exception:
        sys.exit(NO_JINJA2)

    _bound_memory()
    answers, nowhere = sys.stdout.buffer, open(os.devnull, "w")
    for line in sys.stdin.buffer:
        request, found = json.loads(line), []
        seconds = request.pop("seconds")
        for variables in request.pop("variables"):
            # A thread that needs nothing of the interpreter: it ends the process within an operation, too.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            found.append(_answer(variables=variables, **request))
            if "error" in found[-1]:
                break
        answer = json.dumps(found).encode() + b"\n"
        faulthandler.cancel_dump_traceback_later()
        answers.write(answer)
        answers.flush()


def _bound_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit and macOS does not heed it: there the time bounds the memory


def _answer(template: str, variables: dict, now: str, characters: int) -> dict:
    import jinja2

    step = "cannot be read"
    try:
        program, step = _compiled(template), "refuses these messages"
        clock = datetime.datetime.fromisoformat(now)
        blocks, spans = _Blocks(), []
        program.environment.following = blocks, spans
        for block in program.generate({"strftime_now": clock.strftime, **variables}):
            blocks.append(block)
        text = "".join(blocks)
    except MemoryError:
        return {"error": "needs too much memory", "reason": f"more than {MEMORY >> 20} MiB"}
    except jinja2.exceptions.TemplateError as reason:
        return {"error": step, "reason": str(reason)[:LONGEST_REASON]}
    except Exception as reason:
        failed = step if step == "cannot be read" else "fails on these messages"
        return {"error": failed, "reason": f"{type(reason).__name__}: {reason}"[:LONGEST_REASON]}
    if len(text) > characters:
        return {"error": "writes far more than the messages hold", "reason": f"{len(text):,} characters"}
    return {"text": text, "generated": spans}


class _Blocks(list):
    """Pieces of a text, and how long they are together."""

    length = 0

    def append(self, block):
        super().append(block)
        self.length += len(block)


@functools.lru_cache(16)
def _compiled(source: str):
    """A template in the environment that transformers gives it: sandboxed, blocks trimmed, and a few functions."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant writes: shown as it is, its places noted."""

        tags = {"generation"}  # noqa: RUF012  jinja2's interface

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

        def note(self, caller):
            text, (blocks, spans) = caller(), self.environment.following
            spans.append((blocks.length, blocks.length + len(text)))
            return text

    class Namespace(jinja2.utils.Namespace):
        """`namespace` whose attributes cannot be those of Python's own workings."""

        def __init__(self, *mappings, **values):
            for name in dict(*mappings, **values):
                Namespace.check(name)
            super().__init__(*mappings, **values)

        def __setitem__(self, name, value):
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no attribute {name!r}")

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = as_json
    environment.globals.update(raise_exception=refuse, namespace=Namespace)
    return environment.from_string(source)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        sys.exit(FAILED)
