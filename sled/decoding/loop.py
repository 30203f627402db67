"""The decoding loop: one jitted `while_loop` for plain decoding, early exit and self-speculation.

The exits of a policy cut the layers into segments. A step runs the first segment on the newest token of every row that
can go on. At an exit the policy decides: a row leaves, and the exit's logits are those of its next token, or it waits
for the next segment. A deeper segment runs when it is due by the schedule, over all rows' pending tokens as one block:
waiting rows get what they wait for, tokens that left earlier get their exact K/V in passing. Where the policy's tokens
are drafts, the last segment verifies them instead (`verify.py`). At its end the step emits: one choice and one write
for all rows that got logits. Plain decoding is the case of one segment.

Drafts that no exit makes (prompt lookup, a run that skips layers) belong before a step's first segment, which would
then take them as a block; the verification does not ask where the drafts that it finds in the text come from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sled.decoding.need import deciding_logits
from sled.decoding.network import Build
from sled.decoding.programs import bounded
from sled.decoding.readout import Readout
from sled.decoding.sampling import Sampling, choose, position_keys, processed_logits, seen_tokens
from sled.decoding.segments import Context, first_segment, propagate_kv, run_block, run_if
from sled.decoding.state import DecodeState, Plan, Text
from sled.decoding.verify import verify
from sled.exits.policy import ExitView
from sled.exits.schedule import Timing

SHORT = 3


def block_sizes(window: int) -> list[int]:
    """The sizes of the block of pending tokens that a deeper segment takes at once, each of them compiled.

    The largest takes a whole window, as a block's time grows far slower than its length: several blocks of 3 took 1.3
    to 1.5 times as long (demo model, whole calls at batch 8 and 1, one core). Where few tokens leave, one waits mostly
    alone or with one or two others, and short drafts are verified; without a size for these such calls took 1.15 times
    as long.
    """
    return sorted({1, min(SHORT, window), window})


class Emission(NamedTuple):
    """The next token of the rows that get one in this step.

    exit_B: the exit whose logits decide, -1 for rows that get no token; logits_BV: of the exit, before any processor
    (repetition penalty, temperature, truncation), or others that choose the same token (`need.py`).
    verified_B: the token, where a verification has already chosen it; else -1. None where the policy does not verify.
    """

    exit_B: jax.Array
    logits_BV: jax.Array
    verified_B: jax.Array | None

    @property
    def rows_B(self) -> jax.Array:
        return self.exit_B >= 0

    def at(self, s: int, leaves_B, logits_BV) -> Emission:
        """With the logits of rows that leave at exit s."""
        logits_BV = jnp.where(leaves_B[:, None], logits_BV.astype(self.logits_BV.dtype), self.logits_BV)
        return self._replace(exit_B=jnp.where(leaves_B, s, self.exit_B), logits_BV=logits_BV)


@bounded(rows=("state", "pause_len_B"), settings=("policy", "fusion", "sampling"), donate="state")
def decode(build: Build, params, state: DecodeState, policy, timing: Timing, fusion, sampling: Sampling, stop_ids,
           pause_len_B, max_steps, until_one_ends) -> DecodeState:
    """Further tokens for every active row, until none is left, or one of them ends where `until_one_ends`, or for
    `max_steps` steps. Each group of a mesh's devices goes by its own rows.

    A row is left while it is active and has fewer than `pause_len_B` known tokens. A row whose policy verifies has
    whole blocks of drafts verified, and may so come to have some more.

    policy and timing are of `sled.exits`, fusion of `sled.fusion`; their numbers, like those of
    `sampling`, `stop_ids` (token ids that end a row, the token included), `pause_len_B`, `max_steps` and
    `until_one_ends` are traced: changing them compiles nothing. The caller leaves room: within the capacity lie a row's
    `limit_B`, or pause_len_B and as many drafts more as the policy may have waiting.
    """
    readout = Readout(build(params))
    plan = Plan.of(policy, fusion, readout.network)
    run = Context(
        readout, plan, policy, fusion, sampling, position_keys(sampling, state.text.keys_B, state.capacity), stop_ids,
        jnp.minimum(state.text.limit_B, pause_len_B), policy.prepare(readout))

    def step(carry):
        state, taken = carry
        ready_B = run.ready_B(state)
        state, states = first_segment(run, state, ready_B)
        state, emission = _first_decision(run, state, ready_B, states)
        for s in range(1, len(plan.exits)):
            state, emission = _deeper_segment(run, timing, state, s, emission)
        state = _emit(run, state, emission)
        return (state if plan.last_exit == 0 else _wait(run, state)), taken + 1

    least = jnp.where(until_one_ends, run.unfinished_B(state).sum().clip(1), 1)

    def unfinished(carry):
        state, taken = carry
        return (run.unfinished_B(state).sum() >= least) & (taken < max_steps)

    state, _ = jax.lax.while_loop(unfinished, step, (state, 0))
    return state


def _first_decision(run: Context, state: DecodeState, ready_B, states) -> tuple[DecodeState, Emission]:
    """The decision at the first exit, which every step takes."""
    none_B = jnp.full_like(ready_B, -1, jnp.int32)
    if run.plan.last_exit == 0:
        logits_BV = deciding_logits(run, states, ready_B, jnp.arange(ready_B.shape[0]))
        return state, Emission(jnp.where(ready_B, 0, none_B), logits_BV, None)
    decision = run.policy.at_exit(_view(run, state, 0, ready_B, states))
    leaves_B = ready_B & decision.leaves_B
    # As wide as the last layer's, whatever type a policy gives: deeper exits write into the same array.
    wide = run.readout.head(run.plan.exits[-1]).dtype(states[run.plan.exits[0]])
    emission = Emission(jnp.where(leaves_B, 0, none_B), decision.logits_BV.astype(wide),
                        none_B if run.policy.verifies else None)
    return _leave(run, state, 0, ready_B, leaves_B, states, decision.memory), emission


def _view(run: Context, state: DecodeState, s: int, here_B, states) -> ExitView:
    text, top = state.text, run.plan.exits[s]
    return ExitView(
        index=s, layer=top, here_B=here_B, states=states,
        fused_logits=lambda: run.readout.fuse(run.fusion, states, top),
        emitted_B=text.length_B - text.prompt_B, most_B=text.limit_B - text.prompt_B,
        unverified_B=run.deferred_B(state), memory=state.memory, prepared=run.prepared)


def _leave(run: Context, state: DecodeState, s: int, here_B, leaves_B, states, memory) -> DecodeState:
    """After the decision at early exit s: rows of `here_B` that do not leave wait for the next segment."""
    waiting_B = jnp.where(here_B, jnp.where(leaves_B, 0, s + 1), state.progress.waiting_B)
    state = state.replace(memory=memory, progress=state.progress.replace(waiting_B=waiting_B))
    if run.policy.propagates:
        state = propagate_kv(run, state, s, leaves_B, states[run.plan.exits[s]])
    return state


def _deeper_segment(run: Context, timing: Timing, state: DecodeState, s: int, emission: Emission):
    """Segment s over all pending tokens, if a row waits for it and the schedule runs it now."""
    plan, progress = run.plan, state.progress
    # As it will be once this step has emitted. A draft counts as going on: if it ends its row, the next step verifies.
    crowded_B = run.deferred_B(state) + emission.rows_B >= plan.window
    goes_on_B = state.text.length_B + emission.rows_B < run.end_len_B(state)
    full_B = run.free_B(state) & crowded_B & goes_on_B & (_pending_B(state, s) > 0)
    blocked_B = run.unfinished_B(state) & ((progress.waiting_B == s) | full_B)
    due = timing.due(blocked_B=blocked_B, waited_B=progress.waited_B, full_B=full_B,
                     moving_B=emission.rows_B & ~crowded_B & (goes_on_B | run.policy.verifies))
    through = _verify if run.policy.verifies and s == plan.last_exit else _through_segment
    return run_if(due, lambda carry: through(run, carry[0], s, carry[1], blocked_B), (state, emission))


def _verify(run: Context, state: DecodeState, s: int, emission: Emission, blocked_B):
    """The last segment over the drafts of the rows that cannot go on without it.

    Those of other rows would be cut short: what a row drafts would then depend on its batch-mates.
    """
    def block(size, carry):
        state, token_B = verify(run, carry[0], blocked_B, size)
        return state, carry[1]._replace(exit_B=jnp.where(token_B >= 0, s, carry[1].exit_B), verified_B=token_B)

    _, *sizes = block_sizes(run.plan.window)  # a single token is seldom pending: only where a draft was not begun
    return _in_one_block(jnp.where(blocked_B, _pending_B(state, s), 0).max(), sizes, block, (state, emission))


def _through_segment(run: Context, state: DecodeState, s: int, emission: Emission, _):
    """Segment s over all rows' pending tokens, and what follows for rows that have waited for it."""
    here_B = state.text.active_B & (state.progress.waiting_B == s)
    state, states = _run_pending(run, state, s)
    if s == run.plan.last_exit:
        progress = state.progress.replace(waiting_B=jnp.where(here_B, 0, state.progress.waiting_B))
        emit = lambda: emission.at(  # noqa: E731
            s, here_B, deciding_logits(run, states, here_B, jnp.arange(here_B.shape[0])))
        return state.replace(progress=progress), jax.lax.cond(here_B.any(), emit, lambda: emission)

    # A draft that ends its row waits without having come here; its verification begins with the tokens before it.
    came_B = here_B & (state.progress.kv_len_BE[:, s] == state.text.length_B)

    def decide():
        decision = run.policy.at_exit(_view(run, state, s, came_B, states))
        leaves_B = came_B & decision.leaves_B
        return leaves_B, decision.memory, emission.at(s, leaves_B, decision.logits_BV)

    leaves_B, memory, emission = jax.lax.cond(came_B.any(), decide,
                                              lambda: (jnp.zeros_like(came_B), state.memory, emission))
    return _leave(run, state, s, here_B, leaves_B, states, memory), emission


