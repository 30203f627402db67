"""The state of a batch being decoded, and how it begins, grows and changes from outside.

    start       ragged prompts into a fresh state   (host arrays -> DecodeState)
    prefill     K/V of a block of prompt tokens     (jitted, one call per block)
    grow        a larger state, when the caches are full
    spread      the K/V of one row into all rows
    put_row     a row of its own into the place of another
    set_active  rows switched off from outside (stop strings)

Prefill never leaves early, and stops before a prompt's last token: every new token, the first
included, is produced by `loop.decode`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sled.decoding.memory import refuse_too_large
from sled.decoding.network import KV, NOWHERE, Build, Network
from sled.decoding.programs import bounded
from sled.decoding.readout import Readout
from sled.errors import SettingError

PREFILL_BLOCK = 512  # tokens per row and call: bounds the attention scores to [B, N, 512, S]
SHARED = 128  # tokens with which all prompts begin, from which on it pays to run them once for all rows


def bucket(n: int, *, least: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, 192, ... that holds `n`: at most half is padding.

    Sizes of arrays are rounded up to it, so that nearby lengths share one compiled program.
    """
    size = least
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Plan(NamedTuple):
    """How the layers are cut, for one policy and fusion. Static.

    exits: the layers after which a token may leave, ascending; the last one is the last layer (E of
        them). Segment s is what lies between exits s - 1 and s.
    fusion_layers: the early layers that the fusion looks at, for each exit.
    block_heads: the layers whose exit head looks back, of those that a decision reads: their K/V are kept.
    buffered_layers: numbers of hidden states (see `readout`) that are kept of tokens that wait for deeper layers: where
        a segment begins, what exits made of their drafts, and early layers that the fusion looks at later.
    window: tokens of a row that may wait, the newest included (P).
    """

    exits: tuple[int, ...]
    fusion_layers: tuple[tuple[int, ...], ...]
    block_heads: tuple[int, ...]
    buffered_layers: tuple[int, ...]
    window: int

    @classmethod
    def of(cls, policy, fusion, network: Network) -> Plan:
        """Raises SettingError for a layer that the model lacks, and where `Readout.early_layers` or the policy does."""
        exits, readout = policy.exits(network.num_layers), Readout(network)
        policy.check(network)
        if policy.verifies and (policy.propagates or len(exits) == 1):
            raise SettingError(f"{type(policy).__name__} verifies its drafts, but has no early exit to draft at, or "
                               "propagates K/V that no verification has seen; give it an exit, and propagates = False")
        fused = exits[-1:] if policy.verifies else exits  # drafts are made without fusion
        looked_at = tuple(readout.early_layers(fusion, top) if top in fused else () for top in exits)
        buffered = {*exits[:-1], *(readout.source(n) for n in exits[:-1] if policy.verifies)}
        for (below, _), layers in zip(itertools.pairwise(exits), looked_at[1:], strict=True):
            buffered |= {readout.source_in_fusion(n) for n in layers if n <= below}
        read = {*map(readout.source, exits), *(readout.source_in_fusion(n) for layers in looked_at for n in layers)}
        return cls(exits, looked_at, tuple(sorted(-n for n in read if n < 0)), tuple(sorted(buffered)), policy.window)

    @property
    def last_exit(self) -> int:
        """The number of the last exit, which is the last layer's."""
        return len(self.exits) - 1

    def bounds(self, s: int) -> tuple[int, int]:
        """Segment s is layers bounds[0] + 1 .. bounds[1]."""
        return (0, *self.exits)[s], self.exits[s]

    def decisive_layers(self, s: int) -> set[int]:
        """Numbers of the hidden states that a decision at exit s may look at."""
        layers = {*self.fusion_layers[s], self.exits[s] - 1, self.exits[s]}
        return layers | {-n for n in layers if n in self.block_heads}


