"""Phi-3 and Phi-4: Llama with queries, keys and values in one tensor and gate and up in another; longrope."""

from sled.errors import ConfigError
from sled.models.config import DecoderConfig
from sled.models.families.family import MODULES, Family, Fields, check_layer_kinds, read_shape, write_shape
from sled.models.families.rope import BESIDE, read_rope, write_rope
from sled.models.positions import LongRopeScaling

LONGROPE = {"su": "longrope", "yarn": "longrope"}  # what early files call it


def _read(f: Fields) -> dict:
    shape = read_shape(f, max_positions=4096, bos=(1,), eos=(32_000,), pad=(32_000,), eps=1e-5)
    window = f.take("sliding_window", int, None)
    windows = (window,) * shape["num_layers"]
    check_layer_kinds(f, windows, f"the layers of a phi3 model all have the same window, {window}")
    rope = read_rope(f, shape["max_positions"], original=4096, partial=True, kinds=LONGROPE)
    if rope.scaling is not None and not isinstance(rope.scaling, LongRopeScaling):
        raise ConfigError(f"{f.source}: the rotary positions of a phi3 model are 'default' or 'longrope'; correct "
                          "'rope_scaling'")
    return dict(shape, rope=rope, windows=windows)


def _write(c: DecoderConfig) -> dict:
    """Versions 4.x of transformers take no more than three fields of `rope_scaling`; the others lie beside it."""
    rope, scaling = write_rope(c.rope), c.rope.scaling
    if scaling is not None:
        usual = {"rope_type": "longrope", BESIDE: scaling.original_positions,
                 "factor": c.max_positions / scaling.original_positions}
        rope["rope_scaling"] = {"type": "longrope"} | {
            name: value for name, value in rope["rope_scaling"].items() if usual.get(name) != value}
        rope[BESIDE] = scaling.original_positions
    return {**write_shape(c), **rope, "sliding_window": c.windows[0]}


PHI_3 = Family("phi3", "Phi3ForCausalLM", _read, _write, {
    **MODULES,
    **{f"layers.#.attention.{one}": "model.layers.#.self_attn.qkv_proj" for one in ("q", "k", "v")},
    **{f"layers.#.mlp.{one}": "model.layers.#.mlp.gate_up_proj" for one in ("gate", "up")},
})
