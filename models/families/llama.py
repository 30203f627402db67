"""Llama 1 to 3.x and the many models that share its architecture."""

from sled.models.config import DecoderConfig
from sled.models.families.family import Family, Fields, read_shape


def _read(f: Fields) -> dict:
    bias = f.take("attention_bias", bool, False)
    return dict(
        read_shape(f, max_positions=2048, bos=(1,), eos=(2,)),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.take("mlp_bias", bool, False),
    )


def _write(c: DecoderConfig) -> dict:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


LLAMA = Family("llama", "LlamaForCausalLM", _read, _write)