def _run_pending(run: Context, state: DecodeState, s: int):
    """Segment s over all pending tokens.

    Returns the state, and the newest tokens' hidden states [B, D] that a decision at exit s may look at.
    """
    plan, newest_B = run.plan, state.text.length_B - 1
    below, _ = plan.bounds(s)
    rows = jnp.arange(newest_B.shape[0])
    decisive = plan.decisive_layers(s)
    new = {n: jnp.zeros_like(state.progress.buffers[0][:, 0]) for n in decisive if abs(n) > below}

    def block(size, carry):
        state, new = carry
        at_B = newest_B - state.progress.kv_len_BE[:, s]
        state, states, _ = run_block(run, state, s, size, state.text.active_B)
        picked = {n: states[n][rows, jnp.clip(at_B, 0, size - 1)] for n in new}
        inside_B1 = ((at_B >= 0) & (at_B < size))[:, None]
        return state, {n: jnp.where(inside_B1, picked[n], new[n]) for n in new}

    if plan.window == 1:
        state, new = block(1, (state, new))
    else:
        state, new = _in_one_block(_pending_B(state, s).max(), block_sizes(plan.window), block, (state, new))
    slot_B = newest_B % plan.window
    buffered = {n: buffer_BPD[rows, slot_B]
                for n, buffer_BPD in zip(plan.buffered_layers, state.progress.buffers, strict=True)}
    return state, {**buffered, **new}


