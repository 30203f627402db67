"""The heart of layer fusion: a few numbers per candidate layer that every method is a function of.

Hidden states of the candidate layers and the shared projection go in; log-normalisers, entropies,
confidences, the final layer's top tokens and SLED's cosines at them come out. The vocabulary enters only
through the mergeable sums of `partial.py`, so the dense form and the tiled form, which streams over tiles of
vocabulary rows, share one definition.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sled.fusion.partial import Partial, blockwise_statistics, empty_partial, inverse, merge, partial_statistics


class LayerStatistics(NamedTuple):
    """The numbers that the methods need, for B rows, C candidate layers (final last, E = C - 1 early), K top tokens.

    Distributions are softmax(logits / temperature); what is called logits is not divided.
    """

    log_norm_BC: jax.Array  # log of the sum of exp(logits / temperature)
    entropy_BC: jax.Array
    max_prob_BC: jax.Array
    margin_BC: jax.Array  # probability of the most likely token minus that of the second
    argmax_BC: jax.Array
    top_ids_BK: jax.Array  # the final layer's k most likely tokens, most likely first
    top_logits_BCK: jax.Array  # every candidate's logits at these
    cosine_BEK: jax.Array  # cosine(P_n - e_i, l_n - l_N) for early layer n and top token i
    final_BV: jax.Array


def layer_statistics(h_BCD, head, k: int, temperature=1.0) -> LayerStatistics:
    """Statistics of the candidate layers' next-token distributions, final layer last.

    h_BCD: hidden states as they enter the projection (already normed where that is wanted).
    head: a `SharedHead`; its `tile` selects the dense or the tiled form.
    k: how many of the final layer's top tokens to describe (static; cut to the vocabulary).
    temperature: a number or one per row (B,), traced.

    The cosines are those of SLED (arXiv 2411.02433, phase 1), in closed form: with d = l_n - l_N,
    <P - e_i, d> = <P, d> - d_i and |P - e_i|^2 = |P|^2 - 2 P_i + 1. Logits must be finite.
    """
    beta_B1 = inverse(temperature, head.dtype(h_BCD))
    form = _dense if head.tile is None else _tiled
    return finish(*form(h_BCD, head, min(k, head.vocabulary), beta_B1), beta_B1)


def _dense(h_BCD, head, k: int, beta_B1):
    """Take the sums and the top tokens from the logits of all candidates at once."""
    l_BCV = head.project(h_BCD)
    final_BV = l_BCV[:, -1]
    top_ids_BK = jax.lax.top_k(final_BV, k)[1]
    top_logits_BCK = jnp.take_along_axis(l_BCV, top_ids_BK[:, None], axis=-1)
    return _sums(l_BCV, head, beta_B1), top_logits_BCK, top_ids_BK, final_BV


def _sums(l_BCV, head, beta_B1, final_B1V=None) -> Partial:
    """Of logits that are there already; in blocks unless devices split the vocabulary, as a block would lie on one."""
    if head.shards == 1:
        return blockwise_statistics(l_BCV, beta_B1, final_B1V)
    return partial_statistics(l_BCV, 0, beta_B1, final_B1V)


def _tiled(h_BCD, head, k: int, beta_B1):
    """Take the sums and the top tokens in one pass over tiles of vocabulary rows, every shard's own side by side.

    Holds per row and layer the nine numbers of `Partial`, and the final layer's logits (B x V); never the logits of all
    candidate layers. With a projection split over devices, only the small statistics travel.
    """
    batch, candidates, _ = h_BCD.shape
    shards, rows = head.shards, head.vocabulary // head.shards
    first_S11 = rows * jnp.arange(shards).reshape(-1, 1, 1)

    def step(carry, l_SBCV, start):
        partial, final_SBV = carry
        final_SBV = jax.lax.dynamic_update_slice_in_dim(final_SBV, l_SBCV[:, :, -1], start, axis=2)
        return merge(partial, partial_statistics(l_SBCV, first_S11 + start, beta_B1), beta_B1), final_SBV

    nothing = empty_partial((shards, batch, candidates), beta_B1.dtype)
    partial, final_SBV = head.stream(h_BCD, (nothing, jnp.zeros((shards, batch, rows), beta_B1.dtype)), step)
    top_ids_BK = _top_ids(final_SBV, k)
    # The early logits at the top tokens are known to be wanted only now: project on those K rows alone.
    top_logits_BCK = head.project_rows(h_BCD, top_ids_BK)
    final_BV = final_SBV.swapaxes(0, 1).reshape(batch, -1)
    return _join_shards(partial, beta_B1), top_logits_BCK, top_ids_BK, final_BV


def _join_shards(partial: Partial, beta_B1) -> Partial:
    """Sums (B, C) of sums (S, B, C) over every shard's own rows."""
    parts = (jax.tree.map(lambda x, s=s: x[s], partial) for s in range(partial.peak.shape[0]))
    return functools.reduce(lambda p, q: merge(p, q, beta_B1), parts)