def group(cls):
    """A frozen dataclass that is a jax pytree, with `replace`."""
    cls.replace = dataclasses.replace
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@group
class Text:
    """The tokens of every row, S positions each.

    tokens_BS: token at each position, prompt first. Positions >= length hold nothing of meaning.
    exit_BS: the exit (0 .. E - 1) at which each new token was chosen.
    drafts_BS: how many drafts were verified as the block that begins with this token; -1 where none begins.
    length_B: tokens known, drafts that are still to be verified included.
    prompt_B: length of the prompt. limit_B: length at which the row stops.
    active_B: whether the row still generates. An inactive row computes along and writes nothing.
    keys_B: random key of each row.
    """

    tokens_BS: jax.Array
    exit_BS: jax.Array
    drafts_BS: jax.Array
    length_B: jax.Array
    prompt_B: jax.Array
    limit_B: jax.Array
    active_B: jax.Array
    keys_B: jax.Array

    @property
    def newest_B(self) -> jax.Array:
        """The last known token of each row."""
        return jnp.take_along_axis(self.tokens_BS, self.length_B[:, None] - 1, axis=1)[:, 0]


@group
class Progress:
    """How far the K/V of every row have come.

    kv_len_BE: how many positions have their K/V through each segment. Never increasing along E; the
        positions from kv_len[b, s] to kv_len[b, s - 1] are pending before segment s: with (12, 9, 9), the tokens at
        positions 9, 10 and 11 have left at the first exit, and their states wait in the buffers.
    waiting_B: 0, or the segment that the row's newest token waits for; of a draft that ends its row, the segment
        with which its verification begins.
    waited_B: steps since the row was last able to go on. held_B: all steps in which it was not.
    buffers: for each of `Plan.buffered_layers`, hidden states [B, P, D] of pending tokens, slot = position modulo P.
    """

    kv_len_BE: jax.Array
    waiting_B: jax.Array
    waited_B: jax.Array
    held_B: jax.Array
    buffers: tuple[jax.Array, ...]

    @property
    def complete_B(self) -> jax.Array:
        """Positions with K/V in every layer."""
        return self.kv_len_BE[:, -1]


@group
class DecodeState:
    """Everything the loop carries. Rows are independent: no value of one row depends on another.

    caches: per layer K and V. head_caches: those of block heads by layer, of the positions that its segment has run.
    memory: the policy's own arrays (`Policy.initial_memory`).
    """

    text: Text
    progress: Progress
    caches: list[KV]
    head_caches: dict[int, KV]
    memory: Any

    @property
    def capacity(self) -> int:
        """S: positions there is room for."""
        return self.text.tokens_BS.shape[1]


def start(build: Build, params: Any, prompts: list[np.ndarray], limits: list[int], seeds: list[int], *,
          capacity: int, plan: Plan, memory: Any = ()) -> DecodeState:
    """A state with the prompts' tokens and K/V, ready to decode.

    prompts: token ids of each row, at least one each; limits: total length at which a row stops
    (a limit not above the prompt's length makes the row inactive); seeds: one per row; memory: the policy's, to begin
    with.
    """
    refuse_too_large(build, plan.window, len(plan.buffered_layers), plan.block_heads, rows=len(prompts),
                     capacity=capacity)
    longest = max(len(p) for p in prompts)
    length_B = np.array([len(p) for p in prompts], np.int32)
    state = empty_state(build, params, token_rows(prompts, capacity), length_B, np.asarray(limits, np.int32),
                        np.asarray(seeds, np.uint32), memory, plan=plan)
    begin = shared_length(prompts)
    if len(prompts) > 1 and begin >= SHARED:
        row = start(build, params, [prompts[0][:begin + 1]], [0], [0], capacity=capacity, plan=plan)
        state = spread(build, state, row)
    else:
        begin = 0
    block = bucket(min(longest - 1 - begin, PREFILL_BLOCK))
    for at in range(begin, longest - 1, block):
        state = prefill(build, params, state, np.int32(at), block=block)
    return state


def token_rows(prompts: list[np.ndarray], capacity: int) -> np.ndarray:
    """The prompts' tokens [B, S], zeros behind them."""
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[:len(prompt)] = prompt
    return tokens_BS


