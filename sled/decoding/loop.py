"""The decoding loop: one jitted `while_loop` for plain decoding, early exit and self-speculation.

The exits of a policy cut the layers into segments. A tick runs the first segment on the newest token
of every row that can go on; at its exit a row leaves with a token, or is parked for the next segment
(`arrivals.py`). A deeper segment runs when the schedule says so, over all rows' pending tokens as one
block: parked rows get what they wait for, tokens that left earlier get their exact K/V in passing.
Plain decoding is the case of one segment.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sled.decoding.arrivals import Run, arrive, run_if, settle, verify
from sled.decoding.network import Build
from sled.decoding.sampling import Sampling
from sled.decoding.state import DecodeState, Plan
from sled.exits.schedule import Timing


@functools.partial(jax.jit, static_argnames="build", donate_argnames="state")
def decode(build: Build, params, state: DecodeState, policy, timing: Timing, fusion, sampling: Sampling, stop_ids,
           until_B, ticks, rows) -> DecodeState:
    """Further tokens for every active row, until fewer than `rows` of them are left, or for `ticks` ticks.

    A row is left while it is active and has fewer than `until_B` known tokens.

    policy and timing are of `sled.exits`, fusion of `sled.fusion`; their numbers, like those of
    `sampling`, `stop_ids` (token ids that end a row, the token included), `until_B`, `ticks` and `rows`
    (1 or more) are traced: changing them compiles nothing. The caller leaves room: until_B <= capacity.
    """
    network = build(params)
    plan = Plan.of(policy, fusion, network)
    run = Run(network, plan, policy, fusion, sampling, stop_ids, jnp.minimum(state.limit_B, until_B),
              policy.prepare(network))

    def tick(carry):
        state, taken = carry
        state = _first_segment(run, state)
        for s in range(1, len(plan.exits)):
            state = _deeper_segment(run, timing, state, s)
        idle_B = run.unfinished(state) & ~run.ready(state)
        tally = dataclasses.replace(state.tally, held_B=state.tally.held_B + idle_B)
        return dataclasses.replace(state, waited_B=jnp.where(idle_B, state.waited_B + 1, 0), tally=tally), taken + 1

    def unfinished(carry):
        state, taken = carry
        return (run.unfinished(state).sum() >= rows) & (taken < ticks)

    state, _ = jax.lax.while_loop(unfinished, tick, (state, 0))
    return state


def _first_segment(run: Run, state: DecodeState) -> DecodeState:
    """The newest token of every row that can go on, through the first segment and to its exit."""
    network, top = run.network, run.plan.exits[0]
    ready_B = run.ready(state)
    position_B1 = jnp.where(ready_B, state.length_B - 1, state.capacity)[:, None]
    h0 = network.embed(jnp.take_along_axis(state.tokens_BS, state.length_B[:, None] - 1, axis=1))
    states, caches = network.run_layers(h0, position_B1, state.caches[:top], 0, top)
    states = dict(enumerate([h0, *states]))
    state = _ran(run, state, 0, states, position_B1, caches, jnp.where(ready_B, state.length_B, state.done_BE[:, 0]))
    return arrive(run, state, 0, ready_B, {n: h[:, 0] for n, h in states.items()})


def _deeper_segment(run: Run, timing: Timing, state: DecodeState, s: int) -> DecodeState:
    """Segment s over all pending tokens, if somebody waits for it and it is time."""
    pending_B = jnp.where(state.active_B, state.done_BE[:, s - 1] - state.done_BE[:, s], 0)
    full_B = run.full(state) & (pending_B > 0)
    waiting_B = run.unfinished(state) & ((state.parked_B == s) | full_B)
    due = timing.due(waiting_B, state.waited_B, full_B, run.ready(state))
    if run.policy.verifies and s == len(run.plan.exits) - 1:
        return run_if(due, lambda state: verify(run, *_run_block(run, s, run.plan.window, state)), state)

    arrived_B = due & state.active_B & (state.parked_B == s)
    newest_B = state.length_B - 1
    said = {n: state.held_BPCD[:, 0, 0] for n in run.heard(s) if n > run.plan.exits[s - 1]}

    def block(size, carry):
        state, _ = carry
        first_B = state.done_BE[:, s]
        state, states, _ = _run_block(run, s, size, state)
        at_B = jnp.clip(newest_B - first_B, 0, size - 1)
        return state, {n: states[n][jnp.arange(at_B.shape[0]), at_B] for n in said}

    longest, above = jnp.where(due, pending_B.max(), 0), 0
    for size in _block_sizes(run.plan.window):
        state, said = run_if((longest > above) & (longest <= size), functools.partial(block, size), (state, said))
        above = size
    slot_B = newest_B % state.window
    kept = {n: state.held_BPCD[jnp.arange(slot_B.shape[0]), slot_B, c] for c, n in enumerate(run.plan.kept)}
    return arrive(run, state, s, arrived_B, {**kept, **said})


def _block_sizes(window: int) -> tuple[int, ...]:
    """Block lengths that a deeper segment is compiled for: 1, 4, 16, .. and the whole window."""
    sizes = [1]
    while sizes[-1] * 4 < window:
        sizes.append(sizes[-1] * 4)
    return (*sizes, window) if window > 1 else (1,)


def _run_block(run: Run, s: int, size: int, state: DecodeState):
    """Segment s over every row's pending tokens, at most `size` of them.

    Returns the state, the tokens' hidden states [B, size, D] by layer, and their positions.
    """
    network, plan = run.network, run.plan
    below, top = plan.exits[s - 1], plan.exits[s]
    rows_B1 = jnp.arange(state.length_B.shape[0])[:, None]
    first_B, end_B = state.done_BE[:, s], state.done_BE[:, s - 1]
    position_BT = first_B[:, None] + jnp.arange(size)
    held_BTCD = state.held_BPCD[rows_B1, position_BT % state.window]
    states = {n: held_BTCD[:, :, c] for c, n in enumerate(plan.kept) if n <= below}
    position_BT = jnp.where(state.active_B[:, None] & (position_BT < end_B[:, None]), position_BT, state.capacity)
    new, caches = network.run_layers(states[below], position_BT, state.caches[below:top], below, top)
    states |= dict(enumerate(new, below + 1))
    judged = run.policy.verifies and s == len(plan.exits) - 1  # then `verify` says how far the row is done
    done_B = first_B if judged else jnp.where(state.active_B, end_B, first_B)
    return _ran(run, state, s, states, position_BT, caches, done_B), states, position_BT


def _ran(run: Run, state: DecodeState, s: int, states, position_BT, caches, done_B) -> DecodeState:
    """The state after segment s ran: its caches, what deeper segments will want, how far it is done."""
    plan = run.plan
    below, top = ((0, *plan.exits)[s], plan.exits[s])
    wanted = [c for c, n in enumerate(plan.kept) if (n > below or s == 0) and n <= top]
    held_BPCD = state.held_BPCD
    if wanted and s < len(plan.exits) - 1:
        rows_B1 = jnp.arange(state.length_B.shape[0])[:, None]
        slot_BT = jnp.where(position_BT < state.capacity, position_BT % state.window, state.window)
        for c in wanted:
            held_BPCD = held_BPCD.at[rows_B1, slot_BT, c].set(states[plan.kept[c]], mode="drop")
    tally = dataclasses.replace(state.tally, runs_E=state.tally.runs_E.at[s].add(1))
    state = dataclasses.replace(state, held_BPCD=held_BPCD, tally=tally,
                                caches=[*state.caches[:below], *caches, *state.caches[top:]])
    done_BE = state.done_BE.at[:, s].set(done_B)
    complete = s == len(plan.exits) - 1 and not run.policy.verifies
    return settle(state, done_BE) if complete else dataclasses.replace(state, done_BE=done_BE)
