"""The result of every benchmark: rows, and the machine and versions that they were measured with.

A row is a dataclass; its columns are fields made by `column`, which gives each its heading in the Markdown table. Other
fields are in the JSON form alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
from typing import Any

from sled.eval.report.tables import table
from sled.settings.brief import brief
from sled.timing import hardware, versions


def column(heading: str, *, decimals: int = 2) -> Any:
    """A field of a row, under this heading in the table, with so many decimals where it is a float."""
    return dataclasses.field(metadata={"heading": heading, "decimals": decimals})


@brief
@dataclasses.dataclass
class BenchReport:
    """A measurement, made now and on this machine unless named otherwise.

    title: the words that open the report.
    settings: by name, what the rows have in common; they are part of the JSON form.
    rows: dataclasses, their fields made by `column`, None where not measured; rows of one kind stand together.
    notes: for the reader, such as that a rival was left out.
    """

    title: str
    settings: dict[str, Any]
    rows: list[Any]
    notes: list[str] = dataclasses.field(default_factory=list)
    date: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    hardware: str = dataclasses.field(default_factory=hardware)
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: {
        "sled-jax": importlib.metadata.version("sled-jax"), **versions()})

    def markdown(self) -> str:
        """A table for each kind of row, under a line with date, machine and versions; the notes below."""
        made_with = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.title}; {self.date}; {self.hardware}; {made_with}"]
        for kind, rows in itertools.groupby(self.rows, type):
            columns = {field.name: field.metadata for field in dataclasses.fields(kind) if "heading" in field.metadata}
            cells = ([_cell(getattr(row, name), column) for name, column in columns.items()] for row in rows)
            lines += ["", table([column["heading"] for column in columns.values()], cells)]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

    def json(self) -> str:
        """One JSON object: the head, the settings, the notes, and the rows by field name."""
        head = {"date": self.date, "hardware": self.hardware, "versions": self.versions}
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({**head, **self.settings, "notes": self.notes, "rows": rows}, indent=2)


def _cell(value, column):
    return f"{value:.{column['decimals']}f}" if isinstance(value, float) else value
