"""What happens to a token at an exit: it leaves, it is parked, it is guessed, or it is verified.

    arrive    a row's newest token has come to an exit: trust what is said there, or guess, or go on
    verify    the last layer's choices for all pending tokens, against the guesses
    settle    positions whose K/V are complete in every layer
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sled.decoding.network import Network, fuse, read
from sled.decoding.sampling import Sampling, choose, processed_logits
from sled.decoding.state import DecodeState, Plan
from sled.exits.confidence import confidence, max_probability
from sled.exits.speculation import KEEP, choose_draft
from sled.fusion.partial import max_and_index


class Run(NamedTuple):
    """What one `decode` works with. `until_B`: known tokens at which a row pauses or stops."""

    network: Network
    plan: Plan
    policy: Any
    fusion: Any
    sampling: Sampling
    stop_ids: jax.Array
    until_B: jax.Array
    prepared: Any

    def settled(self, state: DecodeState):
        """Known tokens that will not change any more, [B]."""
        return state.deep_B + 1 if self.policy.verifies else state.length_B

    def unfinished(self, state: DecodeState):
        return state.active_B & (self.settled(state) < self.until_B)

    def free(self, state: DecodeState):
        """Rows whose newest token has not begun, [B]."""
        return state.active_B & (state.parked_B == 0) & (state.length_B < self.until_B)

    def full(self, state: DecodeState):
        """Rows that would go on, but have no room for another pending token, [B]."""
        return self.free(state) & (state.length_B - state.deep_B > state.window)

    def ready(self, state: DecodeState):
        """Rows whose newest token the first segment can take, [B]."""
        return self.free(state) & (state.length_B - state.deep_B <= state.window)

    def heard(self, s: int) -> set[int]:
        """Hidden states that decide at exit s, by layer."""
        top = self.plan.exits[s]
        return {*self.fusion.early_layers(top, tied=self.network.tied_head), top - 1, top}

    def ends(self, token_B):
        """Whether a token ends its row, [B]."""
        return jnp.any(token_B[:, None] == self.stop_ids, axis=1)


def arrive(run: Run, state: DecodeState, s: int, at_B, h: dict) -> DecodeState:
    """Rows `at_B` have their newest token at exit s; h: hidden states [B, D] by layer."""
    if run.policy.verifies:
        return _guess(run, state, s, at_B, h)
    return _trust(run, state, s, at_B, h)


def _trust(run: Run, state: DecodeState, s: int, at_B, h: dict) -> DecodeState:
    """Early exit: rows that are sure enough say the exit's token, the others are parked."""
    policy, top = run.policy, run.plan.exits[s]

    def decide():
        """Who leaves, and with which token."""
        if s == len(run.plan.exits) - 1:
            return at_B, _next_token(run, state, fuse(run.network, run.fusion, h, top))
        projects = policy.measure not in ("saturation", "classifier")
        fused_BV = fuse(run.network, run.fusion, h, top) if projects else None
        sure_B = confidence(policy.measure, fused_BV, h[top], h[top - 1], policy.classifier, s)
        limit_B = policy.thresholds(state.length_B - state.prompt_B, state.limit_B - state.prompt_B)[:, s]
        leaves_B = at_B & jnp.isfinite(sure_B) & (sure_B > limit_B) & (top >= policy.min_layer)
        return leaves_B, only_if(leaves_B.any(), lambda: _next_token(
            run, state, fused_BV if projects else fuse(run.network, run.fusion, h, top)))

    leaves_B, token_B = decide() if s == 0 else only_if(at_B.any(), decide)
    state = dataclasses.replace(state, parked_B=jnp.where(at_B & ~leaves_B, s + 1, state.parked_B))
    if policy.propagates and s < len(run.plan.exits) - 1:
        state = _propagate(run, state, s, leaves_B, h[top])
    return _say(run, state, s, leaves_B, token_B)


def _propagate(run: Run, state: DecodeState, s: int, leaves_B, h_BD) -> DecodeState:
    """CALM's K/V of tokens that leave at exit s: every deeper layer takes the exit's hidden state as input."""
    top, last = run.plan.exits[s], run.plan.exits[-1]

    def write(state):
        position_B1 = jnp.where(leaves_B, state.length_B - 1, state.capacity)[:, None]
        caches = run.network.write_kv(h_BD[:, None], position_B1, state.caches[top:], top, last)
        state = dataclasses.replace(state, caches=[*state.caches[:top], *caches])
        deeper_E = jnp.arange(len(run.plan.exits)) > s
        done_BE = jnp.where(leaves_B[:, None] & deeper_E, state.length_B[:, None], state.done_BE)
        return settle(state, done_BE)

    return run_if(leaves_B.any(), write, state)


