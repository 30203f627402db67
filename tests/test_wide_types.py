"""JAX with 64-bit types: integers of other widths and wider settings meet in no branch."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from tiny_lm import CONFIG

import sled
from sled.lm import LM
from sled.models import Decoder
from sled.models.config import Experts


def test_decoding_and_scoring_with_64_bits():
    config = dataclasses.replace(CONFIG, family="mixtral", num_layers=2, windows=None,
                                 experts=Experts(count=4, chosen=2, width=48))
    lm = LM(Decoder.init(config, rngs=nnx.Rngs(0)), name="experts")
    way = dict(fusion=sled.SLED(), max_new_tokens=4, sampling=sled.Sampling(
        temperature=np.array([0.0, 0.9]), top_k=9, repetition_penalty=1.2))
    prompts = [[7, 8, 9], [10]]
    with jax.enable_x64(True):
        wide, scores = lm.generate(prompts, **way), lm.score([7, 8], [[9, 10]])
    assert wide.tokens == lm.generate(prompts, **way).tokens and np.isfinite(scores.totals).all()
