"""Sources of training examples: the hub, local files, rows in memory, or the bundled problem generator."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from sled.demo.problems import problems, prompt
from sled.errors import DataError, DownloadError, PromptError, SettingError
from sled.io import first_line
from sled.settings.rules import Whole
from sled.text.chat import checked_messages
from sled.train.data.files import REMEDY, Files, find

COLUMNS = ("text", "prompt", "completion", "tokens", "messages")
DEMO_EXAMPLES = 20_000  # of the endless problems, where no limit is given


class Example(NamedTuple):
    """One example before tokenising. `body` is text, token ids or messages; text and token ids have a `prompt`, which
    may be empty. lacks: the columns of its texts that have no value in this row (null)."""

    place: str  # for messages: the file or source, and the number of the example in it, from 1
    prompt: str | list[int]
    body: str | list[int] | list[dict[str, Any]]
    lacks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """The data to read, and the columns that make an example.

    data: "demo" (the problems of sled.demo), a file, folder or glob, a list of files, a hub id (owner/name), or
        rows: any iterable of mappings, a `datasets.Dataset` among them. Files end in .json, .jsonl, .csv, .parquet,
        .arrow or .txt, whose every line is an example in the column "text". A folder is searched with all its folders,
        for one kind of file; what is hidden or has another ending is passed over.
    text: the column of plain text, or a template; every token counts in the loss. The default where no column is named.
    prompt, completion: columns of text, or templates such as "Question: {question}\\nAnswer:", whose fields are
        columns. They are joined as they are: a blank between them must stand in one of them. "demo" has both.
    tokens: the column of token ids; beside `prompt`, which is then a column of ids too, those that follow it, taken as
        they are: no end of text is added to them.
    messages: the column of conversations, each a list of messages such as {"role": "user", "content": "Hello"}, which
        the model's chat template writes out; the assistant's are learnt (`sled.train.data.conversations`).
    split, subset, revision: of a hub data set; "demo" has the splits "train" and "heldout".
    limit: examples that are read at most; None for all (20,000 of "demo").

    A text has the characters of the file: 1.10 stays 1.10, 2024-01-05 is no date (`sled.train.data.file_rows`).
    Columns that lack a value (None) are taken for empty. Raises SettingError.
    """

    data: str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]]
    _: dataclasses.KW_ONLY
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    tokens: str | None = None
    messages: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None

    def __post_init__(self):
        put = lambda field, value: object.__setattr__(self, field, value)  # noqa: E731
        if self.limit is not None:
            put("limit", Whole(1, hint="it counts examples, or is None for all of them")("Source.limit", self.limit))
        if isinstance(self.data, Iterator):  # else a second reading would find it used up
            put("data", tuple(itertools.islice(self.data, self.limit)))
        given = [field for field in COLUMNS if getattr(self, field) is not None]
        if not given:
            given = ["prompt", "completion"] if self.data == "demo" else ["text"]
            for field in given:
                put(field, field)
        if given not in (["text"], ["tokens"], ["messages"], ["prompt", "completion"], ["prompt", "tokens"]):
            names = " and ".join(f"Source.{field}" for field in given)
            raise SettingError(f"columns are named by {names}{' alone' if len(given) == 1 else ''}; give Source.text, "
                               "or Source.messages, or Source.tokens, or Source.prompt with Source.completion or "
                               "Source.tokens")
        for field in given:
            template_parts(field, getattr(self, field))

    @property
    def name(self) -> str:
        """The name of the data, for messages."""
        if isinstance(self.data, str | Path):
            return str(self.data)
        return ", ".join(map(str, self.data)) if self._is_files() else "rows in memory"

    @property
    def how(self) -> dict[str, Any]:
        """All settings but the data."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "data"}

    def open(self) -> Reading:
        """Find the data, without reading it. Raises DataError and DownloadError."""
        if isinstance(self.data, str) and self.data == "demo":
            return Reading(self, _Demo(self.split, self.limit or DEMO_EXAMPLES))
        if isinstance(self.data, str | Path):
            files = find(self.data, hub=True)
            return Reading(self, Files(files) if files else self._fetch())
        if self._is_files():
            return Reading(self, Files([file for x in self.data for file in find(x, hub=False)]))
        if not isinstance(self.data, Iterable):
            raise DataError(f"the source is {self.data!r}, which holds no rows; {REMEDY}")
        return Reading(self, self.data)

    def _is_files(self) -> bool:
        return isinstance(self.data, Sequence) and any(isinstance(x, str | Path) for x in self.data)

    def _fetch(self):
        """The hub's data set, downloaded once; without a network the cache of `datasets` alone serves."""
        import datasets  # imported where it is needed: it is slow

        what = f"the data set {self.data!r}"
        try:
            return datasets.load_dataset(str(self.data), self.subset, split=self.split, revision=self.revision)
        except datasets.exceptions.DatasetNotFoundError:
            raise DownloadError(f"{what} is neither a file or folder here nor on the hub, or it is private or gated; "
                                "check the spelling, or log in with `hf auth login`") from None
        except ConnectionError as reason:
            raise DownloadError(f"{what} is neither a file or folder here nor in the local cache, and the hub is out "
                                f"of reach or HF_HUB_OFFLINE is set ({first_line(reason)}); go online, or give "
                                "local files") from reason
        except OSError as reason:
            raise DownloadError(f"{what} could not be fetched ({first_line(reason)}); try again, or give local "
                                "files") from reason
        except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as reason:  # unknown split or subset
            raise DataError(f"{what} cannot be read with split {self.split!r} and subset {self.subset!r}: "
                            f"{first_line(reason)}") from reason


