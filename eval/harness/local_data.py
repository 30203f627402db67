"""A task's data from a file or folder of one's own, checked before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from sled.errors import DataError, EvaluationError
from sled.eval.numbers import decimal, right_answer
from sled.eval.typed_rows import read

TEXTS = ("doc_to_text", "doc_to_target", "doc_to_choice")  # what a task's YAML makes of a row
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")

Data = str | os.PathLike | Sequence[str] | Mapping[str, str | os.PathLike]


def paths_by_task(data: Data | None, tasks: Sequence[str]) -> dict[str, Path]:
    """The path of each task's data.

    data: a mapping from tasks to paths, or strings "TASK=PATH", or a single path, when there is one task.
    Raises EvaluationError where it names no task of these, or one twice, or does not say which is meant.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping):
        paths = {name: Path(path) for name, path in data.items()}
    else:
        paths = {}
        for one in [data] if isinstance(data, (str, os.PathLike)) else data:
            name, mark, path = os.fspath(one).partition("=")
            if not mark or (name not in tasks and os.path.exists(one)):
                name, path = tasks[0] if len(tasks) == 1 else None, one
            if name is None:
                raise EvaluationError(f"the data {os.fspath(one)!r} are for none of {', '.join(tasks)} by name; "
                                      "say which task they are for: TASK=PATH")
            if name in paths:
                raise EvaluationError(f"data are given twice for {name!r}, {paths[name]} and {path}; give one of them, "
                                      "or a folder with a file per split")
            paths[name] = Path(path)
    if others := sorted(paths.keys() - set(tasks)):
        raise EvaluationError(f"data are given for {', '.join(others)}, but the tasks are {', '.join(tasks)}; "
                              "name one of these")
    return {name: path.expanduser() for name, path in paths.items()}


def overrides(name: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The changes to a task's configuration that give it the data of `path`.

    config: the task's own, its functions not resolved. path: a file (JSON Lines, JSON, CSV, Parquet, ...), which is
        what the task is evaluated on, or a folder of such files that are called after splits (`test.jsonl`,
        `train.jsonl`).

    Few-shot examples come from the task's own split for them, where the folder has it; else from the evaluated rows,
    the harness then leaving out the one that is asked; or as before, where the task lists them itself.

    Raises DataError: nothing there, another format, damaged, no rows, a column missing or empty in some row, or of
    dates, which have many spellings.
    """
    found = read(path)
    evaluated = config.get("test_split") or config.get("validation_split") or "test"
    if path.is_file():
        found = datasets.DatasetDict({evaluated: next(iter(found.values()))})
    if evaluated not in found:
        raise DataError(f"{path} has the splits {', '.join(found)}, but the task {name} is evaluated on {evaluated!r}; "
                        f"call a file in it {evaluated}.jsonl, or name the file itself")
    kept = {split: config[split] if config.get(split) in found else None for split in SPLITS}
    kept |= {"test_split": evaluated, "validation_split": None}  # the harness excludes the asked row from test only
    few = config.get("fewshot_config") or {}
    if not few.get("samples") and kept["fewshot_split"] is None:
        kept["fewshot_split"] = evaluated
    if few.get("split") and few["split"] not in found:
        kept["fewshot_config"] = {**few, "split": evaluated}
    used = {kept["test_split"], kept["fewshot_split"]} - {None}
    for split in used:
        _check_rows(found[split], f"{path}, split {split!r}" if path.is_dir() else str(path), name, config)

    def dataset(**_) -> datasets.DatasetDict:
        return found

    # The name is for messages, and for the record: where rows come from a function, the harness does not read it.
    return {"custom_dataset": dataset, "dataset_path": None, "dataset_name": str(path), "dataset_kwargs": None, **kept}


def _check_rows(rows: datasets.Dataset, where: str, name: str, config: Mapping[str, Any]) -> None:
    if not len(rows):
        raise DataError(f"{where} has no rows; give one per sample")
    if config.get("class") or config.get("process_docs"):
        return  # rows become documents in code, which names its own errors
    for column in _columns(config):
        if column not in rows.column_names:
            raise DataError(f"{where} has the columns {', '.join(rows.column_names)}, but the task {name} reads "
                            f"{column!r}; rename a column, or give data of the task's own form")
        kind = str(getattr(rows.features[column], "dtype", ""))
        if kind.startswith(("timestamp", "date", "time", "duration")):
            raise DataError(f"{where} holds values of type {kind} in its column {column!r}, which do not say how "
                            "to write them; store them as text")
        empty = next((at for at, value in enumerate(rows[column], 1) if value is None), None)
        if empty is not None:
            raise DataError(f"{where} has no {column!r} in row {empty}; complete or delete the row")
    by_mark = "####" in repr([config.get(field) for field in ("filter_list", "metric_list")])
    for column in _columns({"doc_to_target": config.get("doc_to_target")}):
        if not by_mark and not all("####" in str(value) for value in rows[column]):
            continue  # the mark means nothing to this task: it may be a heading in Markdown
        for at, value in enumerate(rows[column], 1):
            _check_reference(value, f"{where} has in row {at} an entry {column!r}")


def _check_reference(value: Any, what: str) -> None:
    """Raises DataError for a solution in GSM8K's form whose number the harness's filters, which compare strings, could
    find in no answer: every method would be judged wrong there."""
    _, mark, end = value.rpartition("####") if isinstance(value, str) else ("", "", "")
    if not mark or re.fullmatch(r"\s*-?\$?-?(\d[\d,]*\.?\d*|\.\d+)\.?\s*", end, re.ASCII):
        return
    right = right_answer(value)
    remedy = "give one clear number" if right is None else f"write {decimal(right)}"
    raise DataError(f"{what} that ends with {end.strip()[:60]!r} behind its ####, which equals no answer as the task "
                    f"compares them; {remedy}")


def _columns(config: Mapping[str, Any]) -> Iterator[str]:
    """Columns that the task's templates read."""
    from jinja2 import Environment, meta

    for field in TEXTS:
        text = config.get(field)
        if not isinstance(text, str) or text.startswith(os.sep):  # functions are written as their path
            continue
        if "{{" in text or "{%" in text:
            yield from sorted(meta.find_undeclared_variables(Environment().parse(text)))
        elif text.isidentifier():  # a column's name; where there is none, the harness takes the word itself
            yield text
