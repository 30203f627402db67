"""Mistral: Llama without biases, every layer behind the same sliding window (v0.1) or none (later)."""

from sled.models.config import DecoderConfig
from sled.models.families.family import Family, Fields, check_layer_kinds, read_shape, write_shape
from sled.models.families.rope import read_rope, write_rope


def _read(f: Fields) -> dict:
    shape = read_shape(f, max_positions=131_072, kv_heads=8, bos=(1,), eos=(2,))
    window = f.take("sliding_window", int, 4096, null=True)
    windows = (window,) * shape["num_layers"]
    check_layer_kinds(f, windows, f"the layers of a mistral model all have the same window, {window}")
    return dict(shape, rope=read_rope(f, shape["max_positions"]), windows=windows)


def _write(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), "sliding_window": c.windows[0]}


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _write)
