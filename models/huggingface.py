"""Hugging Face folders in and out: `load_folder` and `save_folder`; weights pass one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock, Timeout
from flax import nnx
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from sled.errors import CheckpointError, SettingError
from sled.io import (
    NO_LOCKS,
    naming_folder,
    naming_full_disk,
    path_of,
    read_object,
    refuse_foreign,
    share_as,
    write_json,
)
from sled.models.config import DecoderConfig
from sled.models.decoder import STACKED, Decoder
from sled.models.families.registry import HEADS_CONFIG, format_config, write_heads
from sled.models.generation import FILE, IDS, read_generation
from sled.models.layers import Block
from sled.models.layout import Stored, layout
from sled.models.sharding.mesh import gathered
from sled.models.stored import (
    HEADS,
    INDEX,
    SINGLE,
    abstract,
    finite,
    open_weights,
    parameter_shapes,
    progress,
)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja")
_UNFINISHED = ".unfinished-"
_LOCK = ".unfinished.lock"  # held while a folder is written
_OURS = {"_written_by": "sled"}  # in config.json, where transformers keeps it, but puts its version beside it
_SHARDS = "model-*-of-*.safetensors"


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copies the files in `source` that are called so, with the folders below it that they are in."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def load_folder(path: str | Path, *, dtype=None) -> Decoder:
    """The model in a Hugging Face folder, separate form, on the default device.

    `dtype` None keeps every weight as it is stored. Reads `config.json`, `generation_config.json`
    (token ids only) and safetensors, one file or sharded. Layouts that mean the same are read alike: names with
    `model.` or without, as a base model saved alone has them; a tied head under its own name, the table's, or both, if
    equal; float64, read as float32. Rotary buffers of old checkpoints are passed over.

    Raises ConfigError for the configuration and CheckpointError for the weights: missing, surplus,
    misshaped, of an unsupported type, damaged, or not finite.
    """
    with open_weights(path) as stored, progress("Loading", sum(stored.sizes.values())) as bar:
        graph, state = nnx.split(abstract(stored.config))
        slots = dict(nnx.to_flat_state(state))
        for at, where in stored.tensors.items():
            own = stored.read(at, dtype)  # what is stored the other way round goes to the device so, which is quicker
            own = jnp.asarray(own.mT).mT if where.swapped else jnp.asarray(own)
            slots[at] = slots[at].replace(own)
            bar.update(stored.sizes[at])
    return nnx.merge(graph, nnx.from_flat_state(slots))


def save_folder(decoder: Decoder, path: str | Path, *, dtype=None, max_shard_bytes: int = 5_000_000_000,
                tokenizer_from: str | Path | None = None, generation: Mapping[str, Any] | None = None) -> Path:
    """Writes a folder that transformers (4.4x and 5) and `load_folder` read; returns its path.

    Exit heads lie beside the model, in `exit_heads.safetensors` and `.json`, which only `load_folder` reads: to
    transformers it is the model without them (see `exportable`).

    Either form of decoder. One that is spread over the devices of several processes is gathered tensor
    by tensor: all of them call this, process 0 writes, and all return once the folder is whole.
    `dtype` None stores every weight as it is. `tokenizer_from` is a folder whose tokenizer files are
    copied, and whose settings for generation are kept, where `generation` gives no others. A model that this function
    wrote before is overwritten, another's never: its weights and configuration are replaced, with `tokenizer_from` its
    tokenizer and chat template too; its other files stay. Everything is first written under a name that no loader takes
    for a model, and `config.json` moves last. Killed at any moment, it can be called again; what it left is then
    removed.

    Raises ConfigError where the family's format cannot express the model, CheckpointError where weights are not finite,
    the folder holds something else than a model of ours, or another save into it is going on, SettingError where it
    cannot be written.
    """
    if max_shard_bytes < 1:
        raise SettingError(f"max_shard_bytes is {max_shard_bytes}, but it must be at least 1")
    folder = path_of("path", path)
    refuse_no_model(folder)
    if tokenizer_from is not None and not path_of("tokenizer_from", tokenizer_from).is_dir():
        raise CheckpointError(f"{tokenizer_from} is not a folder; give one that holds tokenizer.json")
    config = decoder.config
    weights, heads = _named_weights(decoder)
    main_type = jnp.dtype(dtype or decoder.embedding.weight.dtype)
    format_config(config, main_type.name)  # raises before anything is written

    spread = not all(weight.is_here for weight in weights.values())
    if spread and jax.process_index() > 0:
        for name, weight in (weights | heads).items():
            weight.gather(name, dtype)
    else:
        with naming_full_disk(folder):
            _write_folder(folder, config, weights, heads, dtype, main_type, max_shard_bytes, tokenizer_from,
                          generation)
    if spread:
        multihost_utils.sync_global_devices(f"saved {folder}")
    return folder


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter, or one layer, one expert, or one expert of one layer of it, and where it is to be stored."""

    array: jax.Array
    index: tuple[int, ...]
    where: Stored

    def gather(self) -> np.ndarray:
        """The values on this host. All processes that hold a part of them have to call this."""
        own = _take(self.array, self.index) if self.index else self.array
        return gathered(own)[tuple(map(slice, self.where.shape))]  # without rows that fill up a vocabulary over a mesh


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One tensor to be stored, made of the parameters in it."""

    parts: tuple[_Part, ...]

    @property
    def is_here(self) -> bool:
        """Whether this process holds all of it."""
        return all(part.array.is_fully_addressable for part in self.parts)

    def nbytes(self, dtype) -> int:
        size = jnp.dtype(dtype or self.parts[0].array.dtype).itemsize
        return sum(math.prod(part.where.shape) for part in self.parts) * size

    def gather(self, name: str, dtype) -> np.ndarray:
        """The tensor on this host. All processes that hold a part of it have to call this."""
        gathered = [part.gather() for part in self.parts]
        whole = np.empty(self.parts[0].where.stored_shape, gathered[0].dtype)
        for part, own in zip(self.parts, gathered, strict=True):
            part.where.put(own, whole)
        return finite("the model", name, whole, dtype)


@jax.jit
def _take(array, index: tuple[int, ...]):
    for at in index:
        array = jax.lax.dynamic_index_in_dim(array, at, keepdims=False)
    return array


def exportable(decoder: Decoder) -> Decoder:
    """The decoder itself, if `save_folder` writes all of it in the form that other libraries read.

    Raises CheckpointError for exit heads: transformers' early exits (`assistant_early_exit`) share the final norm
    and projection, so to them the folder would be another model at its exits.
    """
    heads = decoder.config.exit_heads
    if heads is not None:
        raise CheckpointError(
            f"the exits after layers {', '.join(map(str, heads.layers))} have heads of their own ({heads.kind}"
            f"{'' if heads.tied else ', untied'}), which the Hugging Face format cannot carry; save the model for sled "
            "with save_folder, or leave the heads out: decoder.with_exit_heads(None)")
    return decoder


def _named_weights(decoder: Decoder) -> tuple[dict[str, _Weight], dict[str, _Weight]]:
    """Stored names of the model's weights and of the exit heads', in the order of the separate form's paths."""
    stacked = isinstance(decoder.layers, Block)
    tensors = layout(decoder.config, parameter_shapes(decoder.config))
    parameters = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}
    model, heads = {}, {}
    for path in sorted(tensors):
        where, at = tensors[path], path[1:2] if stacked and path[0] in STACKED else ()
        array = parameters[(path[0], *path[2:]) if at else path]
        for expert, name in enumerate(where.names):
            part = _Part(array, (*at, expert) if where.per_expert else at, where)
            (heads if path[0] == "exit_heads" else model).setdefault(name, []).append(part)
    return tuple({name: _Weight(tuple(parts)) for name, parts in found.items()} for found in (model, heads))


