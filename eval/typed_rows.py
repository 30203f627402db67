"""Files as the data sets that the harness takes, whose columns have one type each, with the words of the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from sled.errors import DataError
from sled.io import first_line
from sled.train.data.file_rows import READERS, Word, reading, rows_of

ARROW = {str: "string", int: "int64", float: "float64", bool: "bool"}
TRUTH = {"True": True, "False": False}
UNTYPED = ("json", "csv", "text")  # whose columns have the types of what happens to stand in them


def read(path: Path) -> datasets.DatasetDict:
    """The rows of a file, as its split "test", or of a folder's files by their splits, as `datasets` tells them apart.
    Raises DataError."""
    if not path.exists():
        raise DataError(f"there is no {path}; name a file of rows, or a folder of such files")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise DataError(f"{path} ends with {path.suffix!r}, which says nothing about its format; it must be one of "
                        f"{', '.join(READERS)}")
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path} is empty; give a file with one row per sample")
    if path.is_file():
        return datasets.DatasetDict(test=_table([path], READERS[path.suffix.lower()]))
    with reading(path, "data"):
        found = datasets.load_dataset_builder(str(path)).config.data_files
    splits = {str(split): list(map(Path, files)) for split, files in found.items()}
    for file in (file for files in splits.values() for file in files):
        if file.suffix.lower() not in READERS:
            raise DataError(f"{path} holds {file.name}, which is none of {', '.join(READERS)}; convert or remove it")
    return datasets.DatasetDict({split: _table(files, READERS[files[0].suffix.lower()])
                                 for split, files in splits.items()})


def fetched(kind: str, **named: Any) -> datasets.DatasetDict:
    """The rows of files by path or URL, as `datasets.load_dataset` takes them for "json", "csv" or "text".

    Raises DataError, and whatever a download raises.
    """
    found = datasets.load_dataset_builder(kind, **named).config.data_files
    manager = datasets.DownloadManager()
    return datasets.DatasetDict({str(split): _table(list(map(Path, manager.iter_files(files))), kind)
                                 for split, files in manager.download_and_extract(found).items()})


def _table(files: Sequence[Path], kind: str) -> datasets.Dataset:
    if kind not in UNTYPED:
        with reading(files[0], kind):
            return datasets.load_dataset(kind, data_files=list(map(str, files)), split="train")
    rows = [row for file in files for row in rows_of(file, kind)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: typed([row.get(name) for row in rows]) for name in names}
    try:
        return datasets.Dataset.from_dict({name: values for name, (values, _) in columns.items()},
                                          features=datasets.Features({name: of for name, (_, of) in columns.items()}))
    except (TypeError, ValueError, RecursionError) as reason:  # nested too deep
        raise DataError(f"{files[0]} holds what no table can ({first_line(reason)}); mend it") from reason


def typed(values: Sequence[Any]) -> tuple[list[Any], Any]:
    """A column as the harness takes it, and its type. All stay what they are, numbers of several types as JSON's; but
    a text beside them, and a number beyond 64 bits, makes all of them their words.

    A `Word` is a text, unless all are and Python writes all so as numbers of one type, or as truth values: labels stay
    numbers, 007 does not.
    """
    there = [value for value in values if value is not None]
    if all(isinstance(value, Word) for value in there):
        meant = [_meant(word) for word in there]
        there = meant if len(set(map(type, meant))) == 1 else there
    kinds = {str if isinstance(value, Word) else type(value) for value in there}
    if kinds & {list, dict} or kinds == {int, float}:
        of = datasets.Json()
    elif len(kinds) > 1 or any(type(value) is int and not -2**63 <= value < 2**63 for value in there):
        there = [str(value).lower() if isinstance(value, bool) else str(value) for value in there]
        of = datasets.Value("string")
    else:
        of = datasets.Value(ARROW[kinds.pop()] if kinds else "null")
    rest = iter(there)
    return [None if value is None else next(rest) for value in values], of


def _meant(word: Word) -> bool | int | float | str:
    for value in TRUTH.get(word), *(_number(kind, word) for kind in (int, float)):
        if str(value) == word:
            return value
    return word


def _number(kind: type, word: str):
    try:
        return value if math.isfinite(value := kind(word)) else None
    except (ValueError, OverflowError):
        return None
