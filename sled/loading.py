"""`sled.load`: the bundled model, a Hugging Face or Orbax folder, or a hub id, ready to decode."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from sled.decoding.memory import naming_shortage
from sled.errors import SettingError
from sled.lm import LM
from sled.models import load_folder, load_orbax
from sled.models.config import WEIGHT_TYPES
from sled.models.generation import read_generation
from sled.models.hub import folder_of
from sled.models.orbax import is_orbax
from sled.settings.rules import OneOf, OrNone
from sled.settings.unknown import naming_unknown
from sled.text.tokenizer import Tokenizer

DTYPES = {name: getattr(jnp, name) for name in WEIGHT_TYPES}


@naming_unknown
@naming_shortage("the model's weights", 'give dtype="bfloat16", or take a smaller model or another device')
def load(source: str | os.PathLike, *, dtype: str | None = None, revision: str | None = None) -> LM:
    """A language model from `source`.

    source: "demo" (bundled), a Hugging Face folder (config.json and safetensors, tokenizer.json if
        there is to be text), a folder that `sled export --form orbax` wrote, or a hub id such as
        "meta-llama/Llama-3.2-1B" (downloaded once, then taken from the cache).
    dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's on an accelerator and
        takes float32 on a CPU, where narrower types are slower.
    revision: branch, tag or commit of a hub id.

    Raises: CheckpointError, ConfigError, DownloadError, SettingError, TokenizerError.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise SettingError(f"source is {source!r}, but must name a model; give 'demo', a folder or a hub id")
    dtype = OrNone(OneOf(tuple(DTYPES), hint="None takes the checkpoint's, float32 on a CPU"))("dtype", dtype)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    folder = folder_of(source, revision)
    read = load_orbax if is_orbax(folder) else load_folder
    model = read(folder, dtype=DTYPES.get(dtype))
    return LM(model, Tokenizer.from_folder(folder), name=str(source), generation=read_generation(folder))
