"""Orbax folders in and out: the weights as an Orbax checkpoint, beside configuration and tokenizer as Hugging Face has.

    weights/          an Orbax (v1) checkpoint of the separate form: embedding, layers/0 .. layers/L-1, norm, head
    config.json       and generation_config.json, exit_heads.json, tokenizer files

Unlike a Hugging Face folder it holds exit heads as parts of the model. A decoder on a mesh is written by all of its
processes together, each its own part.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from sled.errors import CheckpointError
from sled.io import first_line, naming_folder, path_of, refuse_foreign
from sled.models.config import WEIGHT_TYPES
from sled.models.decoder import Decoder
from sled.models.families.registry import format_config, read_config
from sled.models.huggingface import write_form
from sled.models.layers import Block
from sled.models.sharding.sharding import Sharding
from sled.models.stored import abstract, check_tensors, cut_to, parameter_shapes, progress, refuse_more

WEIGHTS = "weights"


def is_orbax(folder: Path) -> bool:
    """True for a folder that `save_orbax` wrote."""
    return (folder / "config.json").is_file() and (folder / WEIGHTS).is_dir()


def save_orbax(decoder: Decoder, path: str | Path, *, dtype=None, tokenizer_from: str | Path | None = None) -> Path:
    """Writes the decoder, of either form, with its exit heads, to a new or empty folder; returns its path.

    `dtype` None stores every weight as it is. `tokenizer_from` is a folder whose tokenizer files are copied and
    whose settings for generation are kept. Of several processes that hold a decoder together all call this.
    `config.json` comes last, and without it the folder is no model.
    Raises ConfigError where the family's format cannot express the model, CheckpointError where weights are not finite
    or the folder holds something, SettingError where it cannot be made.
    """
    folder = path_of("path", path).absolute()
    refuse_foreign(folder, "folder for a model", owns=lambda held: False)
    main_type = jnp.dtype(dtype or decoder.embedding.weight.dtype)
    format_config(decoder.config, main_type.name)  # raises before anything is written
    own = decoder.unstack() if isinstance(decoder.layers, Block) else decoder
    weights = nnx.to_pure_dict(nnx.state(own, nnx.Param))
    weights = cut_to(parameter_shapes(decoder.config), weights)
    if dtype is not None:
        weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    _check_finite("the model", weights)
    with naming_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ocp.save(folder / WEIGHTS, weights)
    if jax.process_index() == 0:
        write_form(folder, decoder.config, main_type, tokenizer_from)
    return folder


def load_orbax(path: str | Path, *, dtype=None, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """The model in a folder that `save_orbax` wrote, separate form, on the default device or straight onto a mesh; a
    vocabulary that this does not divide lies whole on each device for a moment.

    `dtype` None keeps every weight as it is stored. Names, shapes and types are checked before anything is read.
    Raises ConfigError for the configuration and CheckpointError for the weights: missing, surplus, misshaped, of an
    unsupported type, damaged, or not finite; with a mesh what `Sharding` raises.
    """
    folder = path_of("path", path, CheckpointError).absolute()
    if not is_orbax(folder):
        raise CheckpointError(f"{folder} has no config.json with a folder {WEIGHTS} beside it; give one that "
                              "sled export --form orbax wrote")
    config = read_config(folder)
    kinds = _named(_read(folder, lambda: ocp.metadata(folder / WEIGHTS).metadata or _unreadable()))
    refuse_more(folder, config, kinds)
    shapes = {"/".join(map(str, path)): shape for path, shape in parameter_shapes(config).items()}
    check_tensors(folder, {name: (tuple(kind.shape), str(kind.dtype)) for name, kind in kinds.items()},
                  shapes, WEIGHT_TYPES)
    graph, state = nnx.split(abstract(config))
    wanted = nnx.to_pure_dict(state)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: one, wanted) if mesh is None else Sharding(config, mesh).shardings(wanted)
    target = jax.tree_util.tree_map_with_path(
        lambda path, leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype or kinds[_name(path)].dtype, sharding=place),
        wanted, where)
    with progress("Loading", sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds.values())) as bar:
        weights = _read(folder, lambda: ocp.load(folder / WEIGHTS, target))
        bar.update(bar.total)
    _check_finite(folder, weights)
    if mesh is not None:
        weights = Sharding(config, mesh, decoding=True).filled_up(weights)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree) -> dict:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_finite(source, weights) -> None:
    finite = jax.jit(lambda weights: jax.tree.map(lambda x: jnp.isfinite(x).all(), weights))(weights)
    for name, good in _named(jax.device_get(finite)).items():
        if not good:
            raise CheckpointError(f"{source}: {name} holds values that are not finite, or too large for the type asked "
                                  "for; use float32 or bfloat16, or take an earlier checkpoint")


def _unreadable():
    raise ValueError("what its arrays are cannot be read")  # of which Orbax only writes a log line


def _read(folder: Path, read):
    """Orbax and TensorStore raise many kinds of errors, bare Exception among them, for files that are damaged."""
    try:
        return read()
    except Exception as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged ({first_line(error)}); copy it again, or export it "
                              "anew") from error
