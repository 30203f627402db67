"""Where an export is written: whole or not at all, and over nothing but an earlier export."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sled.errors import CheckpointError, SettingError

RECORDS = ("sled_export.json", "program.json")  # what an export is known by


@contextlib.contextmanager
def replacing(to: str | Path) -> Iterator[Path]:
    """A new folder beside `to`, to be filled; it takes the place of `to` when the block ends, and goes when it raises.

    Raises CheckpointError, before the block begins, where `to` holds anything but an earlier export; SettingError where
    no folder can be made there.
    """
    to = Path(to).expanduser().resolve()
    if to.exists() and not to.is_dir():
        raise CheckpointError(f"{to} is a file; give the name of a folder")
    held = sorted(path.name for path in to.iterdir()) if to.exists() else []
    if held and not any(record in held for record in RECORDS):
        raise CheckpointError(f"{to} is not empty and no earlier export (it holds {held[0]}); give a new folder")
    unfinished = to.with_name(f".{to.name}.unfinished-{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as reason:
        raise SettingError(f"{to} cannot be written ({reason.strerror}); name a folder in one of your own") from reason
    try:
        yield unfinished
        for file in (path for path in unfinished.rglob("*") if path.is_file()):
            file.chmod(unfinished.stat().st_mode & 0o666)  # safetensors writes for the user alone
        earlier = None
        if held:
            earlier = to.rename(to.with_name(f".{to.name}.earlier-{secrets.token_hex(4)}"))
        unfinished.replace(to)
        if earlier:
            shutil.rmtree(earlier)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