def shared_length(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with, each one's last left out."""
    most = min(len(p) for p in prompts) - 1
    alike_T = np.all([p[:most] == prompts[0][:most] for p in prompts], axis=0)
    return most if alike_T.all() else int(alike_T.argmin())


@bounded(rows=("tokens_BS", "length_B", "limit_B", "seeds_B", "memory"), static=("plan",))
def empty_state(build: Build, params, tokens_BS, length_B, limit_B, seeds_B, memory, *, plan: Plan) -> DecodeState:
    """A state with these tokens and no K/V yet; the arguments are those of `start`."""
    network = build(params)
    batch, slots = tokens_BS.shape
    zero_B = jnp.zeros(batch, jnp.int32)
    h_BD = network.embed(tokens_BS[:, :1], tokens_BS[:, :1])[:, 0]  # for its width and type
    return DecodeState(
        text=new_text(tokens_BS, length_B, limit_B, seeds_B),
        progress=Progress(kv_len_BE=jnp.tile(length_B[:, None] - 1, (1, len(plan.exits))), waiting_B=zero_B,
                          waited_B=zero_B, held_B=zero_B, buffers=tuple(
                              jnp.zeros((batch, plan.window, h_BD.shape[-1]), h_BD.dtype)
                              for _ in plan.buffered_layers)),
        memory=memory, **_empty_caches(network, plan, batch, slots))


def new_text(tokens_BS, length_B, limit_B, seeds_B) -> Text:
    """Prompts of which nothing was continued yet; the arguments are those of `start`."""
    return Text(tokens_BS=tokens_BS, exit_BS=jnp.zeros(tokens_BS.shape, jnp.int8),
                drafts_BS=jnp.full(tokens_BS.shape, -1, jnp.int32), length_B=length_B, prompt_B=length_B,
                limit_B=limit_B, active_B=length_B < limit_B, keys_B=jax.vmap(jax.random.key)(seeds_B))


def _empty_caches(network: Network, plan: Plan, batch: int, slots: int) -> dict[str, Any]:
    return dict(caches=network.empty_caches(batch, slots, plan.window - 1),
                head_caches=Readout(network).empty_head_caches(plan.block_heads, batch, slots, plan.window - 1))


@bounded(rows=("state",), static=("block",), donate="state")
def prefill(build: Build, params, state: DecodeState, begin, *, block: int) -> DecodeState:
    """K/V of the tokens at positions begin .. begin + block - 1, as far as they precede a row's last."""
    network = build(params)
    positions_T = begin + jnp.arange(block)
    tokens_BT = jnp.take(state.text.tokens_BS, positions_T, axis=1, mode="clip")
    positions_BT = jnp.where(positions_T < state.text.length_B[:, None] - 1, positions_T, NOWHERE)
    h_BTD = network.embed(tokens_BT, positions_BT)
    _, caches, head_caches = Readout(network).run_layers(h_BTD, positions_BT, state.caches, state.head_caches, 0,
                                                         network.num_layers)
    return state.replace(caches=caches, head_caches=head_caches)


@bounded(rows=("state",), donate="state")
def spread(build: Build, state: DecodeState, row: DecodeState) -> DecodeState:
    """The state with the K/V of the one row of `row` in each of its rows."""
    return state.replace(**{name: jax.tree.map(lambda one, rows: jnp.broadcast_to(one, rows.shape), getattr(row, name),
                                               getattr(state, name)) for name in ("caches", "head_caches")})


@bounded(rows=("state", "active_B"), donate="state")
def set_active(build: Build, state: DecodeState, active_B) -> DecodeState:
    """The same state with other rows active."""
    return state.replace(text=state.text.replace(active_B=active_B))


@bounded(rows=("state", "here_B"), donate="state")
def put_row(build: Build, state: DecodeState, row: DecodeState, here_B) -> DecodeState:
    """The state with the row that is marked in `here_B` replaced by the one row of `row`, which has the same plan and
    capacity. None is marked where another group of devices has it."""
    at, marked = here_B.argmax(), here_B.any()
    return jax.tree.map(lambda rows, one: jax.lax.dynamic_update_index_in_dim(
        rows, jnp.where(marked, one[0], rows[at]), at, axis=0), state, row)


@bounded(rows=("state",), static=("plan", "capacity"))
def grow(build: Build, state: DecodeState, *, plan: Plan, capacity: int) -> DecodeState:
    """The same state with room for `capacity` positions: axis S of the text's arrays, as their names have it, and the
    slots of the caches, as the network has them for so many."""
    def wider(x, shape):
        return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])

    batch, _ = state.text.tokens_BS.shape
    larger = jax.eval_shape(lambda: _empty_caches(build.outline, plan, batch, capacity))
    by_position = [field.name for field in dataclasses.fields(Text) if field.name.endswith("_BS")]
    text = state.text.replace(**{name: wider(getattr(state.text, name), (batch, capacity)) for name in by_position})
    return state.replace(text=text, **{name: jax.tree.map(lambda x, new: wider(x, new.shape), getattr(state, name), new)
                                       for name, new in larger.items()})
