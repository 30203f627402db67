"""Where an export is written: whole or not at all, and over nothing but an earlier export."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sled.errors import CheckpointError, SettingError
from sled.models.huggingface import TOKENIZER_FILES

RECORD = "sled_export.json"  # of Hugging Face and Orbax exports
RECORDS = {RECORD: "form", "program.json": "programs"}  # an export is known by such a file with such a key
# What exports write. A folder with anything else holds somebody's own files, which must not go with it.
WRITTEN = (*RECORDS, *TOKENIZER_FILES, "config.json", "generation_config.json", "exit_heads.*", "README.md", "run.py",
           "calibration.json", "*.safetensors", "*.safetensors.index.json", "*.jax_export", "__pycache__/*.pyc",
           # by Orbax
           "weights/state/*", "weights/_*", "weights/orbax.checkpoint", "weights/commit_success.txt")


@contextlib.contextmanager
def replacing(to: str | Path) -> Iterator[Path]:
    """A new folder beside `to`, to be filled; it takes the place of `to` when the block ends, and goes when it raises.

    Raises CheckpointError, before the block begins, where `to` holds anything but an earlier export; SettingError where
    no folder can be made there.
    """
    to = Path(to).expanduser().resolve()
    if to.exists() and not to.is_dir():
        raise CheckpointError(f"{to} is a file; give the name of a folder")
    held = sorted(path.relative_to(to).as_posix() for path in to.rglob("*")  # none where there is no folder
                  if not path.is_dir() or not any(path.iterdir()))
    if held and not any(_has(to / record, key) for record, key in RECORDS.items()):
        raise CheckpointError(f"{to} is not empty and no earlier export (it holds {held[0]}); give a new folder")
    if others := [name for name in held if not any(_is(name, pattern) for pattern in WRITTEN)]:
        raise CheckpointError(f"{to} is an earlier export, but it also holds {others[0]}, which would go with it; move "
                              "that elsewhere, or give a new folder")
    unfinished = to.with_name(f".{to.name}.unfinished-{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as reason:
        raise SettingError(f"{to} cannot be written ({reason.strerror}); name a folder in one of your own") from reason
    earlier = None
    try:
        yield unfinished
        for file in (path for path in unfinished.rglob("*") if path.is_file()):
            file.chmod(unfinished.stat().st_mode & 0o666)  # safetensors writes for the user alone
        if held:
            earlier = to.rename(to.with_name(f".{to.name}.earlier-{secrets.token_hex(4)}"))
        unfinished.replace(to)
        if earlier:
            shutil.rmtree(earlier)
    except BaseException:
        if earlier and earlier.exists() and not to.exists():
            earlier.rename(to)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _is(name: str, pattern: str) -> bool:
    """As `fnmatch`, but that what is at the top and what is in a folder are told apart."""
    return fnmatch.fnmatchcase(name, pattern) and ("/" in name) == ("/" in pattern)


def _has(record: Path, key: str) -> bool:
    """Whether this is a JSON object with such a key."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and key in found
