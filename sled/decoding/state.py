"""The state of a batch being decoded, and how it begins, grows and changes from outside.

    start       put ragged prompts into a fresh state   (host arrays -> DecodeState)
    prefill     K/V of a block of prompt tokens         (jitted, one call per block)
    grow        a larger state, when the caches are full
    put_row     a row of its own into the place of another
    set_active  rows switched off from outside (stop strings)

Prefill never leaves early, and stops before a prompt's last token: every new token, the first
included, is produced by `loop.decode`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sled.decoding.buckets import bucket
from sled.decoding.network import KV, Build, Network, fused_layers

PREFILL_BLOCK = 512  # tokens per row and call: bounds the attention scores to [B, N, 512, S]


class Plan(NamedTuple):
    """How the layers are cut, for one policy and fusion. Static.

    exits: the layers after which a token may leave, ascending; the last one is the last layer (E of
        them). Segment s is what lies between exits s - 1 and s.
    kept: hidden states that a deeper segment wants of tokens that wait for it: where it begins, and
        the early layers that the fusion looks at (C of them).
    window: tokens of a row that may wait, the newest included (P).
    """

    exits: tuple[int, ...]
    kept: tuple[int, ...]
    window: int

    @classmethod
    def of(cls, policy, fusion, network: Network) -> Plan:
        """Raises SettingError for a layer that the model does not have, and where `fused_layers` does."""
        exits = policy.exits(network.num_layers)
        fused = exits[-1:] if policy.verifies else exits  # guesses are not
        heard = {top: fused_layers(network, fusion, top) for top in fused}
        kept = set(exits[:-1])
        for below, top in itertools.pairwise(exits):
            kept |= {n for n in heard.get(top, ()) if n <= below}
        return cls(exits, tuple(sorted(kept)), policy.window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts, for the statistics of a result.

    runs_E: how often each segment ran (for the whole batch). drafted_B: guesses judged; accepted_B: of
    them right; rounds_B: verifications; held_B: rounds in which a row stood still, because it waited
    for deeper layers or had no room to defer another token.
    """

    runs_E: jax.Array
    drafted_B: jax.Array
    accepted_B: jax.Array
    rounds_B: jax.Array
    held_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything the loop carries. Rows are independent: no value of one row depends on another.

    tokens_BS: token at each position, prompt first. Positions >= length hold nothing of meaning.
    exit_BS: which exit (0 .. E - 1) each new token was said at.
    length_B: tokens known, guesses that are still to be verified included.
    prompt_B: length of the prompt. limit_B: length at which the row stops.
    active_B: whether the row still generates. An inactive row computes along and writes nothing.
    done_BE: how many positions have their K/V through each segment. Never increasing along E; the
        positions from done[b, s] to done[b, s - 1] are pending before segment s.
    parked_B: 0, or the segment that the row's newest token waits for.
    closing_B: whether a self-speculating row has ended its draft and waits to be verified.
    drafted_B: guesses in the row's present draft.
    waited_B: ticks since the row was last able to go on.
    accepted_BE, judged_BE: guesses seen so far at each exit, right ones and all, older ones fading.
    held_BPCD: hidden states of pending tokens, slot = position modulo P, see `Plan.kept`.
    seen_BV: tokens of the prompt and the text (for the repetition penalty) at positions < done[:, -1].
    keys_B: random key of each row.
    caches: per layer K and V, slot = position.
    """

    tokens_BS: jax.Array
    exit_BS: jax.Array
    length_B: jax.Array
    prompt_B: jax.Array
    limit_B: jax.Array
    active_B: jax.Array
    done_BE: jax.Array
    parked_B: jax.Array
    closing_B: jax.Array
    drafted_B: jax.Array
    waited_B: jax.Array
    accepted_BE: jax.Array
    judged_BE: jax.Array
    held_BPCD: jax.Array
    seen_BV: jax.Array
    keys_B: jax.Array
    caches: list[KV]
    tally: Tally

    @property
    def capacity(self) -> int:
        """S: positions there is room for."""
        return self.tokens_BS.shape[1]

    @property
    def window(self) -> int:
        """P: tokens of a row that may wait for deeper layers."""
        return self.held_BPCD.shape[1]

    @property
    def deep_B(self) -> jax.Array:
        """Positions with K/V in every layer."""
        return self.done_BE[:, -1]


def start(build: Build, params: Any, prompts: list[np.ndarray], limits: list[int], seeds: list[int], *,
          capacity: int, plan: Plan) -> DecodeState:
    """A state with the prompts' tokens and K/V, ready to decode.

    prompts: token ids of each row, at least one each; limits: total length at which a row stops
    (a limit not above the prompt's length makes the row inactive); seeds: one per row.
    """
    longest = max(len(p) for p in prompts)
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[:len(prompt)] = prompt
    length_B = np.array([len(p) for p in prompts], np.int32)
    state = empty_state(build, params, tokens_BS, length_B, np.asarray(limits, np.int32),
                         np.asarray(seeds, np.uint32), plan=plan)
    block = bucket(min(longest - 1, PREFILL_BLOCK))
    for begin in range(0, longest - 1, block):
        state = prefill(build, params, state, np.int32(begin), block=block)
    return state


@functools.partial(jax.jit, static_argnames=("build", "plan"))
def empty_state(build: Build, params, tokens_BS, length_B, limit_B, seeds_B, *, plan: Plan) -> DecodeState:
    """A state with these tokens and no K/V yet; `start` says what the arguments are."""
    network = build(params)
    batch, slots = tokens_BS.shape
    exits = len(plan.exits)
    rows_B1 = jnp.arange(batch)[:, None]
    before_last_BS = jnp.arange(slots) < length_B[:, None] - 1
    seen_BV = jnp.zeros((batch, network.head_weight.shape[0]), bool).at[rows_B1, tokens_BS].max(before_last_BS)
    width_D = network.embed(tokens_BS[:, :1])[:, 0]
    zero_B, none_BE = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, exits))
    return DecodeState(
        tokens_BS=tokens_BS, exit_BS=jnp.zeros((batch, slots), jnp.int8), length_B=length_B, prompt_B=length_B,
        limit_B=limit_B, active_B=length_B < limit_B,
        done_BE=jnp.tile(length_B[:, None] - 1, (1, exits)), parked_B=zero_B, closing_B=zero_B > 0,
        drafted_B=zero_B, waited_B=zero_B, accepted_BE=none_BE, judged_BE=none_BE,
        held_BPCD=jnp.zeros((batch, plan.window, len(plan.kept), width_D.shape[-1]), width_D.dtype),
        seen_BV=seen_BV, keys_B=jax.vmap(jax.random.key)(seeds_B), caches=network.empty_caches(batch, slots),
        tally=Tally(jnp.zeros(exits, jnp.int32), zero_B, zero_B, zero_B, zero_B))


@functools.partial(jax.jit, static_argnames=("build", "block"), donate_argnames="state")
def prefill(build: Build, params, state: DecodeState, begin, *, block: int) -> DecodeState:
    """K/V of the tokens at positions begin .. begin + block - 1, as far as they precede a row's last."""
    network = build(params)
    positions_T = begin + jnp.arange(block)
    tokens_BT = jnp.take(state.tokens_BS, positions_T, axis=1, mode="clip")
    positions_BT = jnp.where(positions_T < state.length_B[:, None] - 1, positions_T, state.capacity)
    _, caches = network.run_layers(network.embed(tokens_BT), positions_BT, state.caches, 0, network.num_layers)
    return dataclasses.replace(state, caches=caches)


@functools.partial(jax.jit, donate_argnames="state")
def set_active(state: DecodeState, active_B) -> DecodeState:
    """The same state with other rows active."""
    return dataclasses.replace(state, active_B=active_B)


@functools.partial(jax.jit, donate_argnames="state")
def put_row(state: DecodeState, row: DecodeState, at) -> DecodeState:
    """The state with row `at` (traced) replaced by the one row of `row`, which has the same plan and capacity."""
    runs_E = state.tally.runs_E  # of the whole batch
    put = lambda rows, one: jax.lax.dynamic_update_index_in_dim(rows, one[0], at, axis=0)  # noqa: E731
    whole = lambda state, runs: dataclasses.replace(state, tally=dataclasses.replace(state.tally, runs_E=runs))  # noqa: E731
    return whole(jax.tree.map(put, whole(state, None), whole(row, None)), runs_E)


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: DecodeState, *, capacity: int) -> DecodeState:
    """The same state with room for `capacity` positions."""
    more = capacity - state.capacity
    wider_BS = lambda x: jnp.pad(x, ((0, 0), (0, more)))  # noqa: E731
    wider_BKSH = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))  # noqa: E731
    return dataclasses.replace(state, tokens_BS=wider_BS(state.tokens_BS), exit_BS=wider_BS(state.exit_BS),
                               caches=jax.tree.map(wider_BKSH, state.caches))
