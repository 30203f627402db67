"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as they are, None as a dash; a vertical bar in one would end it, so it is escaped."""
    line = lambda cells: "| " + " | ".join("-" if c is None else c.replace("|", "\\|") for c in cells) + " |"  # noqa: E731
    return "\n".join([line(headings), "|" + "---|" * len(headings), *map(line, rows)])
