"""The folder that an export is written to: whole or not at all, and over nothing but an earlier export."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from sled.errors import CheckpointError
from sled.io import (
    folder_written_whole,
    naming_folder,
    naming_full_disk,
    path_of,
    read_object,
    refuse_foreign,
    share_as,
)
from sled.models.huggingface import TOKENIZER_FILES

RECORD = "sled_export.json"  # of Hugging Face and Orbax exports
RECORDS = {RECORD: "form", "program.json": "programs"}  # an export is known by such a file with such a key
# What exports write. A folder with anything else holds somebody's own files, which must not go with it.
WRITTEN = (*RECORDS, *TOKENIZER_FILES, "config.json", "generation_config.json", "exit_heads.*", "README.md", "run.py",
           "calibration.json", "*.safetensors", "*.safetensors.index.json", "*.jax_export", "__pycache__/*.pyc",
           # by Orbax
           "weights/state/*", "weights/_*", "weights/orbax.checkpoint", "weights/commit_success.txt")
PACKAGES = ("sled-jax", "jax", "jaxlib", "flax")


@contextlib.contextmanager
def replacing(to: str | Path) -> Iterator[Path]:
    """A new folder beside `to`, to be filled; it takes the place of `to` when the block ends, and goes when it raises.

    Raises CheckpointError, before the block begins, where `to` holds anything but an earlier export; SettingError where
    no folder can be made there.
    """
    to = path_of("to", to).resolve()
    refuse_foreign(to, "earlier export", owns=lambda held: any(_has(to / name, key) for name, key in RECORDS.items()))
    held = sorted(path.relative_to(to).as_posix() for path in to.rglob("*")  # none where there is no folder
                  if not path.is_dir() or not any(path.iterdir()))
    if others := [name for name in held if not any(_is(name, pattern) for pattern in WRITTEN)]:
        raise CheckpointError(f"{to} is an earlier export, but it also holds {others[0]}, which would go with it; move "
                              "that elsewhere, or give a new folder")
    with contextlib.ExitStack() as stack:
        with naming_folder(to):
            beside = stack.enter_context(folder_written_whole(to))
        with naming_full_disk(to):
            yield beside
        share_as(beside, (path for path in beside.rglob("*") if path.is_file()))


def versions() -> dict[str, str]:
    """Versions of the packages that wrote an export."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def _is(name: str, pattern: str) -> bool:
    """As `fnmatch`, but a pattern for the top does not match what is in a folder, nor the other way round."""
    return fnmatch.fnmatchcase(name, pattern) and ("/" in name) == ("/" in pattern)


def _has(record: Path, key: str) -> bool:
    """True for a file that holds a JSON object with such a key."""
    try:
        return key in read_object(record, CheckpointError)
    except CheckpointError:
        return False