def _top_ids(final_SBV, k):
    """Numbers (B, K) of the largest logits, ties to the lower number; each shard picks its own first."""
    shards, batch, rows = final_SBV.shape
    top_SBK, ids_SBK = jax.lax.top_k(final_SBV, min(k, rows))
    if shards == 1:
        return ids_SBK[0]
    ids_SBK += rows * jnp.arange(shards).reshape(-1, 1, 1)
    join = lambda x_SBK: x_SBK.swapaxes(0, 1).reshape(batch, -1)  # noqa: E731
    return jnp.take_along_axis(join(ids_SBK), jax.lax.top_k(join(top_SBK), k)[1], axis=-1)


def finish(partial: Partial, top_logits_BCK, top_ids_BK, final_BV, beta_B1) -> LayerStatistics:
    """Everything per layer, from the sums over the whole vocabulary (B, C) and the top tokens' logits."""
    # the second token's probability over the first's
    ratio = jnp.exp(beta_B1 * (partial.next - partial.peak))
    rest = ratio * partial.mass
    norm = 1 + rest
    # sum (l_j - peak) exp(beta (l_j - peak)), from the same sum taken around the second token
    slope = ratio * (partial.slope + (partial.next - partial.peak) * partial.mass)
    return LayerStatistics(
        log_norm_BC=beta_B1 * partial.peak + jnp.log1p(rest),
        entropy_BC=jnp.log1p(rest) - beta_B1 * slope / norm,
        max_prob_BC=1 / norm,
        margin_BC=(1 - ratio) / norm,
        argmax_BC=partial.peak_id,
        top_ids_BK=top_ids_BK,
        top_logits_BCK=top_logits_BCK,
        cosine_BEK=cosines(jax.tree.map(lambda x_BC: x_BC[:, :-1], partial), top_logits_BCK[:, :-1],
                           top_logits_BCK[:, :-1] - top_logits_BCK[:, -1:], top_ids_BK, beta_B1),
        final_BV=final_BV,
    )


def early_sums(h_PD, head, final_BV, row_P, beta_P1) -> Partial:
    """Sums [P] over the vocabulary of P early hidden states [P, D], each of any row and layer.

    Dense or tiled as `layer_statistics`. The final layer's logits [B, V] are there already: `row_P` [P] says which row
    of them belongs to each state. The tiled form copies these rows a tile at a time. beta_P1: 1 / temperature.
    """
    h_P1D, shards = h_PD[:, None], head.shards
    if head.tile is None:
        partial = _sums(head.project(h_P1D), head, beta_P1, final_BV[row_P, None])
    else:
        rows = head.vocabulary // shards
        first_S11 = rows * jnp.arange(shards).reshape(-1, 1, 1)
        final_SBV = final_BV.reshape(-1, shards, rows).swapaxes(0, 1)

        def step(partial, l_SP1V, start):
            final_SBv = jax.lax.dynamic_slice_in_dim(final_SBV, start, l_SP1V.shape[-1], axis=2)
            sums = partial_statistics(l_SP1V, first_S11 + start, beta_P1, final_SBv[:, row_P, None])
            return merge(partial, sums, beta_P1)

        nothing = empty_partial((shards, h_PD.shape[0], 1), beta_P1.dtype)
        partial = _join_shards(head.stream(h_P1D, nothing, step), beta_P1)
    return jax.tree.map(lambda x_P1: x_P1[:, 0], partial)


def cosines(early: Partial, early_BEK, gap_BEK, top_ids_BK, beta_B1):
    """cosine(P_n - e_i, l_n - l_N), (B, E, K). 0 where a layer equals the final one.

    early: sums (B, E) over the whole vocabulary; early_BEK: l_n(i), and gap_BEK: l_n(i) - l_N(i), at the tokens
    `top_ids_BK`; beta_B1: 1 / temperature.
    """
    early, beta_B11 = jax.tree.map(lambda x_BE: x_BE[..., None], early), beta_B1[..., None]
    ratio = jnp.exp(beta_B11 * (early.next - early.peak))
    norm = 1 + ratio * early.mass
    prob_BEK = jnp.exp(beta_B11 * (early_BEK - early.peak)) / norm
    # A token that is not the layer's first: P_i <= 1/2, so nothing below is a small difference.
    dot_BEK = (ratio * early.cross + early.peak_gap) / norm - gap_BEK
    length_sq_BEK = (1 + ratio**2 * early.mass_sq) / norm**2 - 2 * prob_BEK + 1
    # The layer's first token: P_i - 1 = -(the others' mass); the common factor ratio / norm drops out.
    dot_first = early.cross - early.peak_gap * early.mass
    length_sq_first = early.mass**2 + early.mass_sq
    first_BEK = early.peak_id == top_ids_BK[:, None]
    dot_BEK = jnp.where(first_BEK, dot_first, dot_BEK)
    length_sq_BEK = jnp.where(first_BEK, length_sq_first, length_sq_BEK)
    # Rooted one by one: the product of the squares may overflow where the lengths do not.
    length_BEK = jnp.sqrt(length_sq_BEK) * jnp.sqrt(early.gap_sq)
    return jnp.where(length_BEK > 0, dot_BEK / jnp.where(length_BEK > 0, length_BEK, 1), 0)
