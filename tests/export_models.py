"""A tiny random model to be exported, and prompts for it."""


import jax
import numpy as np
from flax import nnx

from sled.models import Decoder, DecoderConfig, ExitHeads

CONFIG = DecoderConfig(family="llama", vocab_size=47, width=16, mlp_width=24, num_layers=3, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=96, eos_ids=(5,), tied_head=True)
HEADS = ExitHeads((1, 2), "affine")
PROMPTS = [np.random.default_rng(7).integers(6, 47, size=n).tolist() for n in (1, 70, 9)]  # 70 is over a prefill block


def random_decoder(heads=None, seed=1):
    decoder = Decoder.init(CONFIG, rngs=nnx.Rngs(seed))
    nnx.update(decoder, jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, nnx.state(decoder)))
    return decoder if heads is None else decoder.with_exit_heads(heads, rngs=nnx.Rngs(2))


def same(one: Decoder, other: Decoder) -> bool:
    pairs = zip(*(jax.tree.leaves(nnx.state(model)) for model in (one, other)), strict=True)
    return one.config == other.config and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
