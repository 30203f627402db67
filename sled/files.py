"""Files that are written for the user: refused by name before the work whose result they are for."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from sled.errors import SettingError

PICTURES = (".png", ".svg", ".pdf")


def writable(name: str, path: Path) -> Path:
    """`path`, whose folder is made; what is there already stays. Raises SettingError where none can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        path.open("ab").close()  # asking for permissions would not tell a full or read-only disk
        if new:
            path.unlink()
    except OSError as reason:
        raise SettingError(f"{name} is {str(path)!r}, which cannot be written ({reason.strerror}); "
                           "name a file in a folder of your own") from reason
    return path


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
