"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from sled.models.config import DecoderConfig, Experts
from sled.models.families.family import Family, Fields, check_layer_kinds, read_shape, take_either, write_shape
from sled.models.families.qwen import QWEN3
from sled.models.families.rope import read_rope, write_rope

EXPERT = "model.layers.#.mlp.experts.*"


def _read(f: Fields) -> dict:
    shape = read_shape(f, max_positions=32_768, kv_heads=4)
    used = f.take("use_sliding_window", bool, False)
    window = f.take("sliding_window", int, 4096, null=True)
    windows = (window if used else None,) * shape["num_layers"]
    check_layer_kinds(f, windows, f"the layers of a qwen3_moe model all have the same window, {windows[0]}")
    for name, kind, value in (("decoder_sparse_step", int, 1), ("mlp_only_layers", list, [])):
        if (given := f.take(name, kind, value)) != value:
            raise f.refused(name, given, f"only {value!r}, experts in every layer, is supported; use another model")
    bias = f.take("attention_bias", bool, False)
    experts = Experts(count=take_either(f, "num_experts", "num_local_experts", 128),
                      chosen=f.take("num_experts_per_tok", int, 8), width=f.take("moe_intermediate_size", int, 768),
                      normalised=f.take("norm_topk_prob", bool, False),
                      balance=f.take("router_aux_loss_coef", float, 0.001))
    return dict(shape, rope=read_rope(f, shape["max_positions"]), windows=windows, qk_norm="head", qkv_bias=bias,
                out_bias=bias, experts=experts)


def _write(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), "attention_bias": c.qkv_bias,
            "use_sliding_window": c.windows[0] is not None, "sliding_window": c.windows[0],
            "num_experts": c.experts.count, "num_experts_per_tok": c.experts.chosen,
            "moe_intermediate_size": c.experts.width, "norm_topk_prob": c.experts.normalised,
            "router_aux_loss_coef": c.experts.balance, "decoder_sparse_step": 1, "mlp_only_layers": []}


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read, _write, {
    **QWEN3.modules,
    "layers.#.mlp.router": "model.layers.#.mlp.gate",
    "layers.#.mlp.gate": f"{EXPERT}.gate_proj",
    "layers.#.mlp.up": f"{EXPERT}.up_proj",
    "layers.#.mlp.down": f"{EXPERT}.down_proj",
})
