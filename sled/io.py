"""Files and folders written whole or not at all, and values as files and messages hold them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sled.errors import CheckpointError, SettingError, SledError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # of a disk that takes no more
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what network file systems without locks say
MOST_NESTED = 64  # lists and objects within one another in a JSON file; models' files have fewer than ten


def cache_folder(name: str) -> Path:
    """The folder `name` for what can be made again: sled/NAME in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sled" / name


def path_of(name: str, value: Any, error: type[SledError] = SettingError) -> Path:
    """A path as a user gives it, ~ being the home folder. Raises `error` for what can be none, such as None."""
    try:
        path = Path(os.path.expanduser(value))
        os.lstat(path)
    except (TypeError, ValueError) as reason:  # no text, or with a NUL or half a character in it
        why = str(reason)
    except OSError as reason:
        if reason.errno != errno.ENAMETOOLONG:
            return path
        why = reason.strerror
    else:
        return path
    raise error(f"{name} is {shown(value)}, which can be no path ({why}); name a file or a folder")


def writable(name: str, path: str | os.PathLike) -> Path:
    """`path`, which can be written: tried without a trace, for what comes after long work. Raises SettingError."""
    path = path_of(name, path)
    with _naming(name, path):
        _try(path)
    return path


def made_writable(name: str, path: str | os.PathLike) -> Path:
    """As `writable`, with its folder made, for what is written now."""
    path = writable(name, path)
    with _naming(name, path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def writable_folder(name: str, folder: str | os.PathLike, files: Collection[str], *,
                    owns: Callable[[Path], bool]) -> Path:
    """`folder`, for `files`, those of an earlier time being replaced; tried as by `writable`.

    owns: whether those in the folder are of an earlier time. Raises SettingError where they are not, so that nobody's
    own files are replaced, and where none can be written.
    """
    folder = path_of(name, folder)
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


@contextlib.contextmanager
def _naming(name: str, path: Path) -> Iterator[None]:
    """Makes of an OSError a SettingError that names the file."""
    try:
        yield
    except OSError as reason:
        raise SettingError(f"{name} is {str(path)!r}, which cannot be written ({reason.strerror}); "
                           "name a file in a folder of your own") from reason


def _try(path: Path) -> None:
    """Raises OSError where `path` cannot be written. Asking for permissions would not tell a full or read-only disk."""
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait, beyond interruption
        raise OSError(errno.EINVAL, "it is a pipe or a device")
    lacking = [folder for folder in path.parents if not os.path.lexists(folder)]
    new = not os.path.lexists(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if new:
            path.unlink()
    finally:
        for folder in lacking:
            with contextlib.suppress(OSError):  # not made, or somebody has put something there since
                folder.rmdir()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its ending, to be written, its folder being made; it takes the place of `path` when
    the block ends, and goes when it raises. Where `path` is a link, the file that it leads to is replaced."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Where a folder is made or looked at: makes of an OSError a SettingError that names it."""
    try:
        yield
    except OSError as reason:
        raise SettingError(f"{folder} cannot be written ({reason.strerror}); name a folder in one of your "
                           "own") from reason


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Makes of what libraries raise where a disk is full, each its own, a SettingError that names the path."""
    try:
        yield
    except SledError:
        raise
    except Exception as reason:
        if why := disk_failure(reason):
            raise SettingError(f"{path} {why}") from None
        raise


def disk_failure(error: BaseException | None) -> str | None:
    """What to say behind a file's name where a disk is full or fails, and that is the error, or what it came of."""
    while error is not None:
        for number in (*FULL, errno.EIO):
            words = os.strerror(number)  # some libraries keep only the words
            if (isinstance(error, OSError) and error.errno == number) or words in str(error):
                return (f"cannot be written ({words}); make room, or name a place on another disk" if number in FULL
                        else f"cannot be read or written ({words}); check its disk, or name a place on another")
        error = error.__cause__ or error.__context__
    return None


def unfinished(file: str) -> str:
    """A pattern of the names under which `written_whole` leaves a file of this name where it is killed."""
    stem, suffix = os.path.splitext(file)
    return f".{stem}.????????{suffix}"


@contextlib.contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled; it takes the place of `folder` when the block ends, and goes when it
    raises. Raises OSError where no folder can be made there."""
    beside = folder.with_name(f".{folder.name}.unfinished-{secrets.token_hex(4)}")
    beside.mkdir(parents=True)
    earlier = None
    try:
        yield beside
        if folder.exists():
            earlier = folder.rename(folder.with_name(f".{folder.name}.earlier-{secrets.token_hex(4)}"))
        beside.replace(folder)
        if earlier:
            shutil.rmtree(earlier)
    except BaseException:
        if earlier and earlier.exists() and not folder.exists():
            earlier.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
        raise


def unfinished_folder(name: str) -> str:
    """A pattern of the names under which `folder_written_whole` leaves a folder of this name where it is killed."""
    return f".{name}.unfinished-????????"


def refuse_foreign(folder: Path, kind: str, owns: Callable[[Sequence[str]], bool]) -> None:
    """Raises CheckpointError where `folder` is a file, or a folder that holds something else than an earlier `kind`,
    and SettingError where it cannot be looked into.

    owns: whether the names in the folder, sorted and at least one, are those of an earlier one.
    """
    with naming_folder(folder):
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give the name of a folder")
        held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if held and not owns(held):
        raise CheckpointError(f"{folder} is not empty and no {kind} (it holds {held[0]}); give a new or empty folder")


def share_as(folder: Path, files: Iterable[Path]) -> None:
    """Lets those read and write `files` who may read and write `folder`: safetensors writes for the user alone."""
    for file in files:
        file.chmod(folder.stat().st_mode & 0o666)


def replace_text(name: str, path: str | os.PathLike, text: str) -> Path:
    """Writes `text` to `path` whole or not at all: what stands there stays until all of it is written.

    Raises SettingError where it cannot be written.
    """
    path = writable(name, path)
    with _naming(name, path), written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people to read."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON for people to read, indented. A number that is not finite is an error (see `json_numbers`)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def regular_file(path: Path, error: type[SledError], remedy: str = "fetch it again") -> Path:
    """`path`. Raises `error` where it is no regular file: opening a pipe would never end."""
    if not path.is_file():
        what = "a folder, a pipe or a device" if os.path.lexists(path) else "not there"
        raise error(f"{path} is {what}, where a file is needed; {remedy}")
    return path


def read_text(path: Path, error: type[SledError], remedy: str = "fetch it again") -> str:
    """The text of a file. Raises `error` where it is no UTF-8, or no regular file."""
    try:
        return regular_file(path, error, remedy).read_text(encoding="utf-8")
    except (OSError, ValueError) as reason:
        if isinstance(reason, SledError):
            raise
        raise error(f"{path} cannot be read as UTF-8 text ({reason}); {remedy}") from None


def read_object(path: Path, error: type[SledError], remedy: str = "fetch it again") -> dict[str, Any]:
    """The object in a JSON file. Raises `error` for everything else that a file may hold."""
    text = read_text(path, error, remedy)
    try:
        value = json.loads(text)
        deep = _deeper(value, MOST_NESTED)
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read as JSON ({reason}); {remedy}") from None
    if deep or not isinstance(value, dict):
        what = f"values nested more than {MOST_NESTED} deep" if deep else f"a {type(value).__name__}, not a JSON object"
        raise error(f"{path} holds {what}; {remedy}")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep: even printing such a value can fail."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(one, levels - 1) for one in inner)


def json_digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value's JSON in its one canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def json_numbers(value):
    """A number, or nested lists of numbers, as JSON has them: those that are not finite, which it lacks, by name."""
    if isinstance(value, list):
        return [json_numbers(entry) for entry in value]
    return value if math.isfinite(value) else str(value)


def add_array(total, array: np.ndarray) -> None:
    """Adds an array's type, shape and bytes to a hash."""
    total.update(f"{array.dtype} {array.shape}\n".encode())
    total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, which may have many, in at most 300 characters."""
    text = str(error).partition(" [tensorstore_spec")[0].strip()  # TensorStore ends with a page of its own settings
    return shorten((text or type(error).__name__).splitlines()[0], 300)


def shown(value: Any, most: int = 100) -> str:
    """A value as Python writes it, cut to `most` characters, for an error: there it may be of any kind and length."""
    try:
        return shorten(repr(value), most)
    except Exception:  # a number too long to be written down, or a class that fails at it
        return f"a {type(value).__name__}"


def shorten(text: str, most: int) -> str:
    """The text, or of a longer one its beginning and end, in at most `most` characters."""
    if len(text) <= most:
        return text
    end = (most - 3) // 3
    return f"{text[:most - 3 - end]}...{text[len(text) - end:]}"


def size_in_words(count: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1."""
    power = min(max(count.bit_length() - 1, 0) // 10, 5)
    return f"{count / 1024**power:,.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
