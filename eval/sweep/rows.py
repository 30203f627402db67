"""What a sweep found at each of its settings, in a file that grows by whole rows and survives a kill."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import typing
from pathlib import Path

from sled.errors import SettingError
from sled.io import writable


@dataclasses.dataclass(frozen=True)
class Row:
    """One method, measured. `against` names its baseline, timed beside it in the same rounds.

    digest: of all that decides the row: weights, questions, settings. run, machine, versions: when and on what.
    layers: after which a token may leave, or is guessed. measure, threshold, draft: None where they have no meaning.
    n, right: how many questions, and a 1 for each that was solved, else a 0. accuracy, low, high: the share of 1s, and
        its 95% interval (Wilson 1927).
    lost: share of the questions that the baseline solved and this method did not.
    same_texts, same_tokens: share of the baseline's texts that are the same, token for token, and of its tokens that
        stand at the same place.
    mean_depth: mean of the layer that said a token. acceptance: of guesses.
    tokens: that were made. seconds: for all questions in the fastest of the rounds, and in the median one;
        against_seconds, against_median_seconds: the baseline's, in the same rounds.
    tokens_per_second: of the fastest round. relative_speed: against_seconds / seconds: above 1, it answers sooner.
    """

    digest: str
    run: str
    machine: str
    versions: str
    method: str
    against: str
    layers: str
    measure: str | None
    threshold: float | None
    draft: int | None
    n: int
    accuracy: float
    low: float
    high: float
    lost: float
    same_texts: float
    same_tokens: float
    mean_depth: float
    acceptance: float | None
    tokens: int
    seconds: float
    median_seconds: float
    against_seconds: float
    against_median_seconds: float
    tokens_per_second: float
    relative_speed: float
    right: str


COLUMNS = [field.name for field in dataclasses.fields(Row)]


class Rows:
    """The rows in a CSV file, by digest; of two with one digest the later counts.

    A last row without its line break was cut off by a kill: it is removed. Raises SettingError for a file with other
    columns or a damaged row, and one that cannot be written.
    """

    def __init__(self, path: Path):
        self.path = writable("the sweep's file", path)
        self.by_digest: dict[str, Row] = {}
        text = path.read_bytes() if path.exists() else b""
        whole, _, torn = text.rpartition(b"\n")
        first = text.partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
        header = ",".join(COLUMNS)
        if text and first != header and (whole or not header.startswith(first)):
            raise SettingError(f"{path} has other columns than this version of sled writes; name another folder, or "
                               "remove the file")
        if torn:
            os.truncate(path, len(text) - len(torn))
        lines = list(csv.reader(io.StringIO(whole.decode("utf-8", "replace"))))
        if not lines:
            self._write(COLUMNS)
        for number, cells in enumerate(lines[1:], 2):
            row = _parse(cells, f"{path}, line {number},")
            self.by_digest[row.digest] = row

    def append(self, row: Row) -> None:
        """Adds the row, on the disk before this returns."""
        values = dataclasses.asdict(row).values()
        self._write(["" if value is None else repr(value) if isinstance(value, float) else value for value in values])
        self.by_digest[row.digest] = row

    def _write(self, cells: list) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        with self.path.open("ab", buffering=0) as file:
            file.write(line.getvalue().encode())
            os.fsync(file.fileno())


def _parse(cells: list[str], place: str) -> Row:
    values, hints = {}, typing.get_type_hints(Row)
    try:
        for name, cell in zip(COLUMNS, cells, strict=True):
            kinds = [kind for kind in typing.get_args(hints[name]) or (hints[name],) if kind is not type(None)]
            values[name] = None if cell == "" and hints[name] not in (str, int, float) else kinds[0](cell)
        row = Row(**values)
        if len(row.right) != row.n:
            raise ValueError(f"{len(row.right)} marks for {row.n} questions")
    except ValueError as reason:
        raise SettingError(f"{place} is damaged ({reason}); remove that line, and its point is measured "
                           "again") from None
    return row
