"""Llama 1 to 3.x and the many models that share its architecture."""

from sled.models.config import DecoderConfig
from sled.models.families.family import Family, Fields, check_layer_kinds, read_shape, write_shape
from sled.models.families.rope import read_rope, write_rope


def _read(f: Fields) -> dict:
    bias = f.take("attention_bias", bool, False)
    shape = read_shape(f, max_positions=2048, bos=(1,), eos=(2,))
    check_layer_kinds(f, (None,) * shape["num_layers"], "every layer of a llama model sees all positions")
    return dict(
        shape,
        rope=read_rope(f, shape["max_positions"]),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.take("mlp_bias", bool, False),
    )


def _write(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), "attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


LLAMA = Family("llama", "LlamaForCausalLM", _read, _write)
