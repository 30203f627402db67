"""Verification: the last layers over all drafts of a row as one block, which keeps what they would have chosen too.

Where the drafts come from does not matter: whatever follows a pending position in the row's text is held against the
last layer's choice there. Greedy, that is the longest matching prefix; sampling, drafts and choices take the same
random numbers at a position (Gumbel-max coupling, Daliri et al. 2024, arXiv 2408.07978), so the text is the one of
plain decoding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sled.decoding.need import deciding_logits
from sled.decoding.sampling import choose, processed_logits, seen_tokens
from sled.decoding.segments import Context, run_block
from sled.decoding.state import DecodeState
from sled.exits.policy import Verification


@jax.named_scope("verify")
def verify(run: Context, state: DecodeState, rows_B, size: int) -> tuple[DecodeState, jax.Array]:
    """Runs the last segment over the pending positions of rows `rows_B`, at most `size` of each, and keeps their drafts
    as far as they are right.

    Returns the state, cut to what is right, and a token [B] for the step to emit: the last layer's choice after that.
    It is -1 for rows that get none: the last pending position is followed by a right draft, or nothing was pending.
    """
    last = run.plan.last_exit
    state, states, position_BT = run_block(run, state, last, size, rows_B)
    text, progress = state.text, state.progress
    pending_BT = position_BT >= 0
    count_B = pending_BT.sum(1, dtype=jnp.int32)
    chosen_BT = _last_layer_choices(run, state, states, position_BT)

    drafted_BT = pending_BT & (position_BT + 1 < text.length_B[:, None])
    draft_BT = jnp.take_along_axis(text.tokens_BS, jnp.where(drafted_BT, position_BT + 1, 0), axis=1)
    accepted_B = jnp.cumprod((drafted_BT & (draft_BT == chosen_BT)).astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)

    # A new token: instead of the first wrong draft, or after the last pending position if no draft follows it.
    fresh_B = accepted_B < count_B
    token_B = jnp.take_along_axis(chosen_BT, jnp.minimum(accepted_B, size - 1)[:, None], axis=1)[:, 0]
    length_B = jnp.where(fresh_B, progress.complete_B + accepted_B + 1, text.length_B)
    # What was computed after a wrong draft is void: nothing is erased, the lengths forget it.
    kv_len_BE = progress.kv_len_BE.at[:, last].add(jnp.where(fresh_B, accepted_B + 1, count_B))
    kv_len_BE = jnp.where(fresh_B[:, None], jnp.minimum(kv_len_BE, length_B[:, None]), kv_len_BE)

    # Rows that wait no longer: they get a new token, or this was the verification that they waited for.
    done_B = fresh_B | (progress.waiting_B == last) & (count_B > 0)
    # What the verification decides begins with the first token that was not known.
    begins_BS = (count_B > 0)[:, None] & (jnp.arange(state.capacity) == progress.complete_B[:, None] + 1)
    drafted_B = drafted_BT.sum(1, dtype=jnp.int32)
    text = text.replace(length_B=length_B, drafts_BS=jnp.where(begins_BS, drafted_B[:, None], text.drafts_BS))
    # Rows that end without a new token: all drafts are right, and the newest of them is an end.
    over_B = (count_B > 0) & ~fresh_B & (kv_len_BE[:, last] + 1 == length_B) & (
        run.ends_B(text.newest_B) | (length_B >= text.limit_B))
    memory = run.policy.observe(state.memory, Verification(drafted_BT, accepted_B, chosen_BT, states), run.prepared)
    state = state.replace(
        text=text.replace(active_B=text.active_B & ~over_B), memory=memory,
        progress=progress.replace(kv_len_BE=kv_len_BE, waiting_B=jnp.where(done_B, 0, progress.waiting_B)))
    return state, jnp.where(fresh_B, token_B, -1)


def _last_layer_choices(run: Context, state: DecodeState, states, position_BT):
    """The last layer's token after every position [B, T], as plain decoding would choose it there."""

    batch, size = position_BT.shape
    flat = {n: states[n].reshape(batch * size, -1)
            for n in run.plan.decisive_layers(run.plan.last_exit) if n in states}
    logits_PV = deciding_logits(run, flat, (position_BT >= 0).ravel(), jnp.arange(batch * size) // size)

    def choose_at(logits_BV, position_B):
        seen_BV = lambda: seen_tokens(state.text.tokens_BS, position_B + 1, logits_BV.shape[-1])  # noqa: E731
        return choose(processed_logits(logits_BV, seen_BV, run.sampling), run.sampling, run.key_data_BS,
                      position_B + 1)

    # Position by position under vmap, not as more rows: numbers per row [B] of the sampling keep their meaning.
    return jax.vmap(choose_at, in_axes=1, out_axes=1)(logits_PV.reshape(batch, size, -1), position_BT)
