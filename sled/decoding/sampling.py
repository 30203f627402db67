"""From fused logits to the next token: repetition penalty, temperature, truncation, the draw.

The processors run in the order of transformers' generation: repetition penalty, temperature,
top-k, top-p, min-p. Every number is traced and may differ by row, so one compiled loop serves any
mixture of greedy and sampling rows; work that no row asks for is skipped at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sled.exits.policy import only_if
from sled.fusion.partial import max_and_index
from sled.models.sharding.mesh import split_in_use
from sled.settings.decorator import setting, settings
from sled.settings.rules import WIDE, Number, Whole


@settings
class Sampling:
    """The draw of the next token. The default is greedy.

    Keskar et al. 2019 for the repetition penalty, which also applies when greedy: positive logits of tokens already in
    the prompt or the text are divided by it, negative ones multiplied.
    """

    temperature: float = setting(
        Number(0, WIDE, least=1 / WIDE, hint="0 takes the most likely token, 1 samples the model's own distribution"),
        default=0.0, rows="B",
        help="what divides the logits before the draw (Gumbel-max)")
    top_k: int = setting(Whole(0, hint="0 keeps all tokens"), default=0, rows="B",
                         help="keep the k most likely tokens")
    top_p: float = setting(Number(0, 1, open_low=True, hint="1 keeps all tokens"), default=1.0, rows="B",
                           help="keep the most likely tokens that together reach this probability")
    min_p: float = setting(Number(0, 1, hint="0 keeps all tokens"), default=0.0, rows="B",
                           help="keep tokens with at least this fraction of the highest probability")
    repetition_penalty: float = setting(
        Number(1 / WIDE, WIDE, hint="1 changes nothing, and 1.01 to 1.05 goes well with SLED on open text"),
        default=1.0, rows="B", help="what divides the logits of tokens that were already seen")


def seen_tokens(tokens_BS, length_B, vocabulary: int):
    """The tokens of each row's first `length_B` positions, marked [B, V], for the repetition penalty."""
    rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
    known_BS = jnp.arange(tokens_BS.shape[1]) < length_B[:, None]
    return jnp.zeros((tokens_BS.shape[0], vocabulary), bool).at[rows_B1, tokens_BS].max(known_BS)


def penalise(logits_BV, seen_BV, penalty_B):
    """The repetition penalty on the tokens marked in `seen_BV`."""
    penalty = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def truncate(logits_BV, top_k_B, top_p_B, min_p_B):
    """-inf for every token that top-k, top-p or min-p leaves out. Tokens tied with the last kept stay."""
    logits_BV = split_in_use(logits_BV)  # whole: to be sorted they are gathered anyway
    sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    within_k = (rank_V < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    p_BV = jax.nn.softmax(jnp.where(within_k, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    kept = within_k & (before_BV < top_p_B[:, None]) & (p_BV >= min_p_B[:, None] * p_BV[:, :1])
    kept |= rank_V == 0
    lowest_B1 = jnp.min(jnp.where(kept, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def processed_logits(logits_BV, seen_BV: Callable[[], jax.Array], sampling: Sampling):
    """Logits [B, V] after all processors; a greedy row keeps its scale and is not truncated.

    seen_BV: gives the tokens in each row's text so far; only called (and run) for a repetition penalty.
    """
    s = _per_row(sampling, logits_BV.shape[0])
    # Numbers of 64 bits, where JAX has these, are not to widen the logits of some branches alone.
    s = jax.tree.map(lambda x: x.astype(logits_BV.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, s)
    logits_BV = jax.lax.cond(
        jnp.any(s.repetition_penalty != 1), lambda x: penalise(x, seen_BV(), s.repetition_penalty),
        lambda x: x, logits_BV)
    warm_B = s.temperature > 0
    logits_BV = logits_BV / jnp.where(warm_B, s.temperature, 1)[:, None]
    cuts_B = warm_B & ((s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0))
    return jax.lax.cond(
        jnp.any(cuts_B),
        lambda x: jnp.where(cuts_B[:, None], truncate(x, s.top_k, s.top_p, s.min_p), x),
        lambda x: x, logits_BV)


def takes_largest(sampling: Sampling, rows: int):
    """Rows [B] whose token is that of the largest logit, as no processor changes them: greedy ones, without penalty."""
    s = _per_row(sampling, rows)
    return (s.temperature == 0) & (s.repetition_penalty == 1)


def position_keys(sampling: Sampling, keys_B, positions: int) -> jax.Array:
    """The random key's data for the draw of the token at every position: [B, positions, ...], zeros if no row draws.

    A draw depends on the row's own key and on the token's position alone, so that neither batch-mates nor the way the
    work is cut into calls change it.
    """
    at_S = jnp.arange(positions)
    return only_if(jnp.any(jnp.asarray(sampling.temperature) > 0), lambda: jax.random.key_data(
        jax.vmap(lambda key: jax.vmap(lambda at: jax.random.fold_in(key, at))(at_S))(keys_B)))


def choose(logits_BV, sampling: Sampling, key_data_BS, position_B):
    """The next token of each row, at `position_B`, from processed logits. int32 [B].

    key_data_BS: what `position_keys` gives.
    """
    warm_B = jnp.broadcast_to(jnp.asarray(sampling.temperature) > 0, logits_BV.shape[:1])

    def draw(logits):
        key_data_B = jnp.take_along_axis(key_data_BS, position_B[:, None, None], axis=1, mode="clip")[:, 0]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(
            jax.random.wrap_key_data(key_data_B))
        return jnp.where(warm_B[:, None], logits + noise, logits)

    logits_BV = jax.lax.cond(jnp.any(warm_B), draw, lambda x: x, logits_BV)
    return max_and_index(logits_BV)[1][:, 0].astype(jnp.int32)


def _per_row(sampling: Sampling, rows: int) -> Sampling:
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (rows,)), sampling)
