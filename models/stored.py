"""The weights of a Hugging Face folder, opened: checked by their headers, then read whole or in slices.

Only safetensors are read: a pickle can run code. Everything that headers can tell (names, shapes,
types) is checked before the first weight is read; what is read is checked to be finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from sled.errors import CheckpointError
from sled.io import path_of, read_object
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.models.families.registry import config_file, family_of, read_config
from sled.models.layers import Block
from sled.models.layout import Stored, layout, tensor_shapes
from sled.models.mxfp4 import stepped, unpacked

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADS = "exit_heads.safetensors"
STORED_TYPES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}  # bytes each
QUANTISED = ("qweight", "qzeros", "scales", "weight_scale", "weight_scale_inv", "weight_packed", "absmax", "SCB")
REOPEN = 2**24  # bytes of files that are read before these are opened again
PROGRESS_AFTER = 1.0  # seconds: before, a bar would only flicker


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """An open folder whose headers fit its configuration.

    tensors: where every parameter (path of the separate form) lies. sizes: of every parameter, its bytes as stored.
    shapes: of every parameter.
    """

    folder: Path
    config: DecoderConfig
    tensors: Mapping[tuple, Stored]
    sizes: Mapping[tuple, int]
    shapes: Mapping[tuple, tuple[int, ...]]
    _stored: Mapping
    _twin: str | None

    def read(self, path: tuple, dtype=None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The parameter at `path`, or the part of it that `index` (a slice for each axis) selects; only that is read.

        `dtype` None keeps the stored type, float32 for float64. Raises CheckpointError where values are not finite, or
        too large for the type, or a tied checkpoint's second head differs.
        """
        where = self.tensors[path]
        weight = where.read(lambda name, index: self._read(name, dtype, index), index)
        if self._twin and path == ("embedding", "weight"):
            if not np.array_equal(weight, self._read(self._twin, dtype, index or (slice(None),))):
                raise CheckpointError(
                    f"{self.folder}: {self._twin} differs from {where.names[0]}, but config.json ties them; set "
                    "tie_word_embeddings to false there, or remove the wrong tensor")
        return weight

    def _read(self, name: str, dtype, index: tuple[slice, ...]) -> np.ndarray:
        weight = stepped(self._stored[name], index)
        return finite(self.folder, name, weight, np.float32 if dtype is None and weight.dtype == np.float64 else dtype)


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[StoredWeights]:
    """The folder's weights, open for reading. Raises as `load_folder` does for what headers can tell."""
    folder = path_of("path", path, CheckpointError)
    files = _weight_files(folder)
    config = read_config(folder)
    if config.exit_heads is not None:
        files = [*files, folder / HEADS]
    with contextlib.ExitStack() as stack:
        stored_as = unpacked(_open(files, stack))
        refuse_more(folder, config, stored_as)
        family, shapes = family_of(config), parameter_shapes(config)
        tensors = layout(config, shapes)
        held = family.canonical(stored_as)
        table, head = tensors["embedding", "weight"].names[0], family.stored_name(("head", "weight"))
        twin = head if config.tied_head and head in held else None
        if twin and table not in held:  # one of the two that are tied is enough
            held[table], twin = held.pop(head), None
        wanted = tensor_shapes(tensors)
        if twin:
            wanted[twin] = shapes["embedding", "weight"]
        headers = {name: stored_as[stored] for name, stored in held.items()}
        found = {name: (tuple(header.get_shape()), header.get_dtype()) for name, header in headers.items()}
        check_tensors(folder, found, wanted, STORED_TYPES)
        yield StoredWeights(
            folder, config, {at: where._replace(names=tuple(held[name] for name in where.names))
                             for at, where in tensors.items()},
            {at: math.prod(shape) * STORED_TYPES[found[tensors[at].names[0]][1]] for at, shape in shapes.items()},
            shapes, stored_as, twin and held[twin])


def refuse_more(folder: Path, config: DecoderConfig, names: Collection[str]) -> None:
    """Raises CheckpointError where a configuration asks for more layers and exit heads than tensors are stored: even
    their shapes take minutes, where somebody has written a number without end."""
    heads = len(config.exit_heads.layers) if config.exit_heads else 0
    if config.num_layers + heads > len(names):
        besides = f" and exit_heads.json for {heads} heads" * bool(heads)
        raise CheckpointError(f"{folder}: config.json asks for {config.num_layers} layers{besides}, but "
                              f"{_layers(names)} are stored, in {len(names)} tensors; use the configuration of "
                              "these weights, or fetch them again")


