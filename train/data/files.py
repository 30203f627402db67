"""Local files of training examples: found by path, folder or glob."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sled.errors import DataError
from sled.train.data.file_rows import READERS, rows_of

REMEDY = ("give a file, a folder or a glob of " + ", ".join(READERS) + " files, a hub id (owner/name), 'demo', or rows "
          "such as [{'text': ...}]")


def find(data: str | Path, *, hub: bool) -> list[Path]:
    """Files of a path, folder or glob, in the order of their names. Raises DataError where there are none.

    hub: whether `data` may be a hub id instead; [] then says that it can be nothing else.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in READERS and p.is_file()
                 and not any(part.startswith(".") for part in p.relative_to(path).parts)]
        kinds = sorted({p.suffix.lower() for p in files})
        if len(kinds) != 1:
            held = kinds or sorted({p.suffix for p in path.rglob("*") if p.is_file() and p.suffix})
            raise DataError(f"the folder {path} holds {' and '.join(held) or 'no'} files, but must hold files of one "
                            f"kind among {', '.join(READERS)}; " +
                            (f"give a glob such as {str(path / f'*{kinds[0]}')!r}" if kinds else "convert them"))
        return files
    named = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
    files = [p for p in named if p.is_file()]
    for file in files:
        if file.suffix.lower() not in READERS:
            raise DataError(f"{file} ends in {file.suffix!r}, but only {', '.join(READERS)} are read; "
                            "convert it, or give its rows")
    is_path = (isinstance(data, Path) or data.startswith((".", "/", "~")) or data.count("/") != 1
               or glob.has_magic(data) or path.suffix.lower() in READERS)
    if not files and (is_path or not hub):
        raise DataError(f"there is no file at {str(data)!r}; {REMEDY}")
    return files


@dataclasses.dataclass(frozen=True)
class Files:
    """Files in a fixed order."""

    paths: list[Path]

    def parts(self) -> Iterator[tuple[str, Iterable[Mapping]]]:
        """The name and the rows of each file. Raises DataError for one that is empty; its rows, if it is damaged."""
        for path in self.paths:
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty; remove it, or fetch it again")
            yield str(path), rows_of(path)

    def digest(self) -> str:
        """SHA-256 of the contents, in order."""
        total = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
                total.update(path.suffix.lower().encode() + hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()
