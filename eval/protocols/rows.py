"""Columns of a benchmark's rows, checked."""

from __future__ import annotations

from collections.abc import Mapping

from sled.errors import DataError


def column(raw: Mapping, name: str, kind: type, place: str, source: str):
    """The value of a column, of type `kind`. Raises DataError, which names the row (`place`) and where the benchmark's
    own data are published (`source`)."""
    if name not in raw:
        raise DataError(f"{place} has no column {name!r}, but {', '.join(map(repr, raw))}; give data with the columns "
                        f"of {source}")
    value = raw[name]
    right = isinstance(value, kind) and (kind is not list or all(isinstance(text, str) for text in value))
    if not right or value in ("", []):
        what = "nothing" if value is None or value in ("", []) else f"{value!r:.60} ({type(value).__name__})"
        raise DataError(f"{place} holds {what} in its column {name!r}, which must be {KINDS[kind]} as in {source}; "
                        "mend or remove the row")
    return value


KINDS = {str: "text", bool: "true or false", list: "a list of texts"}
