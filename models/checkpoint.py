"""Hugging Face folders in and out: `load_folder` and `save_folder`.

Only safetensors are read: a pickle can run code. Everything that headers can tell (names, shapes,
types) is checked before the first weight is read; weights then pass one tensor at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from sled.errors import CheckpointError, SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.models.layers import Block
from sled.models.registry import family_of, format_config, read_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")
STORED_TYPES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes each
PROGRESS_FROM = 1_000_000_000  # bytes: below, a bar would only flicker
_UNFINISHED = ".unfinished-"


def load_folder(path: str | Path, *, dtype=None) -> Decoder:
    """The model in a Hugging Face folder, separate form, on the default device.

    `dtype` None keeps every weight as it is stored. Reads `config.json`, `generation_config.json`
    (token ids only) and safetensors, one file or sharded. A tied checkpoint may also store its
    head, if equal; rotary buffers of old checkpoints are passed over.

    Raises ConfigError for the configuration and CheckpointError for the weights: missing, surplus,
    misshaped, of an unsupported type, damaged, or not finite.
    """
    folder = Path(path)
    files = _weight_files(folder)
    config = read_config(folder)
    wanted = abstract(config)
    graph, state = nnx.split(wanted)
    slots = dict(nnx.to_flat_state(state))
    family = family_of(config)
    paths = {family.tensor_name(path): path for path in slots}

    with contextlib.ExitStack() as stack:
        stored = _open(files, stack)
        twin = _twin_head(config, family, stored)
        shapes = {name: slots[path].shape[::_order(path)] for name, path in paths.items()}
        if twin:
            shapes[twin] = (config.vocab_size, config.width)
        total = _check_headers(folder, stored, shapes)
        with _progress("Loading", total) as bar:
            for name, at in paths.items():
                weight = stored[name].get_tensor(name)
                if name == family.tensor_name(("embedding", "weight")) and twin:
                    if not np.array_equal(weight, stored[twin].get_tensor(twin)):
                        raise CheckpointError(
                            f"{folder}: {twin} differs from {name}, but config.json ties them; set "
                            "tie_word_embeddings to false there, or remove the wrong tensor")
                own = jnp.asarray(_finite(folder, name, weight, dtype))
                slots[at] = slots[at].replace(own.T if _order(at) < 0 else own)
                bar.update(weight.nbytes)
    return nnx.merge(graph, nnx.from_flat_state(slots))


def save_folder(decoder: Decoder, path: str | Path, *, dtype=None, max_shard_bytes: int = 5_000_000_000,
                tokenizer_from: str | Path | None = None) -> Path:
    """Writes a folder that transformers (4.4x and 5) and `load_folder` read; returns its path.

    Either form of decoder. `dtype` None stores every weight as it is. `tokenizer_from` is a folder
    whose tokenizer files are copied. An existing model folder is overwritten: its weights and
    configuration are replaced, its other files stay. Everything is first written under a name that
    no loader takes for a model, and `config.json` moves last.

    Raises ConfigError where the family's format cannot express the model, CheckpointError where
    weights are not finite or the folder holds something else than a model.
    """
    if max_shard_bytes < 1:
        raise SettingError(f"max_shard_bytes is {max_shard_bytes}, but it must be at least 1")
    folder = Path(path)
    _refuse_foreign(folder)
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise CheckpointError(f"{tokenizer_from} is not a folder; give one that holds tokenizer.json")
    config = decoder.config
    weights = _named_weights(decoder)
    main_type = jnp.dtype(dtype or decoder.embedding.weight.dtype)
    config_json = format_config(config, main_type.name)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as unfinished:
        scratch = Path(unfinished)
        _write_weights(weights, scratch, dtype, max_shard_bytes)
        _write_json(scratch / "generation_config.json", {
            "bos_token_id": config_json["bos_token_id"], "eos_token_id": config_json["eos_token_id"],
            "pad_token_id": config_json["pad_token_id"]})
        for name in TOKENIZER_FILES if tokenizer_from else ():
            if (Path(tokenizer_from) / name).exists():
                shutil.copyfile(Path(tokenizer_from) / name, scratch / name)
        _write_json(scratch / "config.json", config_json)

        shards = folder.glob("model-*-of-*.safetensors")
        for old in [folder / "config.json", folder / SINGLE, folder / INDEX, *shards]:
            old.unlink(missing_ok=True)
        for new in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
            new.replace(folder / new.name)
    return folder


def abstract(config: DecoderConfig) -> Decoder:
    """A decoder of shapes only (float32), separate form; allocates nothing.

    One layer is traced and repeated, since tracing each of 80 takes seconds.
    """
    one = dataclasses.replace(config, num_layers=1, windows=())
    shapes = nnx.eval_shape(lambda: Decoder.init(one, rngs=nnx.Rngs(0)))
    blocks = [nnx.clone(shapes.layers[0]) for _ in range(config.num_layers)]
    return Decoder(config, embed=shapes.embedding, layers=nnx.List(blocks), norm=shapes.norm,
                   head=shapes.head)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises CheckpointError with what is there instead."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a folder with config.json and {SINGLE}")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; give the folder that holds the model's files")
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}); fetch it again") from None
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).exists():
                raise CheckpointError(f"{folder}: {INDEX} names the shard {shard!r}, which is not in the "
                                      "folder; fetch it again")
        return [folder / shard for shard in shards]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise CheckpointError(f"{folder} holds only PyTorch pickles, which can run code and are not loaded; "
                              "convert it with transformers' save_pretrained, which writes safetensors")
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}; give a folder with the model's weights")


def _open(files: list[Path], stack: contextlib.ExitStack) -> dict:
    """Every stored tensor's name, with the open file that holds it."""
    stored = {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error}); fetch it again") from None
        stored |= {name: opened for name in opened.keys() if not name.endswith("rotary_emb.inv_freq")}
    return stored


