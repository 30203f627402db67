"""Running the layers: the first segment on every row's newest token, a deeper one on the tokens that wait for it.

    first_segment    the newest token of every row that can go on, to the first exit
    run_block        a deeper segment over the pending tokens of all rows, as one block
    propagate_kv     K/V of tokens that left, made from their exit's hidden state (CALM)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sled.decoding.network import NOWHERE
from sled.decoding.readout import Readout
from sled.decoding.sampling import Sampling
from sled.decoding.state import DecodeState, Plan


class Context(NamedTuple):
    """All that one call of `decode` works with, and predicates of a state under it.

    key_data_BS: see `sled.decoding.sampling.position_keys`. pause_len_B: known tokens at which a row pauses or stops. A
    pause never cuts a draft: where pauses fall, and so how a caller cuts a text into calls, changes no draft.
    prepared: see `Policy.prepare`.
    """

    readout: Readout
    plan: Plan
    policy: Any
    fusion: Any
    sampling: Sampling
    key_data_BS: jax.Array
    stop_ids: jax.Array
    pause_len_B: jax.Array
    prepared: Any

    def known_B(self, state: DecodeState):
        """Tokens that will not change any more: drafts are left out until they are verified."""
        return state.progress.complete_B + 1 if self.policy.verifies else state.text.length_B

    def unfinished_B(self, state: DecodeState):
        """Rows that have not come to their end, nor to where they pause."""
        return state.text.active_B & (self.known_B(state) < self.pause_len_B)

    def deferred_B(self, state: DecodeState):
        """Tokens of a row, its newest one aside, that lack K/V in some layer."""
        return state.text.length_B - 1 - state.progress.complete_B

    def end_len_B(self, state: DecodeState):
        """The length at which a row emits no more, drafts included."""
        return state.text.limit_B if self.policy.verifies else self.pause_len_B

    def free_B(self, state: DecodeState):
        """Rows that wait for no segment, and may go on."""
        unbound_B = (state.progress.waiting_B == 0) & (state.text.length_B < self.end_len_B(state))
        return self.unfinished_B(state) & unbound_B

    def ready_B(self, state: DecodeState):
        """Rows whose newest token the first segment can take: free ones with room for another pending token."""
        return self.free_B(state) & (self.deferred_B(state) < self.plan.window)

    def ends_B(self, token_B):
        """Whether a token ends its row."""
        return jnp.any(token_B[:, None] == self.stop_ids, axis=1)


@jax.named_scope("first_segment")
def first_segment(run: Context, state: DecodeState, ready_B):
    """The newest token of rows `ready_B` through the first segment.

    Returns the state, and the tokens' hidden states [B, D] by number.
    """
    readout, text, top = run.readout, state.text, run.plan.exits[0]
    position_B1 = jnp.where(ready_B, text.length_B - 1, NOWHERE)[:, None]
    h0 = readout.network.embed(text.newest_B[:, None], position_B1)
    states, *caches = readout.run_layers(h0, position_B1, state.caches[:top], state.head_caches, 0, top)
    states[0] = h0
    state = _ran(run, state, 0, states, position_B1, *caches, jnp.where(
        ready_B, text.length_B, state.progress.kv_len_BE[:, 0]))
    return state, {n: h[:, 0] for n, h in states.items()}


@jax.named_scope("deeper_segment")
def run_block(run: Context, state: DecodeState, s: int, size: int, rows_B):
    """Segment s over the pending tokens of rows `rows_B`, at most `size` of each.

    Returns the state, the tokens' hidden states [B, size, D] by number, and their positions [B, size], NOWHERE
    where there is no token. In the last segment of a policy that verifies, the K/V length is left to `verify`.
    """
    plan, progress = run.plan, state.progress
    below, top = plan.bounds(s)
    first_B, end_B = progress.kv_len_BE[:, s], progress.kv_len_BE[:, s - 1]
    position_BT = first_B[:, None] + jnp.arange(size)
    slot_BT = position_BT % plan.window
    states = {n: jnp.take_along_axis(buffer_BPD, slot_BT[:, :, None], axis=1)
              for n, buffer_BPD in zip(plan.buffered_layers, progress.buffers, strict=True) if abs(n) <= below}
    position_BT = jnp.where(rows_B[:, None] & (position_BT < end_B[:, None]), position_BT, NOWHERE)
    new, *caches = run.readout.run_layers(states[below], position_BT, state.caches[below:top], state.head_caches, below,
                                          top)
    states |= new
    verified_later = run.policy.verifies and s == plan.last_exit
    kv_len_B = first_B if verified_later else jnp.where(rows_B, jnp.minimum(end_B, first_B + size), first_B)
    return _ran(run, state, s, states, position_BT, *caches, kv_len_B), states, position_BT


def _ran(run: Context, state: DecodeState, s: int, states, position_BT, caches, head_caches, kv_len_B) -> DecodeState:
    """The state after segment s ran: its caches, its K/V lengths, and hidden states for deeper segments."""
    plan, progress = run.plan, state.progress
    below, top = plan.bounds(s)
    buffers = [
        _buffered(buffer_BPD, states[n], position_BT) if n in states and (abs(n) > below or s == 0)
        else buffer_BPD for n, buffer_BPD in zip(plan.buffered_layers, progress.buffers, strict=True)]
    progress = progress.replace(buffers=tuple(buffers), kv_len_BE=progress.kv_len_BE.at[:, s].set(kv_len_B))
    return state.replace(progress=progress, caches=[*state.caches[:below], *caches, *state.caches[top:]],
                         head_caches=head_caches)


def _buffered(buffer_BPD, h_BTD, position_BT):
    """The buffer with the hidden states of consecutive positions in their slots; a token at NOWHERE writes nothing.

    Every slot looks up what it gets: on a CPU a scatter runs as a loop of its own.
    """
    window, size = buffer_BPD.shape[1], h_BTD.shape[1]
    at_BP = (jnp.arange(window) - position_BT[:, :1]) % window  # the place in the block that belongs into each slot
    at_BP = jnp.minimum(at_BP, size - 1)
    position_BP = jnp.take_along_axis(position_BT, at_BP, axis=1)
    mine_BP = (position_BP >= 0) & (position_BP % window == jnp.arange(window))
    h_BPD = jnp.take_along_axis(h_BTD, at_BP[:, :, None], axis=1)
    return jnp.where(mine_BP[:, :, None], h_BPD, buffer_BPD)


@jax.named_scope("propagate_kv")
def propagate_kv(run: Context, state: DecodeState, s: int, leaves_B, h_BD) -> DecodeState:
    """K/V of tokens that leave at exit s: every deeper layer and head takes the exit's hidden state as its input."""
    readout, top, last = run.readout, run.plan.exits[s], run.plan.exits[-1]

    def write(state: DecodeState) -> DecodeState:
        length_B, progress = state.text.length_B, state.progress
        position_B1 = jnp.where(leaves_B, length_B - 1, NOWHERE)[:, None]
        caches = readout.network.write_kv(h_BD[:, None], position_B1, state.caches[top:], top, last)
        heads = {n: readout.block_head(n).run(h_BD[:, None], position_B1, kv)[1] if n > top else kv
                 for n, kv in state.head_caches.items()}
        deeper_E = jnp.arange(len(run.plan.exits)) > s
        kv_len_BE = jnp.where(leaves_B[:, None] & deeper_E, length_B[:, None], progress.kv_len_BE)
        return state.replace(progress=progress.replace(kv_len_BE=kv_len_BE), caches=[*state.caches[:top], *caches],
                             head_caches=heads)

    return run_if(leaves_B.any(), write, state)


def run_if(condition, f, state):
    """f(state) if the condition holds, else the state.

    A loop of at most one round: XLA updates a loop's arrays in place, where it copies the caches through
    the branch of a conditional that leaves them alone (measured: 12 copies a token, half of its time).
    """
    return jax.lax.while_loop(lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), f(carry[1])),
                              (condition, state))[1]
