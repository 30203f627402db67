"""A whole generation as one function of arrays: prompts in, tokens out, no host in between.

`Generation` looks in between chunks and lets its caches grow; an exported program can do neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sled.decoding import loop, state
from sled.decoding.batch import NO_LIMIT
from sled.decoding.network import Build
from sled.decoding.sampling import Sampling
from sled.exits.schedule import Timing

PREFILL_BLOCK = 64  # prompt tokens per row and round; the room is not known beforehand, so no longer than a short one


class Generated(NamedTuple):
    """tokens_BS: prompt and text. length_B: of both. layers_BS: the layer that chose each token of the text."""

    tokens_BS: jax.Array
    length_B: jax.Array
    layers_BS: jax.Array


def generate(build: Build, params: Any, *, policy, timing: Timing, fusion, sampling: Sampling, tokens_BS, length_B,
             new_B, seeds_B, stop_ids, max_positions: int) -> Generated:
    """Continues each row's prompt until a token of `stop_ids` [K] (it included), for `new_B` tokens, or to the end of
    the row's S positions or of the model's `max_positions`.

    tokens_BS: prompts, from the left; length_B: of each, 1 .. S. A row with `new_B` 0 gets nothing. The same tokens as
    `Generation` gives, in float32; B and S may be symbolic dimensions (`jax.export`).
    """
    room = tokens_BS.shape[1]
    plan = state.Plan.of(policy, fusion, build.outline)
    limit_B = jnp.minimum(length_B + jnp.minimum(new_B, room), jnp.minimum(room, max_positions))
    begun = state.empty_state(build, params, tokens_BS, length_B, limit_B, seeds_B,
                              policy.initial_memory(tokens_BS.shape[0]), plan=plan)

    def fill(carry):
        at, filled = carry
        return at + PREFILL_BLOCK, state.prefill(build, params, filled, at, block=PREFILL_BLOCK)

    begins = (jnp.int32(0), begun)
    _, filled = jax.lax.while_loop(lambda carry: carry[0] < length_B.max() - 1, fill, begins)
    done = loop.decode(build, params, filled, policy, timing, fusion, sampling, stop_ids, limit_B, jnp.int32(NO_LIMIT),
                       jnp.bool_(False))
    known_B = done.progress.complete_B + 1 if policy.verifies else done.text.length_B
    layers_BS = jnp.asarray(plan.exits, jnp.int32)[done.text.exit_BS]
    return Generated(done.text.tokens_BS, known_B, layers_BS)
