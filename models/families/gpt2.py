"""GPT-2 and what is built alike: learned positions, LayerNorm, biases everywhere, an MLP without a gate."""

from sled.errors import ConfigError
from sled.models.config import MOST_LAYERS, DecoderConfig
from sled.models.families.family import Family, Fields, read_activation, read_ids, take_either, write_ids

ATTENTION, MLP = "layers.#.attention", "layers.#.mlp"
MODULES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.#.attention_norm": "transformer.h.#.ln_1",
    **{f"{ATTENTION}.{one}": "transformer.h.#.attn.c_attn" for one in ("q", "k", "v")},
    f"{ATTENTION}.o": "transformer.h.#.attn.c_proj",
    "layers.#.mlp_norm": "transformer.h.#.ln_2",
    f"{MLP}.up": "transformer.h.#.mlp.c_fc",
    f"{MLP}.down": "transformer.h.#.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
TANH = "gelu_pytorch_tanh", "gelu_new"  # ours, and as files of this family have it


def _read(f: Fields) -> dict:
    width = take_either(f, "n_embd", "hidden_size", 768)
    heads = take_either(f, "n_head", "num_attention_heads", 12)
    layers = take_either(f, "n_layer", "num_hidden_layers", 12)
    if heads < 1 or width % heads:
        raise ConfigError(f"{f.source}: n_embd {width} is not a multiple of n_head {heads}; correct the file")
    if layers > MOST_LAYERS:
        raise f.refused("n_layer", layers, f"it can be at most {MOST_LAYERS:,}; correct the file")
    head_dim = f.take("head_dim", int, width // heads)
    if head_dim * heads != width:
        raise f.refused("head_dim", head_dim, f"it is {width // heads}, n_embd / n_head, in this family; remove it")
    f.take("n_ctx", int, None)  # of versions long gone; as many as positions
    vocabulary = f.take("vocab_size", int, 50_257)
    return dict(
        vocab_size=vocabulary,
        width=width,
        mlp_width=f.take("n_inner", int, 4 * width),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_positions=take_either(f, "n_positions", "max_position_embeddings", 1024),
        rope=None,
        norm="layer",
        norm_eps=float(f.take("layer_norm_epsilon", float, 1e-5)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation=read_activation(f, "activation_function", TANH[1]),
        gated=False,
        tied_head=f.take("tie_word_embeddings", bool, True),
        **read_ids(f, vocabulary, bos=(50_256,), eos=(50_256,)),
    )


def _write(c: DecoderConfig) -> dict:
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.width,
        "n_inner": None if c.mlp_width == 4 * c.width else c.mlp_width,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_positions": c.max_positions,
        "n_ctx": c.max_positions,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": TANH[1] if c.activation == TANH[0] else c.activation,
        "tie_word_embeddings": c.tied_head,
        **write_ids(c),
    }


GPT_2 = Family(
    "gpt2", "GPT2LMHeadModel", _read, _write, MODULES,
    in_out=frozenset(name for name in MODULES if name.startswith((ATTENTION + ".", MLP + "."))),
    base="transformer.", buffers=(".attn.bias", ".attn.masked_bias"), early_exit=False)
