"""Mixtral: Mistral with a mixture of experts in every layer."""

from sled.models.config import DecoderConfig, Experts
from sled.models.families.family import (
    MODULES,
    Family,
    Fields,
    check_layer_kinds,
    read_shape,
    take_either,
    write_shape,
)
from sled.models.families.rope import read_rope, write_rope

EXPERT = "model.layers.#.block_sparse_moe.experts.*"


def _read(f: Fields) -> dict:
    shape = read_shape(f, max_positions=131_072, kv_heads=8, bos=(1,), eos=(2,), eps=1e-5)
    windows = (f.take("sliding_window", int, None, null=True),) * shape["num_layers"]
    check_layer_kinds(f, windows, f"the layers of a mixtral model all have the same window, {windows[0]}")
    experts = Experts(count=take_either(f, "num_local_experts", "num_experts", 8),
                      chosen=f.take("num_experts_per_tok", int, 2), width=shape["mlp_width"],
                      balance=f.take("router_aux_loss_coef", float, 0.001))
    return dict(shape, rope=read_rope(f, shape["max_positions"], 1_000_000.0), windows=windows, experts=experts)


def _write(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), "sliding_window": c.windows[0],
            "num_local_experts": c.experts.count, "num_experts_per_tok": c.experts.chosen,
            "router_aux_loss_coef": c.experts.balance}


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read, _write, {
    **MODULES,
    "layers.#.mlp.router": "model.layers.#.block_sparse_moe.gate",
    "layers.#.mlp.gate": f"{EXPERT}.w1",
    "layers.#.mlp.up": f"{EXPERT}.w3",
    "layers.#.mlp.down": f"{EXPERT}.w2",
})
