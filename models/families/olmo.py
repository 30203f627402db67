"""OLMo 2: Llama with norms after attention and MLP instead of before, and norms of whole queries and keys."""

from sled.models.config import DecoderConfig
from sled.models.families.family import MODULES, Family, Fields, check_layer_kinds, read_shape, write_shape
from sled.models.families.rope import read_rope, write_rope


def _read(f: Fields) -> dict:
    bias = f.take("attention_bias", bool, False)
    shape = read_shape(f, max_positions=2048, eos=(50_279,), pad=(1,), eps=1e-5)
    check_layer_kinds(f, (None,) * shape["num_layers"], "every layer of an olmo2 model sees all positions")
    return dict(shape, rope=read_rope(f, shape["max_positions"]), norms_at="after", qk_norm="whole", qkv_bias=bias,
                out_bias=bias)


def _write(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), "attention_bias": c.qkv_bias}


OLMO_2 = Family("olmo2", "Olmo2ForCausalLM", _read, _write, {
    **MODULES,  # without the norms before, which it has none of
    "layers.#.attention.q_norm": "model.layers.#.self_attn.q_norm",
    "layers.#.attention.k_norm": "model.layers.#.self_attn.k_norm",
    "layers.#.attention_post_norm": "model.layers.#.post_attention_layernorm",
    "layers.#.mlp_post_norm": "model.layers.#.post_feedforward_layernorm",
})
