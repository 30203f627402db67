"""Qwen2 / Qwen2.5 (biases on queries, keys, values) and Qwen3 (norms on queries and keys instead)."""

from sled.models.config import DecoderConfig
from sled.models.families.family import (
    MODULES,
    Family,
    Fields,
    read_shape,
    windows_of,
    write_shape,
    write_windows,
)
from sled.models.families.rope import read_rope, write_rope


def _read_windows(f: Fields, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer. Layers slide by `layer_types` where given, otherwise those from `max_window_layers` on.

    `sliding_window` counts only under `use_sliding_window`, as in transformers.
    """
    used = f.take("use_sliding_window", bool, False)
    window = f.take("sliding_window", int, 4096, null=True)
    first = f.take("max_window_layers", int, 28)
    kinds = f.take("layer_types", list, None)
    window = window if used else None
    if kinds is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    return windows_of(f, kinds, window)


def _write_windows(c: DecoderConfig) -> dict:
    sliding = [window is not None for window in c.windows]
    return {
        **write_windows(c),
        "use_sliding_window": any(sliding),
        # Versions of transformers before `layer_types` know only "from this layer on".
        "max_window_layers": sliding.index(True) if any(sliding) else c.num_layers,
    }


def _read_qwen2(f: Fields) -> dict:
    shape = read_shape(f, max_positions=32_768, kv_heads=32)
    return dict(shape, rope=read_rope(f, shape["max_positions"]), qkv_bias=True,
                windows=_read_windows(f, shape["num_layers"]))


def _write_qwen2(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), **_write_windows(c)}


def _read_qwen3(f: Fields) -> dict:
    shape = read_shape(f, max_positions=32_768, kv_heads=32, head_dim=128)
    bias = f.take("attention_bias", bool, False)
    return dict(shape, rope=read_rope(f, shape["max_positions"]), qk_norm="head", qkv_bias=bias, out_bias=bias,
                windows=_read_windows(f, shape["num_layers"]))


def _write_qwen3(c: DecoderConfig) -> dict:
    return {**_write_qwen2(c), "attention_bias": c.qkv_bias}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, {
    **MODULES,
    "layers.#.attention.q_norm": "model.layers.#.self_attn.q_norm",
    "layers.#.attention.k_norm": "model.layers.#.self_attn.k_norm",
})
