"""The streaming form of `layer_statistics`: one pass over tiles of vocabulary rows.

Holds per row and layer the nine numbers of `Partial`, and the final layer's logits (B x V); never the
logits of all candidate layers. With a projection split over devices every device walks its own rows, and
only the small statistics travel.
"""

import functools

import jax
import jax.numpy as jnp

from sled.fusion.statistics import LayerStatistics, empty_partial, finish, inverse, merge, partial_statistics


def tiled_statistics(h_BCD, head, k: int, temperature=1.0) -> LayerStatistics:
    """As `layer_statistics`, with `head.tile` vocabulary rows of each of `head.shards` shards at a time."""
    batch, candidates, _ = h_BCD.shape
    dtype, shards = head.dtype(h_BCD), head.shards
    rows = head.vocabulary // shards
    first_S11 = rows * jnp.arange(shards).reshape(-1, 1, 1)
    beta_B1 = inverse(temperature, dtype)

    def step(carry, l_SBCV, start):
        partial, final_SBV = carry
        final_SBV = jax.lax.dynamic_update_slice_in_dim(final_SBV, l_SBCV[:, :, -1], start, axis=2)
        return merge(partial, partial_statistics(l_SBCV, first_S11 + start, beta_B1), beta_B1), final_SBV

    nothing = empty_partial((shards, batch, candidates), dtype)
    partial, final_SBV = head.stream(h_BCD, (nothing, jnp.zeros((shards, batch, rows), dtype)), step)
    parts = (jax.tree.map(lambda x, s=s: x[s], partial) for s in range(shards))
    partial = functools.reduce(lambda p, q: merge(p, q, beta_B1), parts)
    top_ids_BK = _top_ids(final_SBV, min(k, head.vocabulary))
    # The early logits at the top tokens are known to be wanted only now: project on those K rows alone.
    top_logits_BCK = head.project_rows(h_BCD, top_ids_BK)
    final_BV = final_SBV.swapaxes(0, 1).reshape(batch, -1)
    return finish(partial, top_logits_BCK, top_ids_BK, final_BV, beta_B1)


def _top_ids(final_SBV, k):
    """Numbers (B, K) of the largest logits, ties to the lower number; each shard picks its own first."""
    shards, batch, rows = final_SBV.shape
    top_SBK, ids_SBK = jax.lax.top_k(final_SBV, min(k, rows))
    if shards == 1:
        return ids_SBK[0]
    ids_SBK += rows * jnp.arange(shards).reshape(-1, 1, 1)
    join = lambda x_SBK: x_SBK.swapaxes(0, 1).reshape(batch, -1)  # noqa: E731
    return jnp.take_along_axis(join(ids_SBK), jax.lax.top_k(join(top_SBK), k)[1], axis=-1)
