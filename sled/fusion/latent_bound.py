"""Proof, row by row, that SLED's latent distribution cannot move the choice, with few early layers projected.

SLED's first token 1 stays ahead of token i if, with a = rate / temperature, l_1 - l_i > a (p_1 - p_i) + a (L_i - L_1).
L = P_latent weighs what each early layer n says for itself, r_n(i) = m_n(i) / sum_j m_n(j), by weights that sum to 1.
So L_i - L_1 is at most the largest r_n(i) - r_n(1) of any layer, and layers may be bounded one by one:

1. From logits at the top tokens and at the first `PROBE` rows of the projection alone. With d = l_n - l_N, the cosine's
   numerator is A - d_i, where A = sum_v P_n(v) d(v) = temperature (KL(P_n || P_N) + log Z_n - log Z_N), which is not
   below temperature (log z - log Z_N) for z the part of Z_n that is known: so A - d_1 >= X. Then
       (A - d_i) / (A - d_1) <= 1 + max(d_1 - d_i, 0) / X,
       |P_n - e_1|^2 / |P_n - e_i|^2 <= 1 + 2 P_n(i) / (1 - P_n(i))^2, and at most 1 where l_n(i) <= l_n(1),
   whose squares' product bounds Q = m_n(i) / m_n(1); and r_n(i) - r_n(1) <= (Q - 1) / (Q + 1).
2. Layers for which that is not enough are projected, and r_n is taken from their cosines.

Logits that are computed elsewhere, with sums in another order, differ by rounding: every bound holds a margin for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sled.fusion.certain import ROUNDING
from sled.fusion.partial import inverse
from sled.fusion.statistics import cosines, early_sums

PROBE = 256  # rows of the projection; in most vocabularies single bytes and the most frequent pieces of words
FEW_LAYERS = 12  # a row: more are not projected one by one, as all layers then take hardly longer


def none_moves(h_BCD, head, final_BV, top_ids_BK, kept_BK, temperature, room_BK, asked_B):
    """Of the rows asked for [B], those in which no early layer's r_n(i) - r_n(1) reaches room(i) for any token i.

    h_BCD: hidden states as they enter the projection, the final layer's last; final_BV: its logits; top_ids_BK: its
    most likely tokens, the first of which is token 1; kept_BK: those that take part, [B, K], or [1, K] where they are
    the same in all rows; temperature: a number or one per row (B,). Layers are projected, by the head's tile, as far as
    that is needed to say so.
    """
    beta_B1, kept_BK = inverse(temperature, final_BV.dtype), jnp.broadcast_to(kept_BK, top_ids_BK.shape)
    batch, early = h_BCD.shape[0], h_BCD.shape[1] - 1
    l_BCK = head.project_rows(h_BCD, top_ids_BK)
    moved_BEK, error_BE = _bound_from_few(h_BCD, head, final_BV, l_BCK, beta_B1)
    counts_BK = kept_BK.at[:, 0].set(False)
    reaches = lambda moved_xK, room_xK, counts_xK: (counts_xK & ~(moved_xK < room_xK)).any(-1)  # noqa: E731
    open_BE = asked_B[:, None] & reaches(moved_BEK, room_BK[:, None], counts_BK[:, None])
    if FEW_LAYERS >= early:  # step 2 would cost what it spares
        return asked_B & ~open_BE.any(1)
    size = FEW_LAYERS * batch
    h_PD = h_BCD[:, :-1].reshape(batch * early, -1)
    error_P, beta_P1 = error_BE.reshape(-1), jnp.broadcast_to(beta_B1, (batch, early)).reshape(-1, 1)

    def project():
        at_S = jnp.nonzero(open_BE.reshape(-1), size=size, fill_value=batch * early)[0]
        real_S, at_S = at_S < batch * early, jnp.minimum(at_S, batch * early - 1)
        row_S = at_S // early
        sums = early_sums(h_PD[at_S], head, final_BV, row_S, beta_P1[at_S])
        early_SK = l_BCK[row_S, at_S % early]
        cosine_SK = cosines(jax.tree.map(lambda x_S: x_S[:, None], sums), early_SK[:, None],
                            (early_SK - l_BCK[row_S, -1])[:, None], top_ids_BK[row_S], beta_P1[at_S])[:, 0]
        moved_SK = _moved(cosine_SK, error_P[at_S] / jnp.sqrt(sums.gap_sq), kept_BK[row_S])
        fails_S = real_S & reaches(moved_SK, room_BK[row_S], counts_BK[row_S])
        return asked_B & ~jnp.zeros_like(asked_B).at[row_S].max(fails_S)

    few = open_BE.any() & (open_BE.sum() <= size)
    return jax.lax.cond(few, project, lambda: asked_B & ~open_BE.any(1))


def _bound_from_few(h_BCD, head, final_BV, l_BCK, beta_B1):
    """Step 1: bounds of r_n(i) - r_n(1), [B, E, K], and what rounding may add to a layer's A - d_i, [B, E].

    l_BCK: all layers' logits at the top tokens.
    """
    probe_BEV = head.some(PROBE).project(h_BCD[:, :-1])
    early_BEK, d_BEK = l_BCK[:, :-1], l_BCK[:, :-1] - l_BCK[:, -1:]
    beta_B11 = beta_B1[..., None]
    log_part = lambda l_xV: jax.nn.logsumexp(beta_B11 * l_xV, axis=-1)  # noqa: E731
    log_z_BE = jnp.maximum(log_part(probe_BEV), log_part(early_BEK))
    log_norm_B1 = jax.nn.logsumexp(beta_B1 * final_BV, axis=-1, keepdims=True)
    largest = lambda l_xV: jnp.abs(l_xV).max(-1)  # noqa: E731
    error_BE = 8 * ROUNDING * (1 + beta_B1) * (
        jnp.maximum(largest(probe_BEV), largest(early_BEK)) + largest(final_BV)[:, None])
    error_BE1 = error_BE[..., None]
    first_BE1 = ((log_z_BE - log_norm_B1) / beta_B1)[..., None] - d_BEK[..., :1] - error_BE1  # X
    ratio_BEK = 1 + (jnp.maximum(d_BEK[..., :1] - d_BEK, 0) + 2 * error_BE1) / first_BE1
    # Of a layer's token that may be likelier there than token 1.
    p_BEK = jnp.exp(jnp.minimum(beta_B11 * (early_BEK + error_BE1) - log_z_BE[..., None], 0))
    longer_BEK = jnp.where(early_BEK > early_BEK[..., :1] - error_BE1, 1 + 2 * p_BEK / (1 - p_BEK) ** 2, 1)
    return jnp.where(first_BE1 > 0, 1 - 2 / (1 + ratio_BEK**2 * longer_BEK), 1), error_BE


def _moved(cosine_SK, error_S, kept_SK):
    """Step 2: bounds of r_n(i) - r_n(1), [S, K], of cosines that are right within error_S."""
    squares = lambda x_SK: jnp.where(kept_SK, jnp.maximum(x_SK, 0) ** 2, 0)  # noqa: E731
    high_SK, low_SK = squares(cosine_SK + error_S[:, None]), squares(cosine_SK - error_S[:, None])
    total_S1 = low_SK.sum(-1, keepdims=True)
    more_SK = jnp.maximum(high_SK - low_SK[:, :1], 0)
    return jnp.where(more_SK == 0, 0, jnp.where(total_S1 > 0, more_SK / total_S1, 1))
