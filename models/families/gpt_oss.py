"""gpt-oss: a mixture of experts with biases and a clamped gate, attention with sinks, windows in every other layer.

Its experts are published in four bits each (see models/mxfp4.py), and written back as plain matrices.
"""

from sled.models.config import DecoderConfig, Experts
from sled.models.families.family import (
    MODULES,
    Family,
    Fields,
    read_shape,
    read_windows,
    take_either,
    write_shape,
    write_windows,
)
from sled.models.families.rope import read_rope, write_rope

EXPERTS = "model.layers.#.mlp.experts"
YARN = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=4096)
GATE_AND_UP = ("layers.#.mlp.gate", "layers.#.mlp.up")


def _read(f: Fields) -> dict:
    shape = read_shape(f, max_positions=131_072, kv_heads=8, head_dim=64, eps=1e-5)
    bias = f.take("attention_bias", bool, True)
    packed = f.take("quantization_config", dict, None)
    if packed is not None and packed.get("quant_method") != "mxfp4":
        raise f.refused("quantization_config", packed, "only 'mxfp4' is read; use the checkpoint before quantisation")
    experts = Experts(count=take_either(f, "num_local_experts", "num_experts", 128),
                      chosen=f.take("num_experts_per_tok", int, 4), width=shape["mlp_width"],
                      balance=f.take("router_aux_loss_coef", float, 0.001),
                      clamp=(f.take("swiglu_alpha", float, 1.702), f.take("swiglu_limit", float, 7.0)))
    return dict(shape, rope=read_rope(f, shape["max_positions"], 150_000.0, absent=YARN), qkv_bias=bias,
                out_bias=bias, mlp_bias=True, sinks=True, experts=experts,
                windows=read_windows(f, shape["num_layers"], every=2, window=128))


def _write(c: DecoderConfig) -> dict:
    slope, limit = c.experts.clamp
    return {**write_shape(c), **write_rope(c.rope), **write_windows(c), "attention_bias": c.qkv_bias,
            "num_local_experts": c.experts.count, "num_experts_per_tok": c.experts.chosen,
            "router_aux_loss_coef": c.experts.balance, "swiglu_alpha": slope, "swiglu_limit": limit}


GPT_OSS = Family(
    "gpt_oss", "GptOssForCausalLM", _read, _write, {
        **{name: other for name, other in MODULES.items() if name not in GATE_AND_UP},
        "layers.#.attention.sinks": "model.layers.#.self_attn.sinks",
        "layers.#.mlp.router": "model.layers.#.mlp.router",
        **{f"{part}.weight": f"{EXPERTS}.gate_up_proj" for part in GATE_AND_UP},
        **{f"{part}.bias": f"{EXPERTS}.gate_up_proj_bias" for part in GATE_AND_UP},
        "layers.#.mlp.down.weight": f"{EXPERTS}.down_proj",
        "layers.#.mlp.down.bias": f"{EXPERTS}.down_proj_bias",
    },
    interleaved=frozenset(f"{part}.{one}" for part in GATE_AND_UP for one in ("weight", "bias")),
    in_out=frozenset(f"layers.#.mlp.{part}.weight" for part in ("gate", "up", "down")),
    early_exit=False)