def parameter_shapes(config: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    """The shape of every parameter (separate form) by its path. Makes no layer but one, however many there are to be.
    """
    shapes = _one_layer(config)
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(_assembled(config, shapes, shapes.layers))):
        paths = [("layers", i, *path[2:]) for i in range(config.num_layers)] if path[0] == "layers" else [path]
        found |= dict.fromkeys(paths, leaf.shape)
    return found


def plain_path(path) -> tuple:
    """A key path of jax as `nnx.to_flat_state` has it."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def cut_to(shapes: Mapping[tuple, tuple[int, ...]], weights):
    """Weights in the separate form, without the rows that fill up a vocabulary over a mesh. shapes: by path."""
    def cut(path, x):
        shape = shapes[plain_path(path)]
        return x if x.shape == shape else x[tuple(map(slice, shape))]

    return jax.tree_util.tree_map_with_path(cut, weights)


def abstract(config: DecoderConfig) -> Decoder:
    """A decoder of shapes only (float32), separate form; allocates nothing.

    One layer is traced and repeated, since tracing each of 80 takes seconds.
    """
    shapes = _one_layer(config)
    return _assembled(config, shapes, nnx.List([nnx.clone(shapes.layers[0]) for _ in range(config.num_layers)]))


def abstract_stacked(config: DecoderConfig) -> Decoder:
    """As `abstract`, in the stacked form."""
    shapes = _one_layer(config)
    graph, state = nnx.split(shapes.layers[0])
    lengthen = lambda leaf: jax.ShapeDtypeStruct((config.num_layers, *leaf.shape), leaf.dtype)  # noqa: E731
    return _assembled(config, shapes, nnx.merge(graph, jax.tree.map(lengthen, state)))


def _one_layer(config: DecoderConfig) -> Decoder:
    one = dataclasses.replace(config, num_layers=1, windows=(), exit_heads=None)
    return nnx.eval_shape(lambda: Decoder.init(one, rngs=nnx.Rngs(0)))


def _assembled(config: DecoderConfig, shapes: Decoder, layers: nnx.List | Block) -> Decoder:
    """The decoder with these layers and the other parts of `shapes`, and the exit heads of its configuration."""
    bare = Decoder(dataclasses.replace(config, exit_heads=None), embed=shapes.embedding,
                   positions=shapes.positions, layers=layers, norm=shapes.norm, head=shapes.head)
    if config.exit_heads is None:
        return bare
    graph, state = nnx.split(bare)
    return nnx.eval_shape(lambda state: nnx.merge(graph, state).with_exit_heads(config.exit_heads, rngs=nnx.Rngs(0)),
                          state)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises CheckpointError with what is there instead."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a folder with config.json and {SINGLE}")
    config_file(folder)
    if os.path.lexists(folder / SINGLE):
        return [folder / SINGLE]
    if os.path.lexists(folder / INDEX):
        where = read_object(folder / INDEX, CheckpointError).get("weight_map")
        shards = list(where.values()) if isinstance(where, dict) else []
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise CheckpointError(f"{folder / INDEX} is damaged (its weight_map names no files); fetch it again")
        for shard in shards:
            if Path(shard).name != shard or not os.path.lexists(folder / shard):
                raise CheckpointError(f"{folder}: {INDEX} names the shard {shard!r}, which is not in the "
                                      "folder; fetch it again")
        return [folder / shard for shard in sorted(set(shards))]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise CheckpointError(f"{folder} holds only PyTorch pickles, which can run code and are not loaded; "
                              "convert it with transformers' save_pretrained, which writes safetensors")
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}; give a folder with the model's weights")


class _Files:
    """Open safetensors files. They are opened again from time to time: their pages that were read would all count as
    memory of this process, until they are closed."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack, self._opened, self._read = stack.enter_context(contextlib.ExitStack()), {}, 0

    def open(self, path: Path):
        if path not in self._opened:
            if not path.is_file():  # opening a pipe would wait for a writer, beyond interruption
                raise CheckpointError(f"{path} is no regular file; fetch it again")
            try:
                self._opened[path] = self._stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}); fetch it again") from None
        return self._opened[path]

    def read(self, path: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
        stored = self.open(path).get_slice(name)
        found = stored[index]
        between = stored.get_shape()[-1] // max(1, found.shape[-1]) if found.ndim > 1 else 1  # in pages read, too
        self._read += found.nbytes * between
        if self._read > REOPEN:
            self._stack.close()
            self._opened, self._read = {}, 0
        return found


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, as safetensors has slices of one."""

    files: _Files
    path: Path
    name: str
    shape: list[int]
    kind: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.kind

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.files.read(self.path, self.name, index)


def _open(paths: list[Path], stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Every stored tensor by its name."""
    files, stored = _Files(stack), {}
    for path in paths:
        opened = files.open(path)
        for name in opened.keys():  # it is no mapping
            header = opened.get_slice(name)
            stored[name] = _Tensor(files, path, name, header.get_shape(), header.get_dtype())
    return stored


def check_tensors(folder: Path, found: Mapping[str, tuple[tuple[int, ...], str]],
                  wanted: Mapping[str, tuple[int, ...]], types: Collection[str]) -> None:
    """Raises CheckpointError unless exactly the tensors of these names and shapes are stored, in one of these types.

    found: shape and type of each stored tensor.
    """
    missing = [name for name in wanted if name not in found]
    surplus = sorted(set(found) - set(wanted))
    wrong = [f"lacks {len(missing)} of {len(wanted)} tensors: {_some(missing)}"] if missing else []
    if surplus:
        wrong.append(f"holds {len(surplus)} tensors that config.json does not account for: {_some(surplus)}")
    if wrong:
        raise CheckpointError(f"{folder} {' and '.join(wrong)}; {_remedy(missing, surplus, found, wanted)}")
    for name, shape in wanted.items():
        stored, kind = found[name]
        if stored != shape:
            raise CheckpointError(f"{folder}: {name} has shape {stored}, but config.json asks for {shape}; "
                                  "use the config.json that belongs to these weights")
        if kind not in types:
            raise CheckpointError(f"{folder}: {name} is stored as {kind}, but only {', '.join(types)} "
                                  "are read; use the checkpoint before quantisation")


def _remedy(missing: list[str], surplus: list[str], found: Collection[str], wanted: Collection[str]) -> str:
    """What is wrong where tensors of other names are stored than those that are wanted, and what to do."""
    asked, held = _layers(wanted), _layers(found)
    if any(name.rpartition(".")[2] in QUANTISED for name in surplus):
        return "they are quantised: use the checkpoint before quantisation"
    if len(missing) == len(wanted):
        return "they are another kind of model's, or an adapter's: use the folder of a whole model"
    if asked != held:
        return (f"config.json asks for {asked} layers, but {held} are stored: use the config.json of these weights, or "
                "fetch them again")
    if len(missing) == 1 and missing[0].endswith("lm_head.weight"):
        return ("the base model was saved without its head: save the model for causal language modelling, or set "
                "tie_word_embeddings to true in config.json if its head is the embeddings")
    if missing:
        return "the files are incomplete or config.json is another model's: fetch them again"
    return "correct config.json or remove them"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _layers(names: Collection[str]) -> int:
    """How many layers the tensors of these names are of."""
    found = (re.search(r"\b(?:layers|h)[./](\d+)[./]", name) for name in names)
    return len({match[1] for match in found if match})


def finite(source, name: str, weight: np.ndarray, dtype) -> np.ndarray:
    """The weight in the type asked for. Raises CheckpointError where it is not, or no longer, finite."""
    if not np.isfinite(weight).all():
        raise CheckpointError(f"{source}: {name} holds values that are not finite; the model is damaged: "
                              "fetch it again, or take an earlier checkpoint")
    if dtype is None or weight.dtype == dtype:
        return weight
    with np.errstate(over="ignore"):
        cast = weight.astype(dtype)
    if not np.isfinite(cast).all():
        remedy = "use bfloat16 or float32" if cast.dtype == np.float16 else "the model is damaged: fetch it again"
        raise CheckpointError(f"{source}: {name} has values up to {np.abs(weight).max():.3g}, too large for "
                              f"{cast.dtype.name}; {remedy}")
    return cast


def progress(what: str, total_bytes: int) -> tqdm:
    """A bar in bytes; of several processes that load or save together, only the first shows one."""
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True,
                delay=PROGRESS_AFTER, disable=jax.process_index() > 0)
