"""What one exit's logits of a chunk of tokens cost, and the slope of that cost: the inner part of
`cross_entropy`.

The logits may be a device's part of the vocabulary; then sums over all of it are taken over the mesh.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

_NO_TOKEN = -1e30  # the logit of a row that only pads the vocabulary; finite, since differences of it are taken


class Coefficients(NamedTuple):
    """Traced weights of the terms beside the likelihood, and the distillation's temperature; None is off."""

    z_loss: jax.Array | None
    distill: jax.Array | None
    temperature: jax.Array | None


def wide_dtype(a, b):
    """The type in which products of a and b are summed: float32, or float64 where one of them is."""
    return jnp.promote_types(jnp.float32, jnp.promote_types(a.dtype, b.dtype))


def product(a, b):
    """a @ b, summed and returned in `wide_dtype`."""
    return jnp.matmul(a, b, preferred_element_type=wide_dtype(a, b))


def psum(x, axes: tuple[str, ...]):
    """The sum over mesh axes, of which there may be none."""
    return jax.lax.psum(x, axes) if axes else x


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` tokens, their rows of the projection split evenly over the mesh axes `axes`, the last rows padding."""

    size: int
    axes: tuple[str, ...] = ()

    def first(self, rows: int):
        """The number of this device's first row, where each has `rows`."""
        return jax.lax.axis_index(self.axes) * rows if self.axes else 0

    def logits(self, h_CD, w_VD):
        """[C, V] over this device's rows."""
        logits_CV = product(h_CD, w_VD.T)
        rows = w_VD.shape[0]
        if rows * self._ways() > self.size:
            logits_CV = jnp.where(self.first(rows) + jnp.arange(rows) < self.size, logits_CV, _NO_TOKEN)
        return logits_CV

    def sum(self, x_CV):
        """Over all tokens: [C]."""
        return psum(x_CV.sum(1), self.axes)

    def log_sum(self, logits_CV):
        """Logarithm of the softmax's denominator, and the largest logit: [C] each."""
        peak_C = logits_CV.max(1)
        peak_C = jax.lax.pmax(peak_C, self.axes) if self.axes else peak_C
        return peak_C + jnp.log(self.sum(jnp.exp(logits_CV - peak_C[:, None]))), peak_C

    def pick(self, logits_CV, ids_C):
        """The logit of one token each, [C], from the device that has it; NaN where none has."""
        rows = logits_CV.shape[1]
        ids_C1 = (ids_C - self.first(rows))[:, None]
        mine_C1 = (ids_C1 >= 0) & (ids_C1 < rows)
        picked_C1 = jnp.take_along_axis(logits_CV, jnp.clip(ids_C1, 0, rows - 1), axis=1)
        return jnp.where((ids_C >= 0) & (ids_C < self.size), self.sum(jnp.where(mine_C1, picked_C1, 0)), jnp.nan)

    def one_hot(self, ids_C, rows: int):
        """Whether this device's rows are the token: [C, V]."""
        return self.first(rows) + jnp.arange(rows) == ids_C[:, None]

    def _ways(self) -> int:
        return jax.lax.axis_size(self.axes) if self.axes else 1


def exit_terms(vocabulary: Vocabulary, logits_CV, targets_C, coefficients: Coefficients, teacher_CV=None):
    """Each token's terms [4, C]: nll, hit, z, divergence; and the slope [C, V] of what they add up to, by the logits.

    A hit is a target that no other token's logit exceeds. `teacher_CV` are the last exit's logits, where
    `coefficients.distill` is on.
    """
    log_sum_C, peak_C = vocabulary.log_sum(logits_CV)
    target_C = vocabulary.pick(logits_CV, targets_C)
    softmax_CV = jnp.exp(logits_CV - log_sum_C[:, None])
    if coefficients.z_loss is not None:
        softmax_CV *= 1 + 2 * coefficients.z_loss * log_sum_C[:, None]
    slope_CV = softmax_CV - vocabulary.one_hot(targets_C, logits_CV.shape[1])
    divergence_C = jnp.zeros_like(log_sum_C)
    if teacher_CV is not None:
        # The last exit meets itself here: its divergence and slope are 0 without a case of their own.
        temperature = coefficients.temperature
        log_p_CV, log_q_CV = (_log_softmax(vocabulary, l_CV / temperature) for l_CV in (teacher_CV, logits_CV))
        p_CV = jnp.exp(log_p_CV)
        divergence_C = temperature**2 * vocabulary.sum(p_CV * (log_p_CV - log_q_CV))
        slope_CV += coefficients.distill * temperature * (jnp.exp(log_q_CV) - p_CV)
    return jnp.stack([log_sum_C - target_C, target_C >= peak_C, log_sum_C**2, divergence_C]), slope_CV


def _log_softmax(vocabulary, logits_CV):
    return logits_CV - vocabulary.log_sum(logits_CV)[0][:, None]