def _say(run: Run, state: DecodeState, s: int, rows_B, token_B) -> DecodeState:
    """Rows `rows_B` get their next token, said at exit s, and are free to go on."""
    length_B = state.length_B + rows_B
    state = _write(state, rows_B, state.length_B, token_B, s)
    going_B = ~run.ends(token_B) & (length_B < state.limit_B)
    return dataclasses.replace(state, length_B=length_B, active_B=state.active_B & (going_B | ~rows_B),
                               parked_B=jnp.where(rows_B, 0, state.parked_B))


def _guess(run: Run, state: DecodeState, s: int, at_B, h: dict) -> DecodeState:
    """Self-speculation at an early exit: guess the next token, or end the draft and wait for deeper layers."""
    policy, top = run.policy, run.plan.exits[s]
    layer_B, draft_B = choose_draft(policy, run.prepared, state.accepted_BE, state.judged_BE)
    here_B = at_B & ~state.closing_B & (layer_B == s)
    may_B = here_B & (state.drafted_B < draft_B)

    def guess():
        logits_BV = run.prepared.project(read(run.network, h[top], top), s)
        picky = jnp.any(jnp.asarray(policy.confidence) > 0)
        sure_B = only_if(picky, lambda: max_probability(logits_BV))
        return _next_token(run, state, logits_BV), ~picky | (sure_B >= policy.confidence)

    token_B, sure_B = only_if(may_B.any(), guess)
    guesses_B = may_B & sure_B
    length_B = state.length_B + guesses_B
    closes_B = guesses_B & (run.ends(token_B) | (length_B >= run.until_B))
    state = _write(state, guesses_B, state.length_B, token_B, s)
    return dataclasses.replace(
        state, length_B=length_B, drafted_B=state.drafted_B + guesses_B,
        parked_B=jnp.where(at_B, jnp.where(guesses_B & ~closes_B, 0, s + 1), state.parked_B),
        closing_B=state.closing_B | closes_B | (here_B & ~guesses_B))


def verify(run: Run, state: DecodeState, states: dict, position_BT) -> DecodeState:
    """The last layer's choice after every pending token, against the guess that follows it there.

    states: hidden states [B, T, D] by layer; position_BT: the pending tokens' positions, capacity where
    there is none. Each row keeps its guesses as far as they are right; the first wrong one, or the
    place after the last, gets the last layer's own token.
    """
    last = len(run.plan.exits) - 1
    batch, size = position_BT.shape
    pending_BT = position_BT < state.capacity
    count_B = pending_BT.sum(1)

    def choose_at(h: dict, position_B, so_far_BT):
        """The last layer's tokens [B] at one place of every row; so_far_BT: pending tokens up to there."""
        fused_BV = fuse(run.network, run.fusion, h, run.plan.exits[-1], places=batch * size)
        seen_BV = lambda: state.seen_BV.at[jnp.arange(batch)[:, None], tokens_BT].max(so_far_BT)  # noqa: E731
        return choose(processed_logits(fused_BV, seen_BV, run.sampling), run.sampling, state.keys_B, position_B + 1)

    tokens_BT = jnp.take_along_axis(state.tokens_BS, jnp.where(pending_BT, position_BT, 0), axis=1)
    so_far_BTT = pending_BT[:, None] & jnp.tril(jnp.ones((size, size), bool))
    # Place by place under vmap, not as more rows: numbers per row [B] of the fusion keep their meaning.
    chosen_BT = jax.vmap(choose_at, in_axes=1, out_axes=1)(states, position_BT, so_far_BTT)

    after_BT = position_BT + 1
    judged_BT = pending_BT & (after_BT < state.length_B[:, None])
    guess_BT = jnp.take_along_axis(state.tokens_BS, jnp.where(judged_BT, after_BT, 0), axis=1)
    right_BT = judged_BT & (guess_BT == chosen_BT)
    kept_B = jnp.cumprod(right_BT.astype(jnp.int32), axis=1).sum(1)

    # A new token: in place of the first wrong guess, or after the last pending token if no guess follows.
    fresh_B = kept_B < count_B
    place_B = state.deep_B + kept_B + 1
    token_B = jnp.take_along_axis(chosen_BT, jnp.minimum(kept_B, size - 1)[:, None], axis=1)[:, 0]
    accepted_BE, judged_BE = _acceptance(run, state, states, judged_BT, kept_B, chosen_BT)
    state = _write(state, fresh_B, place_B, token_B, last)
    length_B = jnp.where(fresh_B, place_B + 1, state.length_B)
    # What was computed after a wrong guess is void: nothing is erased, the lengths forget it.
    done_BE = state.done_BE.at[:, last].add(jnp.where(fresh_B, kept_B + 1, count_B))
    done_BE = jnp.where(fresh_B[:, None], jnp.minimum(done_BE, place_B[:, None]), done_BE)
    reset_B = fresh_B | (state.parked_B == last) & (count_B > 0)
    newest_B = jnp.take_along_axis(state.tokens_BS, length_B[:, None] - 1, axis=1)[:, 0]
    over_B = (count_B > 0) & (done_BE[:, last] + 1 == length_B) & (run.ends(newest_B) | (length_B >= state.limit_B))
    tally = dataclasses.replace(
        state.tally, drafted_B=state.tally.drafted_B + judged_BT.sum(1), accepted_B=state.tally.accepted_B + kept_B,
        rounds_B=state.tally.rounds_B + (count_B > 0))
    state = dataclasses.replace(
        state, length_B=length_B, active_B=state.active_B & ~over_B, tally=tally,
        parked_B=jnp.where(reset_B, 0, state.parked_B), closing_B=state.closing_B & ~reset_B,
        drafted_B=jnp.where(count_B > 0, jnp.maximum(length_B - 1 - done_BE[:, last], 0), state.drafted_B),
        accepted_BE=accepted_BE, judged_BE=judged_BE)
    return settle(state, done_BE)


