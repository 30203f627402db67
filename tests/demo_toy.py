"""A random model with the bundled tokenizer, so small that its programs compile at once."""

import dataclasses
import functools
from pathlib import Path

from flax import nnx

import sled
from sled.lm import LM
from sled.models import Decoder, DecoderConfig
from sled.text.tokenizer import Tokenizer

TWO = DecoderConfig(family="llama", vocab_size=1000, width=16, mlp_width=24, num_layers=2, num_heads=2,
                    num_kv_heads=2, head_dim=8, max_positions=512, eos_ids=(0,), tied_head=True)
THREE = dataclasses.replace(TWO, num_layers=3, windows=TWO.windows[:1] * 3)


@functools.cache
def demo_toy() -> LM:
    """It has the layers of TWO. Do not change it."""
    tokenizer = Tokenizer.from_folder(Path(sled.__file__).parent / "demo" / "model")
    return LM(Decoder.init(TWO, rngs=nnx.Rngs(0)), tokenizer, name="toy")