def _twin_head(config: DecoderConfig, family, stored: Mapping) -> str | None:
    """The name of the head that a tied checkpoint stores besides its embedding, if it does."""
    name = family.tensor_name(("head", "weight"))
    return name if config.tied_head and name in stored else None


def _check_headers(folder: Path, stored: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Raises CheckpointError unless exactly these tensors are stored; returns their size in bytes."""
    def some(names):
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    if missing := [name for name in shapes if name not in stored]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shapes)} tensors: {some(missing)}; the "
                              "files are incomplete or config.json is another model's: fetch them again")
    if surplus := sorted(set(stored) - set(shapes)):
        raise CheckpointError(f"{folder} holds {len(surplus)} tensors that config.json does not account for: "
                              f"{some(surplus)}; correct config.json or remove them")
    total = 0
    for name, shape in shapes.items():
        header = stored[name].get_slice(name)
        found, kind = tuple(header.get_shape()), header.get_dtype()
        if found != shape:
            raise CheckpointError(f"{folder}: {name} has shape {found}, but config.json asks for {shape}; "
                                  "use the config.json that belongs to these weights")
        if kind not in STORED_TYPES:
            raise CheckpointError(f"{folder}: {name} is stored as {kind}, but only {', '.join(STORED_TYPES)} "
                                  "are read; use the checkpoint before quantisation")
        total += math.prod(shape) * STORED_TYPES[kind]
    return total


def _finite(source, name: str, weight: np.ndarray, dtype) -> np.ndarray:
    """The weight in the type asked for. Raises CheckpointError where it is not, or no longer, finite."""
    if not np.isfinite(weight).all():
        raise CheckpointError(f"{source}: {name} holds values that are not finite; the model is damaged: "
                              "fetch it again, or take an earlier checkpoint")
    if dtype is None or weight.dtype == dtype:
        return weight
    with np.errstate(over="ignore"):
        cast = weight.astype(dtype)
    if not np.isfinite(cast).all():
        raise CheckpointError(f"{source}: {name} has values up to {np.abs(weight).max():.3g}, too large for "
                              f"{cast.dtype.name}; use bfloat16 or float32")
    return cast


def _named_weights(decoder: Decoder) -> dict:
    """Hugging Face's name of every weight, in the order of the layers, with its jax array."""
    family = family_of(decoder.config)
    separate = decoder.unstack() if isinstance(decoder.layers, Block) else decoder
    flat = dict(nnx.to_flat_state(nnx.state(separate, nnx.Param)))
    return {family.tensor_name(path): param[...].T if _order(path) < 0 else param[...] for path, param in flat.items()}


def _order(path: tuple) -> int:
    """1, or -1 for a parameter stored the other way round: a layer's matrices are [out, in] in checkpoints."""
    return -1 if "layers" in path and path[-1] == "weight" else 1


def _write_weights(weights: dict, folder: Path, dtype, max_shard_bytes: int):
    """One file, or several of at most `max_shard_bytes` (a larger tensor alone) and their index."""
    width = lambda w: jnp.dtype(dtype or w.dtype).itemsize * w.size  # noqa: E731
    total = sum(width(w) for w in weights.values())
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, weight in weights.items():
        if shards[-1] and width(weight) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= width(weight)

    n = len(shards)
    names = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    with _progress("Saving", total) as bar:
        for file, shard in zip(names, shards, strict=True):
            arrays = {name: np.ascontiguousarray(_finite("the model", name, np.asarray(weights[name]), dtype))
                      for name in shard}
            save_file(arrays, folder / file, metadata={"format": "pt"})
            bar.update(sum(array.nbytes for array in arrays.values()))
    if n > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _progress(what: str, total_bytes: int) -> tqdm:
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=total_bytes < PROGRESS_FROM)


def _refuse_foreign(folder: Path):
    """Raises CheckpointError where saving would mix a model into a folder of something else."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the name of a folder")
    held = [] if not folder.exists() else [f for f in folder.iterdir() if not f.name.startswith(_UNFINISHED)]
    if held and not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} is not empty and not a model folder (it holds {held[0].name}); give "
                              "a new or empty folder")


def _write_json(path: Path, values: dict):
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
