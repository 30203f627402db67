"""The rows of a file, with its words: every text and number as the characters that stand in the file.

A number that Python writes as the file does is a number. Any other, and everything that a format without types might
have meant (the cells of CSV), is a `Word`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import itertools
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sled.errors import DataError, SledError
from sled.io import first_line

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
ROWS_AT_A_TIME = 100  # of a file that `datasets` reads
MOST_DIGITS = 4000  # of a number that Python reads as an int; of more it would refuse to make a text again

_LEVEL = threading.RLock()  # of the logger of `datasets`, while it is another

# A cell may be as long as a text, where the module's own bound is 131,072 characters.
csv.field_size_limit(2**31 - 1)


class Word(str):
    """What a file says where it may be a number, true, false, a date or a missing value: its characters as they are."""


def rows_of(path: Path, kind: str | None = None) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, each from column to value.

    JSON, by line or as a list of objects, has texts, ints, floats, booleans, lists and objects, and a `Word` for a
    number that Python would write otherwise (1e3, 1.10, -0, NaN). CSV has a `Word` in every cell, None in an empty
    one. Text has each line in the column "text". Parquet and Arrow have the values of their types, in which no word is
    kept; a 32-bit float is the shortest text that means it. A byte order mark is no part of a text.

    kind: one of the values of `READERS`; None goes by the file's ending. Raises DataError, which names the line where
    the format has lines.
    """
    kind = kind or READERS[path.suffix.lower()]
    read = {"json": _json, "csv": _csv, "text": _text}.get(kind)
    with _named(path, kind):
        yield from _typed(path, kind) if read is None else read(path)


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """For calls of `datasets`: what goes wrong becomes a DataError that names the file, and is not logged besides."""
    with _named(path, kind), _quiet():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it `datasets` logs nothing. Never over a `yield` of rows, whose reader may leave it open for long."""
    logger = logging.getLogger("datasets")
    with _LEVEL:
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """Within it what goes wrong becomes a DataError that names the file."""
    import datasets  # imported where it is needed: it is slow

    try:
        yield
    except SledError:
        raise
    except (ValueError, OSError, RuntimeError, csv.Error, datasets.exceptions.DatasetsError) as reason:
        # pyarrow's errors are ValueErrors; of what `datasets` made of another error, that is the reason.
        raise unreadable(path, kind, reason.__cause__ or reason) from reason


def unreadable(path: Path, kind: str, reason: Exception | str, line: int | None = None) -> DataError:
    where = "" if line is None else f", line {line},"
    reason = reason if isinstance(reason, str) else first_line(reason)
    return DataError(f"{path}{where} cannot be read as {kind} ({reason}); mend it, or remove it")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """One value for the whole file, a list of objects or an object; or an object on each line."""
    with open(path, "rb") as file:
        begun = False
        for number, raw in enumerate(file, 1):
            raw = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).rstrip()
            if not raw:
                continue
            if not begun and (raw.lstrip().startswith(b"[") or raw == b"{"):
                value = _parsed(path, (raw + b"\n" + file.read()).rstrip(), number)
                for at, row in enumerate([value] if isinstance(value, dict) else value, 1):
                    yield _object(row, path, f"entry {at} is")
                return
            begun = True
            yield _object(_parsed(path, raw, number), path, "it holds", number)


def _object(row: Any, path: Path, what: str, line: int | None = None) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise unreadable(path, "json", f"{what} {str(row)[:40]!r}, no object such as {{\"text\": ...}}", line)


def _parsed(path: Path, raw: bytes, begin: int) -> Any:
    """The value of JSON that begins in line `begin` of the file."""
    try:
        text = raw.decode()
        value = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=Word)
        if "\\ud" in text or "\\uD" in text:  # half of a pair of code units is no text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line, reason = error.lineno - 1, error.msg
    except UnicodeDecodeError as error:
        line, reason = raw.count(b"\n", 0, error.start), str(error)
    except UnicodeEncodeError as error:
        line, reason = 0, f"{error.object[error.start:error.end]!a} is half a character"
    except RecursionError:
        line, reason = 0, "its lists and objects are nested too deep"
    raise unreadable(path, "json", reason, begin + line)


def _integer(word: str) -> int | Word:
    return Word(word) if word == "-0" or len(word) > MOST_DIGITS else int(word)


def _float(word: str) -> float | Word:
    value = float(word)
    return value if repr(value) == word and word != "-0.0" else Word(word)  # JSON's writers lose that sign


def _csv(path: Path) -> Iterator[dict[str, Word | None]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        begin = 1
        try:
            header = next(lines, [])
            named = [name for name in header if name]  # pandas leaves the column of its row numbers without a name
            if not named or len(set(named)) < len(named):
                raise unreadable(path, "csv", "its first line must name each column once", 1)
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise unreadable(path, "csv", f"it has {len(cells)} cells, but the first line names "
                                     f"{len(header)} columns", begin + 1)
                if cells:
                    yield {name: Word(cell) if cell else None for name, cell in zip(header, cells, strict=True) if name}
                begin = lines.line_num
        except csv.Error as error:
            raise unreadable(path, "csv", error, lines.line_num) from None


def _text(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            yield {"text": line.removesuffix("\n")}


def _typed(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    import datasets

    # Streamed: what is read once needs no second copy in the cache of `datasets`.
    with _quiet():
        rows = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
    rest = iter(rows)
    short = [name for name, of in (rows.features or {}).items() if getattr(of, "dtype", None) in ("float16", "float32")]
    while some := _next(rest):
        for row in some:
            yield row | {name: Word(np.float32(row[name])) for name in short if row[name] is not None}


@_quiet()
def _next(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some rows at a time, none at the end: to set the level of a logger takes as long as to read a row."""
    return list(itertools.islice(rows, ROWS_AT_A_TIME))
