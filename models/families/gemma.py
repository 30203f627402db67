"""Gemma 1, 2 and 3 (text): scaled embeddings, norms times 1 + w, a GELU gate.

From 2 on norms around both parts, soft-caps, and layers that see a window; in 3 norms of queries and keys, and rotary
positions of their own for those layers.
"""

from sled.models.config import DecoderConfig
from sled.models.families.family import (
    MODULES,
    Family,
    Fields,
    check_layer_kinds,
    read_shape,
    read_windows,
    write_shape,
    write_windows,
)
from sled.models.families.rope import read_rope, read_ropes, write_rope, write_ropes

IDS = dict(bos=(2,), eos=(1,), pad=(0,), tied=True)  # of files that do not say
TANH = "gelu_pytorch_tanh"
SIZES_3 = dict(vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
               num_attention_heads=8)  # which the files of multimodal models leave out
AROUND = {
    **MODULES,
    "layers.#.attention_post_norm": "model.layers.#.post_attention_layernorm",
    "layers.#.mlp_norm": "model.layers.#.pre_feedforward_layernorm",
    "layers.#.mlp_post_norm": "model.layers.#.post_feedforward_layernorm",
}
QK_NORMS = {"layers.#.attention.q_norm": "model.layers.#.self_attn.q_norm",
            "layers.#.attention.k_norm": "model.layers.#.self_attn.k_norm"}


def _common(f: Fields, shape: dict) -> dict:
    """What all Gemmas have."""
    bias = f.take("attention_bias", bool, False)
    return dict(shape, norm="rms_plus_one", embedding_scale=shape["width"] ** 0.5, qkv_bias=bias, out_bias=bias)


def _read_gemma(f: Fields) -> dict:
    shape = read_shape(f, max_positions=8192, kv_heads=16, head_dim=256, activation=("hidden_act", TANH), **IDS)
    f.take("hidden_activation", str, None)  # of some versions' files, and always the tanh
    check_layer_kinds(f, (None,) * shape["num_layers"], "every layer of a gemma model sees all positions")
    # Released files say "gelu" and mean the tanh, as transformers reads them.
    return dict(_common(f, shape), rope=read_rope(f, shape["max_positions"]),
                activation=TANH if shape["activation"] == "gelu" else shape["activation"])


def _write_gemma(c: DecoderConfig) -> dict:
    return {**write_shape(c), **write_rope(c.rope), "hidden_activation": c.activation, "attention_bias": c.qkv_bias}


def _around(f: Fields, *, kv_heads: int, max_positions: int, every: int, caps: tuple[float | None, float | None],
            absent: dict | None = None) -> dict:
    """What Gemma 2 and 3 have. every: how many layers it is from one that sees all positions to the next."""
    shape = read_shape(f, max_positions=max_positions, kv_heads=kv_heads, head_dim=256,
                       activation=("hidden_activation", TANH), absent=absent, **IDS)
    f.take("hidden_act", str, None)  # of released files, beside the field that the class reads
    attention_cap, logit_cap = (f.take(f"{name}_logit_softcapping", float, cap, null=True)
                                for name, cap in zip(("attn", "final"), caps, strict=True))
    return dict(_common(f, shape), norms_at="around", attention_cap=attention_cap, logit_cap=logit_cap,
                query_scale=float(f.take("query_pre_attn_scalar", float, 256.0)) ** -0.5,
                windows=read_windows(f, shape["num_layers"], every=every))


def _write_around(c: DecoderConfig) -> dict:
    return {**write_shape(c, "hidden_activation"), **write_windows(c), "attention_bias": c.qkv_bias,
            "attn_logit_softcapping": c.attention_cap, "final_logit_softcapping": c.logit_cap,
            "query_pre_attn_scalar": _whole(c.query_scale ** -2)}


def _whole(number: float) -> float:
    """The whole number that this one is but for rounding: transformers takes no fraction here."""
    return round(number) if abs(number - round(number)) < 1e-6 * number else number


def _read_gemma2(f: Fields) -> dict:
    read = _around(f, kv_heads=4, max_positions=8192, every=2, caps=(50.0, 30.0))
    return dict(read, rope=read_rope(f, read["max_positions"]))


def _write_gemma2(c: DecoderConfig) -> dict:
    return {**_write_around(c), **write_rope(c.rope)}


def _read_gemma3(f: Fields) -> dict:
    every = f.take("sliding_window_pattern", int, f.take("_sliding_window_pattern", int, 6))
    read = _around(f, kv_heads=4, max_positions=131_072, every=every, caps=(None, None), absent=SIZES_3)
    rope, local = read_ropes(f, read["max_positions"], 1_000_000.0, 10_000.0)
    # transformers' class reads this cap and does not apply it.
    return dict(read, attention_cap=None, qk_norm="head", rope=rope, local_rope=local)


def _write_gemma3(c: DecoderConfig) -> dict:
    return {**_write_around(c), **write_ropes(c.rope, c.local_rope)}


GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma)
GEMMA_2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, AROUND)
GEMMA_3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, {**AROUND, **QK_NORMS},
    other_bases={"language_model.model.": "model.", "language_model.lm_head": "lm_head",
                 "model.language_model.": "model."},
    left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."))
