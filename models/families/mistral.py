"""Mistral: Llama without biases, every layer behind the same sliding window (v0.1) or none (later)."""

from sled.models.config import DecoderConfig
from sled.models.families.family import Family, Fields, check_layer_kinds, read_shape


def _read(f: Fields) -> dict:
    shape = read_shape(f, max_positions=131_072, kv_heads=8, bos=(1,), eos=(2,))
    window = f.take("sliding_window", int, 4096, null=True)
    windows = (window,) * shape["num_layers"]
    check_layer_kinds(f, windows, f"the layers of a mistral model all have the same window, {window}")
    return dict(shape, windows=windows)


def _write(c: DecoderConfig) -> dict:
    return {"sliding_window": c.windows[0]}


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _write)
