"""Local files of training examples: found by path, folder or glob, and read row by row with `datasets`."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sled.errors import DataError
from sled.io import first_line

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
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
            yield str(path), _rows(path)

    def digest(self) -> str:
        """SHA-256 of the contents, in order."""
        total = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
                total.update(path.suffix.lower().encode() + hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def _rows(path: Path) -> Iterator[Mapping]:
    import datasets  # imported where it is needed: it is slow

    reader = READERS[path.suffix.lower()]
    with reading([path], reader):
        # Streamed: what is read once needs no second copy in the cache of `datasets`.
        yield from datasets.load_dataset(reader, data_files=glob.escape(str(path)), split="train", streaming=True)


@contextlib.contextmanager
def reading(paths: Sequence[Path], what: str) -> Iterator[None]:
    """While `datasets` reads `paths` as `what`: it does not log what it then raises, and what it raises becomes a
    DataError that names the file and, of JSON, the line."""
    import datasets

    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as reason:
        # pyarrow's errors are ValueErrors; of what `datasets` made of another error, that is the reason.
        lines = ((path, _bad_line(path)) for path in paths if READERS.get(path.suffix.lower()) == "json")
        path, line = next((found for found in lines if found[1]), (paths[0], ""))
        raise DataError(f"{path}{line} cannot be read as {what} ({first_line(reason.__cause__ or reason)}); mend it, "
                        "or remove it") from reason
    finally:
        logger.setLevel(level)


def _bad_line(path: Path) -> str:
    """The place where a JSON file is broken, as ", line 3,"; it is one list of objects, or an object on each line."""
    raw = path.read_bytes()
    parts = [raw] if raw.lstrip().startswith(b"[") else raw.split(b"\n")
    for before, part in enumerate(parts):
        try:
            good = not part.strip() or isinstance(json.loads(part), dict if len(parts) > 1 else list | dict)
            line = 1
        except json.JSONDecodeError as error:
            good, line = False, error.lineno
        except UnicodeDecodeError as error:
            good, line = False, 1 + part.count(b"\n", 0, error.start)
        if not good:
            return f", line {before + line},"
    return ""