def _in_one_block(most, sizes: list[int], block, carry):
    """block(size, carry) with the smallest size that holds `most` tokens; the carry as it is where `most` is 0."""
    below = 0
    for size in sizes:
        carry = run_if((most > below) & (most <= size), functools.partial(block, size), carry)
        below = size
    return carry


def _pending_B(state: DecodeState, s: int):
    """Positions of active rows that segment s has still to run."""
    kv_len_BE = state.progress.kv_len_BE
    return jnp.where(state.text.active_B, kv_len_BE[:, s - 1] - kv_len_BE[:, s], 0)


@jax.named_scope("emit")
def _emit(run: Context, state: DecodeState, emission: Emission) -> DecodeState:
    """Chooses and writes the next token of every row that has one in this step."""
    text, rows_B, policy = state.text, emission.rows_B, run.policy
    logits_BV = processed_logits(emission.logits_BV, lambda: seen_tokens(text.tokens_BS, text.length_B,
                                                                         emission.logits_BV.shape[-1]), run.sampling)
    token_B = choose(logits_BV, run.sampling, run.key_data_BS, text.length_B)
    if policy.verifies:
        token_B = jnp.where(emission.verified_B >= 0, emission.verified_B, token_B)
    written = write_tokens(text, rows_B, token_B, emission.exit_B, run.plan.last_exit, run.ends_B)
    if policy.verifies:  # a draft that ends its row waits for its verification
        waits_B = rows_B & (emission.verified_B < 0) & text.active_B & ~written.active_B
        progress = state.progress.replace(waiting_B=jnp.where(waits_B, emission.exit_B + 1, state.progress.waiting_B))
        state, written = state.replace(progress=progress), written.replace(active_B=written.active_B | waits_B)
    return state.replace(text=written)


def write_tokens(text: Text, rows_B, token_B, exit_B, last_exit: int, ends: Callable) -> Text:
    """The text with the next token of the rows `rows_B`, and the exits [B] that chose them; rows at whose end it is are
    no longer active. ends: says which tokens [B] end a row."""
    # As a choice for every position: on a CPU a scatter runs as a loop of its own.
    here_BS = rows_B[:, None] & (jnp.arange(text.tokens_BS.shape[1]) == text.length_B[:, None])
    exit_BS = text.exit_BS if last_exit == 0 else jnp.where(
        here_BS, exit_B[:, None].astype(text.exit_BS.dtype), text.exit_BS)
    length_B = text.length_B + rows_B
    ends_B = rows_B & (ends(token_B) | (length_B >= text.limit_B))
    return text.replace(tokens_BS=jnp.where(here_BS, token_B[:, None], text.tokens_BS), exit_BS=exit_BS,
                        length_B=length_B, active_B=text.active_B & ~ends_B)


def _wait(run: Context, state: DecodeState) -> DecodeState:
    """Counts the step for rows that stand still."""
    held_B = run.unfinished_B(state) & ~run.ready_B(state)
    return state.replace(progress=state.progress.replace(
        waited_B=jnp.where(held_B, state.progress.waited_B + 1, 0), held_B=state.progress.held_B + held_B))