def _acceptance(run: Run, state: DecodeState, states: dict, judged_BT, kept_B, chosen_BT):
    """What an adaptive policy remembers of its exits' guesses: right ones and all of them, [B, E] each.

    Places up to and including the first wrong guess count. Where several exits are offered, each is asked
    what it would have guessed there ("shadow tokens" of DEL), its most likely token being its guess.
    """
    policy = run.policy
    if not policy.adaptive:
        return state.accepted_BE, state.judged_BE
    counts_BT = judged_BT & (jnp.arange(judged_BT.shape[1]) <= kept_B[:, None])
    for e, layer in enumerate(policy.layer):
        if len(policy.layer) == 1:
            right_B = jnp.minimum(kept_B, counts_BT.sum(1))
        else:
            guess = lambda h, e=e, n=layer: max_and_index(  # noqa: E731
                run.prepared.project(read(run.network, h, n), e))[1][:, 0]
            right_B = (counts_BT & (jax.vmap(guess, 1, 1)(states[layer]) == chosen_BT)).sum(1)
        fade_B = jnp.where(counts_BT.any(1), KEEP, 1.0)
        state = dataclasses.replace(
            state, accepted_BE=state.accepted_BE.at[:, e].set(fade_B * state.accepted_BE[:, e] + right_B),
            judged_BE=state.judged_BE.at[:, e].set(fade_B * state.judged_BE[:, e] + counts_BT.sum(1)))
    return state.accepted_BE, state.judged_BE


def run_if(condition, f, state):
    """f(state) if the condition holds, else the state.

    A loop of at most one round: XLA updates a loop's arrays in place, where it copies the caches through
    the branch of a conditional that leaves them alone (measured: 12 copies a token, half of its time).
    """
    return jax.lax.while_loop(lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), f(carry[1])),
                              (condition, state))[1]


def only_if(condition, f):
    """f() if the condition holds, else zeros of the same shapes."""
    shapes = jax.eval_shape(f)
    return jax.lax.cond(condition, f, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def settle(state: DecodeState, done_BE) -> DecodeState:
    """The state with these `done_BE`; tokens whose K/V are now complete everywhere count as seen."""
    seen_BV = _see(state, done_BE[:, -1])
    return dataclasses.replace(state, done_BE=done_BE, seen_BV=seen_BV)


def _see(state: DecodeState, end_B):
    """`seen_BV` with the tokens at positions deep .. end - 1, at most a window of them."""
    rows_B1 = jnp.arange(state.length_B.shape[0])[:, None]
    position_BP = state.deep_B[:, None] + jnp.arange(state.window)
    tokens_BP = jnp.take_along_axis(state.tokens_BS, jnp.minimum(position_BP, state.capacity - 1), axis=1)
    return state.seen_BV.at[rows_B1, tokens_BP].max(position_BP < end_B[:, None])


def _next_token(run: Run, state: DecodeState, fused_BV):
    """Processed logits to the token after each row's newest one, [B]."""
    logits_BV = processed_logits(fused_BV, lambda: _see(state, state.length_B), run.sampling)
    return choose(logits_BV, run.sampling, state.keys_B, state.length_B)


def _write(state: DecodeState, rows_B, position_B, token_B, s: int) -> DecodeState:
    """Tokens of rows `rows_B` at these positions, said at exit s."""
    at = jnp.arange(rows_B.shape[0]), jnp.where(rows_B, position_B, state.capacity)
    return dataclasses.replace(state, tokens_BS=state.tokens_BS.at[at].set(token_B, mode="drop"),
                               exit_BS=state.exit_BS.at[at].set(s, mode="drop"))
