"""Files that are written for the user: refused by name before the work whose result they are for."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sled.errors import SettingError

PICTURES = (".png", ".svg", ".pdf")


def writable(name: str, path: Path) -> Path:
    """`path`, whose folder is made; what is there already stays. Raises SettingError where none can be written."""
    try:
        _try(path)
    except OSError as reason:
        raise SettingError(f"{name} is {str(path)!r}, which cannot be written ({reason.strerror}); "
                           "name a file in a folder of your own") from reason
    return path


def writable_folder(name: str, folder: Path, files: Collection[str], *, owns: Callable[[Path], bool]) -> Path:
    """`folder`, made where there is none, for `files`, those of an earlier time being replaced.

    owns: whether those in the folder are of an earlier time. Raises SettingError where they are not, so that nobody's
    own files are replaced, and where none can be written.
    """
    there = [file for file in files if os.path.lexists(folder / file)]
    if there and not owns(folder):
        raise SettingError(f"{name} is {str(folder)!r}, which holds {' and '.join(there)} that sled did not write or "
                           "did not finish; name another folder, or move them away")
    try:
        _try(folder / next(iter(files)))
    except OSError as reason:
        why = "is a file" if os.path.isfile(folder) else f"cannot be written to ({reason.strerror})"
        raise SettingError(f"{name} is {str(folder)!r}, which {why}; name a folder of your own") from reason
    return folder


def _try(path: Path) -> None:
    """Raises OSError where `path` cannot be written. Asking for permissions would not tell a full or read-only disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not os.path.lexists(path)
    path.open("ab").close()
    if new:
        path.unlink()


def writable_picture(name: str, path: Path) -> Path:
    """As `writable`, for a picture, whose format is its ending."""
    if path.suffix.lower() not in PICTURES:
        raise SettingError(f"{name} is {str(path)!r}, whose ending is none of {', '.join(PICTURES)}; "
                           "the ending chooses the format, so give one of these")
    return writable(name, path)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its ending, to be written; it takes the place of `path` when the block ends, and goes
    when it raises. Where `path` is a link, the file that it leads to is replaced."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def unfinished(file: str) -> str:
    """A pattern of the names under which `written_whole` leaves a file of this name where it is killed."""
    stem, suffix = os.path.splitext(file)
    return f".{stem}.????????{suffix}"


def replace_text(name: str, path: Path, text: str) -> Path:
    """Writes `text` to `path` whole or not at all: what stands there stays until all of it is written.

    Raises SettingError where it cannot be written.
    """
    writable(name, path)
    try:
        with written_whole(path) as beside:
            beside.write_text(text, encoding="utf-8", newline="\n")
    except OSError as reason:
        raise SettingError(f"{name} is {str(path)!r}, which cannot be written ({reason.strerror}); "
                           "name a file in a folder of your own") from reason
    return path