def write_form(folder: Path, config: DecoderConfig, dtype, tokenizer_from: str | Path | None,
               generation: Mapping[str, Any] | None = None) -> None:
    """Writes all of a model's folder but its weights: configuration, special tokens, the tokenizer's files.

    generation: settings for generation; None keeps those in `tokenizer_from`.
    """
    config_json = format_config(config, jnp.dtype(dtype).name)
    if generation is None:
        generation = read_generation(Path(tokenizer_from)) if tokenizer_from else {}
    write_json(folder / FILE, {**generation} | {name: config_json[name] for name in IDS})
    if tokenizer_from:
        copy_files(Path(tokenizer_from), folder, TOKENIZER_FILES)
    if config.exit_heads is not None:
        write_heads(config.exit_heads, folder)
    write_json(folder / "config.json", config_json | _OURS)


def _write_folder(folder: Path, config: DecoderConfig, weights: dict[str, _Weight], heads: dict[str, _Weight], dtype,
                  main_type, max_shard_bytes: int, tokenizer_from: str | Path | None,
                  generation: Mapping[str, Any] | None):
    """Everything under a name of its own first, then moved into place, `config.json` last.

    Without it no loader takes the folder for a model, and the next save knows its own by the lock that stays.
    """
    with contextlib.ExitStack() as stack:
        with naming_folder(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(folder))
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder)))
        for killed in folder.glob(f"{_UNFINISHED}*"):
            if killed != scratch:
                shutil.rmtree(killed)
        _write_weights(weights, scratch, dtype, max_shard_bytes)
        if heads:
            arrays = {name: weight.gather(name, dtype) for name, weight in heads.items()}
            save_file(arrays, scratch / HEADS, metadata={"format": "pt"})
        write_form(scratch, config, main_type, tokenizer_from, generation)

        files = [path for path in scratch.rglob("*") if path.is_file()]
        new = {file.relative_to(scratch).as_posix(): file for file in files}
        share_as(folder, new.values())
        earlier = [SINGLE, INDEX, HEADS, HEADS_CONFIG, *(file.name for file in folder.glob(_SHARDS))]
        if tokenizer_from is not None:  # a chat template, say, that only the earlier model had would count
            earlier += [file.relative_to(folder).as_posix() for name in TOKENIZER_FILES for file in folder.glob(name)]
        last = new.pop("config.json")
        (folder / last.name).unlink(missing_ok=True)
        for name, file in new.items():
            (folder / name).parent.mkdir(exist_ok=True)
            file.replace(folder / name)
        for name in earlier:
            if name not in new:
                (folder / name).unlink(missing_ok=True)
        last.replace(folder / last.name)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other save writes into the folder; the lock stays beside files without a config.json. Raises
    CheckpointError where another does."""
    lock = FileLock(folder / _LOCK, fallback_to_soft=False)  # it ends with its process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another save into {folder} is going on; wait for its end, or give a folder of its "
                              "own") from None
    except (OSError, NotImplementedError) as reason:
        if isinstance(reason, OSError) and reason.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        if (folder / "config.json").exists() or len(list(folder.iterdir())) == 1:
            with contextlib.suppress(OSError):
                os.unlink(folder / _LOCK)
        lock.release()


def _write_weights(weights: dict[str, _Weight], folder: Path, dtype, max_shard_bytes: int):
    """One file, or several of at most `max_shard_bytes` (a larger tensor alone) and their index."""
    total = sum(weight.nbytes(dtype) for weight in weights.values())
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, weight in weights.items():
        if shards[-1] and weight.nbytes(dtype) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= weight.nbytes(dtype)

    n = len(shards)
    names = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    with progress("Saving", total) as bar:
        for file, shard in zip(names, shards, strict=True):
            arrays = {name: weights[name].gather(name, dtype) for name in shard}
            save_file(arrays, folder / file, metadata={"format": "pt"})
            bar.update(sum(array.nbytes for array in arrays.values()))
    if n > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def refuse_no_model(folder: Path) -> None:
    """Raises CheckpointError where saving would mix a model into a folder of something else, or replace a model that
    `save_folder` did not write."""
    refuse_foreign(folder, "model folder that sled wrote", owns=lambda held: any(
        name == _LOCK or name.startswith(_UNFINISHED) or (name == "config.json" and _is_ours(folder / name))
        for name in held))


def _is_ours(config: Path) -> bool:
    try:
        fields = read_object(config, CheckpointError)
    except CheckpointError:
        return False
    return fields.items() >= _OURS.items() and "transformers_version" not in fields
