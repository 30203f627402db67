"""Regular expressions of a tokenizer.json that can take time without end, and a limit for what they take."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

from sled.errors import TokenizerError

SECONDS = 4.0  # that a text may take, and one more for every so many characters of it:
CHARACTERS = 50_000
_STORED = re.compile(r'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')
_CLASS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]")  # an escape, or a set of characters
_ENDLESS = re.compile(r"[*+]|\{\d*,\}")


def may_run_away(tokenizer_json: str) -> bool:
    """Whether one of the expressions repeats a group, or repeats three times in a row: on some texts the time of such
    grows as a power of their length, or doubles with every character. Published ones hardly ever do either."""
    return any(_steep(json.loads(stored)) for stored in _STORED.findall(tokenizer_json))


def _steep(expression: str) -> bool:
    bare = _CLASS.sub("x", expression)
    return bool(re.search(r"\)[*+{]", bare)) or any(len(_ENDLESS.findall(part)) > 2 for part in bare.split("|"))


def in_time(call: Callable[[], Any], characters: int) -> Any:
    """call(), which must let go of the interpreter; raises TokenizerError after so long that it may never end.

    It then goes on in its thread, which cannot be stopped, and ends with the process.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # a panic is no Exception
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit := SECONDS + characters / CHARACTERS)
    if not outcome:
        raise TokenizerError(f"a regular expression of tokenizer.json took more than {limit:.0f} s for a text of "
                             f"{characters:,} characters; fetch the tokenizer again, or give another text or token ids")
    [(value, error)] = outcome
    if error is not None:
        raise error
    return value
