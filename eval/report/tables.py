"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Cells as `str` gives them, None as a dash; a vertical bar in one would end it, so it is escaped."""
    cell = lambda value: "-" if value is None else str(value).replace("|", "\\|")  # noqa: E731
    line = lambda cells: "| " + " | ".join(map(cell, cells)) + " |"  # noqa: E731
    return "\n".join([line(headings), "|" + "---|" * len(headings), *map(line, rows)])
