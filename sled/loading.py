"""`sled.load`: the bundled model, a Hugging Face or Orbax folder, or a hub id, ready to decode."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from sled.decoding.memory import naming_shortage
from sled.errors import SettingError
from sled.lm import LM
from sled.models import Decoder, load_folder, load_orbax
from sled.models.config import WEIGHT_TYPES
from sled.models.generation import read_generation
from sled.models.hub import folder_of
from sled.models.orbax import is_orbax
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.stages import load_staged
from sled.settings.rules import Flag, Instance, OneOf, OrNone
from sled.settings.unknown import naming_unknown
from sled.text.tokenizer import Tokenizer

MESH = Instance(Mesh, traced=False, hint="give sled.Mesh(data=..., tensor=...), or sled.Mesh(fsdp=1, stage=...)")
DTYPES = {name: getattr(jnp, name) for name in WEIGHT_TYPES}


@naming_unknown
@naming_shortage("the model's weights", 'give dtype="bfloat16", or take a smaller model or another device')
def load(source: str | os.PathLike, *, dtype: str | None = None, revision: str | None = None,
         long_context: bool = False, mesh: Mesh | None = None) -> LM:
    """A language model from `source`.

    source: "demo" (bundled), a Hugging Face folder (config.json and safetensors, tokenizer.json if
        there is to be text), a folder that `sled export --form orbax` wrote, or a hub id such as
        "meta-llama/Llama-3.2-1B" (downloaded once, then taken from the cache).
    dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's on an accelerator and
        takes float32 on a CPU, where narrower types are slower.
    revision: branch, tag or commit of a hub id.
    long_context: of a model that computes positions in one way for short texts and in another for long ones (longrope,
        as Phi-3-mini-128k has it): True takes the way for long ones, for all. Without it texts are short.
    mesh: the devices to split model and work over: `sled.Mesh(data=2, tensor=4)` makes two groups of four. A group
        splits heads, feed-forward width and vocabulary of the weights, which are read straight onto the devices, and
        each group takes rows of a batch of its own. In float32 the tokens are those of one device. None: one device.
        `sled.Mesh(fsdp=1, stage=4)` cuts the layers into stages of a pipeline, over which texts are generated, plainly
        or with early exits (docs/devices.md).

    Raises: CheckpointError, ConfigError, DownloadError, SettingError, TokenizerError.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise SettingError(f"source is {source!r}, but must name a model; give 'demo', a folder or a hub id")
    dtype = OrNone(OneOf(tuple(DTYPES), hint="None takes the checkpoint's, float32 on a CPU"))("dtype", dtype)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    long_context = Flag(hint="True loads a model for its long texts")("long_context", long_context)
    folder = folder_of(source, revision)
    built = None if mesh is None else MESH("mesh", mesh).build_for_decoding()
    model = _read(folder, DTYPES.get(dtype), built)
    model = model.for_long_context() if long_context else model
    return LM(model, Tokenizer.from_folder(folder), name=str(source), generation=read_generation(folder), mesh=built)


def _read(folder: Path, dtype, mesh: jax.sharding.Mesh | None) -> Decoder:
    if mesh is not None and mesh.shape["stage"] > 1:
        if is_orbax(folder):
            raise SettingError(f"{folder} is an Orbax export, which is not cut over stages; give a Hugging Face folder "
                               "(sled export --form hf makes one), or load it over tensor and data")
        return load_staged(folder, mesh, dtype=dtype)
    if is_orbax(folder):
        return load_orbax(folder, dtype=dtype, mesh=mesh)
    return load_folder(folder, dtype=dtype) if mesh is None else load_onto(folder, mesh, dtype=dtype, stacked=False)
