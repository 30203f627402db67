"""The final layer's two best tokens, from which a fusion may prove that early layers cannot change the choice."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sled.fusion.partial import max_and_index

# Of the largest logit. A sum of n float32 terms of length up to s is off by about sqrt(n) 2^-24 s, n 2^-24 s at worst.
# A logit sums D products, which may be 16 times as long as it; a probability sums V terms. So for sums of up to 2^18
# terms 2^-10 is beyond what rounding adds, and at worst (all errors alike) still for D and V up to 1,024.
ROUNDING = 2.0**-10


class BestTwo(NamedTuple):
    """Of each row [B]: the largest and second largest logit, the probability of the first token, and what rounding may
    add to a logit, or to a difference of two, that is computed elsewhere."""

    first_B: jax.Array
    second_B: jax.Array
    probability_B: jax.Array
    rounding_B: jax.Array


def best_two(final_BV, temperature_B1=1.0) -> BestTwo:
    """Of logits [B, V]; the probability is that of softmax(logits / temperature)."""
    first_B1, at_B1 = max_and_index(final_BV)
    others = jnp.arange(final_BV.shape[-1]) != at_B1
    second_B = jnp.where(others, final_BV, jnp.finfo(final_BV.dtype).min).max(-1)
    probability_B = 1 / jnp.exp((final_BV - first_B1) / temperature_B1).sum(-1)
    return BestTwo(first_B1[:, 0], second_B, probability_B, ROUNDING * jnp.abs(final_BV).max(-1))
