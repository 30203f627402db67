"""The decoding loop: one jitted `while_loop` that turns hidden states of all layers into tokens.

    start     put ragged prompts into a fresh state            (host arrays -> DecodeState)
    prefill   K/V of a block of prompt tokens                  (jitted, one call per block)
    decode    tokens, until rows are done or steps are used up (jitted, one call per chunk)
    grow      a larger state, when the caches are full
    set_active  rows switched off from outside (stop strings)

Every token, the first included, is produced by `decode`: prefill stops before a prompt's last
token. So there is one place that fuses layers and one that samples.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sled.decoding.buckets import bucket
from sled.decoding.network import KV, Build, fuse
from sled.decoding.sampling import Sampling, choose, processed_logits

PREFILL_BLOCK = 512  # tokens per row and call: bounds the attention scores to [B, N, 512, S]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything the loop carries. Rows are independent: no value of one row depends on another.

    tokens_BS: token at each position, prompt first. Positions >= length hold nothing of meaning.
    length_B: tokens known. Their K/V lie in the caches but for the last one's, which the next step
        computes.
    limit_B: length at which the row stops.
    active_B: whether the row still generates. An inactive row computes along and writes nothing.
    seen_BV: tokens in the prompt or the text so far (for the repetition penalty).
    keys_B: random key of each row.
    caches: per layer K and V, slot = position.
    """

    tokens_BS: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    active_B: jax.Array
    seen_BV: jax.Array
    keys_B: jax.Array
    caches: list[KV]

    @property
    def capacity(self) -> int:
        """S: positions there is room for."""
        return self.tokens_BS.shape[1]


def start(build: Build, params: Any, prompts: list[np.ndarray], limits: list[int], seeds: list[int], *,
          capacity: int) -> DecodeState:
    """A state with the prompts' tokens and K/V, ready to decode.

    prompts: token ids of each row, at least one each; limits: total length at which a row stops
    (a limit not above the prompt's length makes the row inactive); seeds: one per row.
    """
    longest = max(len(p) for p in prompts)
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[:len(prompt)] = prompt
    length_B = np.array([len(p) for p in prompts], np.int32)
    state = _empty_state(build, params, tokens_BS, length_B, np.asarray(limits, np.int32),
                         np.asarray(seeds, np.uint32))
    block = bucket(min(longest - 1, PREFILL_BLOCK))
    for begin in range(0, longest - 1, block):
        state = prefill(build, params, state, np.int32(begin), block=block)
    return state


@functools.partial(jax.jit, static_argnames="build")
def _empty_state(build: Build, params, tokens_BS, length_B, limit_B, seeds_B) -> DecodeState:
    network = build(params)
    batch, slots = tokens_BS.shape
    rows_B1 = jnp.arange(batch)[:, None]
    known_BS = jnp.arange(slots) < length_B[:, None]
    seen_BV = jnp.zeros((batch, network.head_weight.shape[0]), bool).at[rows_B1, tokens_BS].max(known_BS)
    return DecodeState(
        tokens_BS=tokens_BS, length_B=length_B, limit_B=limit_B, active_B=length_B < limit_B, seen_BV=seen_BV,
        keys_B=jax.vmap(jax.random.key)(seeds_B), caches=network.empty_caches(batch, slots))


@functools.partial(jax.jit, static_argnames=("build", "block"), donate_argnames="state")
def prefill(build: Build, params, state: DecodeState, begin, *, block: int) -> DecodeState:
    """K/V of the tokens at positions begin .. begin + block - 1, as far as they precede a row's last."""
    network = build(params)
    positions_T = begin + jnp.arange(block)
    tokens_BT = jnp.take(state.tokens_BS, positions_T, axis=1, mode="clip")
    positions_BT = jnp.where(positions_T < state.length_B[:, None] - 1, positions_T, state.capacity)
    _, caches = network.run_layers(network.embed(tokens_BT), positions_BT, state.caches, 0, network.num_layers)
    return dataclasses.replace(state, caches=caches)


@functools.partial(jax.jit, static_argnames="build", donate_argnames="state")
def decode(build: Build, params, state: DecodeState, fusion, sampling: Sampling, stop_ids, steps) -> DecodeState:
    """Up to `steps` further tokens for every active row.

    fusion: a strategy of `sled.fusion`; its numbers, like those of `sampling`, `stop_ids` (token
    ids that end a row, the token included) and `steps`, are traced: changing them compiles nothing.
    The caller leaves room: steps <= capacity - the longest active row.
    """
    network = build(params)
    rows_B = jnp.arange(state.tokens_BS.shape[0])

    def step(carry):
        state, taken = carry
        token_B1 = state.tokens_BS[rows_B, state.length_B - 1][:, None]
        position_B1 = jnp.where(state.active_B, state.length_B - 1, state.capacity)[:, None]
        h0 = network.embed(token_B1)
        states, caches = network.run_layers(h0, position_B1, state.caches, 0, network.num_layers)
        fused_BV = fuse(network, fusion, [h[:, 0] for h in (h0, *states)])
        logits_BV = processed_logits(fused_BV, state.seen_BV, sampling)
        next_B = choose(logits_BV, sampling, state.keys_B, state.length_B)
        return _append(state, next_B, stop_ids, caches), taken + 1

    def unfinished(carry):
        state, taken = carry
        return jnp.any(state.active_B) & (taken < steps)

    state, _ = jax.lax.while_loop(unfinished, step, (state, 0))
    return state


def _append(state: DecodeState, next_B, stop_ids, caches) -> DecodeState:
    rows_B = jnp.arange(next_B.shape[0])
    slot_B = jnp.where(state.active_B, state.length_B, state.capacity)
    length_B = state.length_B + state.active_B
    ended_B = jnp.any(next_B[:, None] == stop_ids, axis=1)
    return dataclasses.replace(
        state,
        tokens_BS=state.tokens_BS.at[rows_B, slot_B].set(next_B, mode="drop"),
        length_B=length_B,
        active_B=state.active_B & ~ended_B & (length_B < state.limit_B),
        seen_BV=state.seen_BV.at[rows_B, next_B].max(state.active_B),
        caches=caches)


@functools.partial(jax.jit, donate_argnames="state")
def set_active(state: DecodeState, active_B) -> DecodeState:
    """The same state with other rows active."""
    return dataclasses.replace(state, active_B=active_B)


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: DecodeState, *, capacity: int) -> DecodeState:
    """The same state with room for `capacity` positions."""
    more = capacity - state.capacity
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))  # noqa: E731
    return dataclasses.replace(
        state, tokens_BS=jnp.pad(state.tokens_BS, ((0, 0), (0, more))), caches=jax.tree.map(widen, state.caches))