@dataclasses.dataclass(frozen=True)
class Reading:
    """An opened source: its examples in order, as often as one asks."""

    source: Source
    rows: Iterable[Mapping] | Files

    @property
    def total(self) -> int | None:
        """The number of examples, or None where it is not known before reading."""
        known = len(self.rows) if hasattr(self.rows, "__len__") else None
        return known if known is None or self.source.limit is None else min(known, self.source.limit)

    def digest(self) -> str:
        """SHA-256 of what the examples are made of: the files' bytes, or rows; `datasets` keeps its own fingerprint."""
        if isinstance(self.rows, Files):
            return self.rows.digest()
        if hasattr(self.rows, "_fingerprint"):  # the guide of `datasets` calls it so, too
            return hashlib.sha256(self.rows._fingerprint.encode()).hexdigest()
        total = hashlib.sha256()
        for example in self:
            total.update(repr(example[1:]).encode())
        return total.hexdigest()

    def __iter__(self) -> Iterator[Example]:
        s = self.source
        parts = self.rows.parts() if isinstance(self.rows, Files) else [("the source", self.rows)]
        numbered = ((f"{part}, example {i},", row) for part, rows in parts for i, row in enumerate(rows, 1))
        for place, row in itertools.islice(numbered, s.limit):
            if not isinstance(row, Mapping):
                raise DataError(f"{place} is {str(row)[:60]!r}, but must be a mapping from columns to values, such as "
                                "{'text': ...}")
            if s.tokens is not None:
                before, after = ([] if column is None else _ids(_value(row, column, place, setting), place, column)
                                 for setting, column in (("prompt", s.prompt), ("tokens", s.tokens)))
                yield Example(place, before, after)
            elif s.messages is not None:
                yield Example(place, "", _conversation(_value(row, s.messages, place, "messages"), place, s.messages))
            elif s.text is not None:
                yield Example(place, "", *_text(row, "text", s.text, place))
            else:
                before, lacks = _text(row, "prompt", s.prompt, place)
                after, more = _text(row, "completion", s.completion, place)
                yield Example(place, before, after, lacks + more)


@dataclasses.dataclass(frozen=True)
class _Demo:
    """The bundled problems as rows, in the form in which the bundled model is asked; made one by one, each time."""

    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, str]]:
        for p in problems(self.split, self.count):
            yield {"prompt": prompt(p.question), "completion": f" {p.solution}"}


@functools.lru_cache
def template_parts(setting: str, template: str) -> list[tuple[str, str | None]]:
    """Pieces of a column's name or of a template: literal text, then the column that follows it, if any."""
    if not isinstance(template, str) or not template:
        raise SettingError(f"Source.{setting} is {template!r}, but must be the name of a column")
    if setting not in ("text", "prompt", "completion") or not {"{", "}"} & set(template):
        return [("", template)]
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as reason:
        raise SettingError(f"Source.{setting} is {template!r}, which is no template ({reason}); write {{column}} for a "
                           "column, and { or } twice for a brace") from None
    if any(field == "" or spec or conversion for _, field, spec, conversion in pieces):
        raise SettingError(f"Source.{setting} is {template!r}, but each field must be just the name of a column, such "
                           "as {question}")
    return [(literal, field) for literal, field, _, _ in pieces]


def _text(row: Mapping, setting: str, template: str, place: str) -> tuple[str, tuple[str, ...]]:
    """A column or template filled in, and the columns in it that have no value here."""
    parts, lacks = [], []
    for literal, column in template_parts(setting, template):
        value = None if column is None else _value(row, column, place, setting)
        if value is not None and not isinstance(value, str | int | float | Decimal):
            raise DataError(f"{place} holds {type(value).__name__} in its column {column!r}, but Source.{setting} "
                            "must be text; name a column of text, or one of token ids by Source.tokens")
        lacks += [column] if column is not None and value is None else []
        parts += [literal, "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)]
    return "".join(parts), tuple(lacks)


def _value(row: Mapping, column: str, place: str, setting: str):
    if column not in row:
        raise DataError(f"{place} has no column {column!r}; by Source.{setting} name one that it has: "
                        f"{', '.join(map(repr, row)) or 'none'}")
    return row[column]


def _ids(value, place: str, column: str) -> list[int]:
    ids = [] if value is None else value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, list | tuple) or not all(type(x) is int for x in ids):
        raise DataError(f"{place} holds {str(value)[:60]!r} in its column {column!r}, but Source.tokens must be a "
                        "list of token ids; name a column of text by Source.text")
    return list(ids)


def _conversation(value, place: str, column: str) -> list[dict[str, Any]]:
    """The messages of a row, none where it has none."""
    given = [] if value is None else value.tolist() if hasattr(value, "tolist") else value
    try:
        return checked_messages(given) if given != [] else []
    except PromptError as reason:
        raise DataError(f"{place} in its column {column!r}: {reason}") from None
