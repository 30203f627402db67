"""Sums over the vocabulary that can be taken piece by piece: a monoid under `merge`.

Written so that float32 is enough. The textbook form of SLED's cosine subtracts nearly equal numbers once a
layer is confident; here each layer's most likely token is kept out of the sums, and the sums are scaled by
the second most likely one, so no term cancels or underflows however confident the layer is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Tokens per block when a large vocabulary is summed over logits that are there already.
_BLOCK = 16_384




class Partial(NamedTuple):
    """Statistics of logits l_j over a set of tokens, per row and layer; d_j = l_j - (final layer's l_j).

    With a = the most likely token of the set, n = the logit of the second most likely one and beta =
    1 / temperature:  peak = l_a;  peak_id = a (the lowest index among equals);  peak_gap = d_a;  next = n;
    over j != a, x_j = exp(beta (l_j - n)):  mass = sum x_j;  mass_sq = sum x_j^2;
    slope = sum (l_j - n) x_j;  cross = sum d_j x_j;  and over all j:  gap_sq = sum d_j^2.
    """

    peak: jax.Array
    peak_id: jax.Array
    peak_gap: jax.Array
    next: jax.Array
    mass: jax.Array
    mass_sq: jax.Array
    slope: jax.Array
    cross: jax.Array
    gap_sq: jax.Array


def inverse(temperature, dtype):
    """1 / temperature as a column (1, 1) or, given one per row, (B, 1)."""
    return 1 / jnp.asarray(temperature, dtype).reshape(-1, 1)


def partial_statistics(l_xCV, first, beta_x1, final_x1V=None) -> Partial:
    """`Partial` of logits (..., C, V) over the V tokens numbered from `first` (..., 1).

    final_x1V: the final layer's logits (..., 1, V), where they are not the last of the C.
    """
    peak, at = max_and_index(l_xCV)
    others = jnp.arange(l_xCV.shape[-1]) != at
    lowest = jnp.finfo(l_xCV.dtype).min  # finite: a set of one token then merges without inf - inf
    second = jnp.where(others, l_xCV, lowest).max(-1, keepdims=True)
    x = jnp.where(others, jnp.exp(beta_x1[..., None] * (l_xCV - second)), 0)
    d = l_xCV - (l_xCV[..., -1:, :] if final_x1V is None else final_x1V)
    return Partial(
        peak=peak[..., 0],
        peak_id=(first + at[..., 0]).astype(jnp.int32),
        peak_gap=jnp.take_along_axis(d, at, axis=-1)[..., 0],
        next=second[..., 0],
        mass=x.sum(-1),
        mass_sq=_dot(x, x),
        slope=_dot(x, l_xCV - second),
        cross=_dot(x, d),
        gap_sq=_dot(d, d),
    )


def max_and_index(x_xV):
    """The maximum over the last axis and the lowest index that attains it, both (..., 1).

    Two reductions that vectorise, where argmax does not on a CPU (6 times as slow at V = 1,000).
    """
    peak = x_xV.max(-1, keepdims=True)
    index = jnp.arange(x_xV.shape[-1], dtype=jnp.int32)
    return peak, jnp.where(x_xV == peak, index, x_xV.shape[-1] - 1).min(-1, keepdims=True)


def _dot(x, y):
    # As dot products, not sum(x * y): on a CPU, XLA vectorises the former only (8x), and recomputes the
    # exponentials for every sum. `highest` keeps accelerators from rounding the operands.
    return jnp.einsum("...v,...v->...", x, y, precision="highest")


def merge(p: Partial, q: Partial, beta_x1) -> Partial:
    """`Partial` of the union of two disjoint sets, of which `p` holds the lower token numbers.

    The token that loses the first place joins the sums; the sums are rescaled to the new second place.
    """
    p_wins = p.peak >= q.peak
    pick = lambda mine, other: jnp.where(p_wins, mine, other)  # noqa: E731
    loser, loser_gap = pick(q.peak, p.peak), pick(q.peak_gap, p.peak_gap)
    second = jnp.maximum(loser, jnp.maximum(p.next, q.next))
    shift_p, shift_q, shift_loser = p.next - second, q.next - second, loser - second
    scale_p, scale_q, y = (jnp.exp(beta_x1 * shift) for shift in (shift_p, shift_q, shift_loser))
    return Partial(
        peak=jnp.maximum(p.peak, q.peak),
        peak_id=pick(p.peak_id, q.peak_id),
        peak_gap=pick(p.peak_gap, q.peak_gap),
        next=second,
        mass=p.mass * scale_p + q.mass * scale_q + y,
        mass_sq=p.mass_sq * scale_p**2 + q.mass_sq * scale_q**2 + y**2,
        slope=(p.slope + shift_p * p.mass) * scale_p + (q.slope + shift_q * q.mass) * scale_q + shift_loser * y,
        cross=p.cross * scale_p + q.cross * scale_q + loser_gap * y,
        gap_sq=p.gap_sq + q.gap_sq,
    )


def empty_partial(shape, dtype) -> Partial:
    """The neutral element of `merge`: no tokens. Finite, so that rescaling it gives 0, not 0 * inf."""
    zero, lowest = jnp.zeros(shape, dtype), jnp.full(shape, jnp.finfo(dtype).min)
    return Partial(lowest, jnp.zeros(shape, jnp.int32), zero, lowest, zero, zero, zero, zero, zero)


def blockwise_statistics(l_BCV, beta_B1, final_B1V=None) -> Partial:
    """As `partial_statistics`, for a large vocabulary with temporaries of one block instead of twice the logits.

    On a CPU that keeps them in cache and spares the system fresh pages: 8% of a step at V = 128,256.
    """
    vocabulary = l_BCV.shape[-1]
    if vocabulary <= 2 * _BLOCK:
        return partial_statistics(l_BCV, 0, beta_B1, final_B1V)

    def add(partial, first, size):
        l_BCv, final_B1v = jax.tree.map(  # which leaves None as it is
            lambda l_BxV: jax.lax.dynamic_slice_in_dim(l_BxV, first, size, axis=-1), (l_BCV, final_B1V))
        return merge(partial, partial_statistics(l_BCv, first, beta_B1, final_B1v), beta_B1)

    def body(i, partial):
        return add(partial, i * _BLOCK, _BLOCK)

    whole = vocabulary // _BLOCK
    partial = jax.lax.fori_loop(0, whole, body, empty_partial(l_BCV.shape[:-1], l_BCV.dtype))
    return add(partial, whole * _BLOCK, vocabulary % _BLOCK) if vocabulary % _BLOCK else partial
