"""Cross-entropy of many exits through one projection, without the logits of many exits.

The plain form holds exits x tokens x V logits, and once more for their gradient. Here one exit's logits of one chunk
of tokens exist at a time, and the gradient is formed where they are: by the time the loss is known, so is its
gradient, and the backward pass only scales it (as Liger's fused linear cross-entropy does, arXiv 2410.10989; `sled
bench loss` measures why: logits computed again in the backward pass are a fourth product for every three). Where
no gradient is asked for, none is formed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sled.checks import Whole
from sled.errors import SettingError

_LOGITS_BYTES = 128 * 2**20  # of a chunk's logits, unless told: fewer rows make slower products, see `sled bench loss`
_NO_TOKEN = -1e30  # the logit of a row that only pads the vocabulary; finite, since differences of it are taken


@dataclasses.dataclass(frozen=True)
class Split:
    """How a mesh splits the loss: the batch over the axes `data`, the vocabulary over the axes `tensor`.

    Axes of the mesh that neither names hold copies. Raises `SettingError` for an axis that the mesh lacks.
    """

    mesh: Mesh
    data: tuple[str, ...] = ("data",)
    tensor: tuple[str, ...] = ("tensor",)

    def __post_init__(self):
        for field in ("data", "tensor"):
            axes = getattr(self, field)
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            if missing := [axis for axis in axes if axis not in self.mesh.axis_names]:
                raise SettingError(f"Split.{field} names {missing}, but the axes of the mesh are "
                                   f"{self.mesh.axis_names}; name some of those, or none: ()")
            object.__setattr__(self, field, axes)

    def ways(self, axes: tuple[str, ...]) -> int:
        """Into how many parts these axes split."""
        return functools.reduce(lambda ways, axis: ways * self.mesh.shape[axis], axes, 1)


class ExitMetrics(NamedTuple):
    """What the loss was made of: weighted means over the targets, NaN for an exit of weight 0, not differentiable.

    nll_E: negative log-likelihood in nats.
    accuracy_E: how often no token's logit was above the target's.
    z_E: squared logarithm of the softmax's denominator.
    distillation_E: temperature^2 x KL divergence from the last exit in nats; None where distillation is off.
    targets: the sum of the mask, in float32 or wider: the number of targets where it is of zeros and ones.
    """

    nll_E: jax.Array
    accuracy_E: jax.Array
    z_E: jax.Array
    distillation_E: jax.Array | None
    targets: jax.Array


class _Terms(NamedTuple):
    """Traced coefficients; None switches a term off."""

    z_loss: jax.Array | None
    distill: jax.Array | None
    temperature: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static. `vocabulary`: rows of the projection that are tokens; `chunk`: tokens at a time on a device."""

    vocabulary: int
    chunk: int
    split: Split | None


def exit_cross_entropy(h_EBTD, w_VD, targets_BT, mask_BT, weights_E, *, z_loss=None, distill=None, temperature=1.0,
                       chunk: int | None = None, split: Split | None = None) -> tuple[jax.Array, ExitMetrics]:
    """sum_e weights_e mean_n(nll_en + z_loss z_en + distill T^2 KL(p_n || q_en)), a scalar in nats; and its parts.

    h_EBTD: normed hidden states of E exits, the last layer's last. Differentiable, as is w_VD.
    w_VD: the projection they share. An exit with one of its own is a call of its own, with E = 1.
    targets_BT: token ids, and mask_BT how much each counts in the mean. Where the mask is 0 any id may stand, and
        nothing of that token, finite or not, reaches the loss or a gradient. A target outside the vocabulary makes
        the loss NaN. Without any target loss and gradients are 0.
    weights_E: how much each exit counts. One of weight 0 is not computed at all, and its gradient is exactly 0.
    z_loss: weight of z = logsumexp(logits)^2 (PaLM, arXiv 2204.02311, section 5: 1e-4). None: off, at no cost.
    distill: weight of the divergence of each earlier exit's q = softmax(logits / T) from the last exit's p, through
        which no gradient flows (arXiv 1905.08094; T^2 as in 1503.02531). None: off, at no cost.
    temperature: T > 0 of the distillation.
    chunk: at most so many tokens at a time on each device; None picks by the size of their logits.
    split: the mesh to run on; without it one device's form. A vocabulary that does not divide is padded.

    Arithmetic is in float32, or float64 for such inputs; gradients come in the types of h and w. The gradient of w is
    summed once over exits and chunks. Mask, weights and coefficients are traced, and constants to differentiation.
    Raises `SettingError` for shapes that do not fit each other, distillation of a single exit, and a batch that
    `split` cannot divide.
    """
    exits, batch, tokens, _ = h_EBTD.shape
    _check_shapes(h_EBTD, w_VD, targets_BT, mask_BT, weights_E)
    if distill is not None and exits < 2:
        raise SettingError("distill is given, but there is only the last exit, which teaches the others; leave it None")
    vocabulary, ways = w_VD.shape[0], split.ways(split.tensor) if split else 1
    if split and batch % split.ways(split.data):
        raise SettingError(f"the batch has {batch} rows, which axes {split.data} of {split.ways(split.data)} devices "
                           "cannot split; give a multiple")
    wide = _wide(h_EBTD, w_VD)
    rows = -(-vocabulary // ways)
    if chunk is None:
        chunk = max(1, _LOGITS_BYTES // (rows * wide.itemsize))
    plan = _Plan(vocabulary, Whole(1, hint="it counts tokens")("chunk", chunk), split)
    if rows * ways > vocabulary:
        w_VD = jnp.pad(w_VD, ((0, rows * ways - vocabulary), (0, 0)))
    number = lambda x: None if x is None else jnp.asarray(x, wide)  # noqa: E731
    terms = _Terms(number(z_loss), number(distill), None if distill is None else number(temperature))
    return _loss(plan, h_EBTD, w_VD, jnp.asarray(targets_BT), number(mask_BT), number(weights_E), terms)


def _check_shapes(h_EBTD, w_VD, targets_BT, mask_BT, weights_E):
    exits, *tokens, width = h_EBTD.shape
    for name, array, shape in (("w_VD", w_VD, (w_VD.shape[0], width)), ("targets_BT", targets_BT, tuple(tokens)),
                               ("mask_BT", mask_BT, tuple(tokens)), ("weights_E", weights_E, (exits,))):
        if jnp.shape(array) != shape:
            raise SettingError(f"{name} is of shape {jnp.shape(array)}, but must be {shape} beside hidden states "
                               f"[E, B, T, D] of shape {h_EBTD.shape}; check its axes")


def _wide(h, w):
    return jnp.promote_types(jnp.float32, jnp.promote_types(h.dtype, w.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan, *args):
    return _run(plan, False, *args)[0]


def _forward(plan, *args):
    return _run(plan, True, *args)


def _backward(plan, gradients, cotangents):
    dh_EBTD, dw_VD = ((cotangents[0] * x).astype(x.dtype) for x in gradients)
    return dh_EBTD, dw_VD, None, None, None, None


_loss.defvjp(_forward, _backward)


def _run(plan, with_gradients, *args):
    """(loss, metrics), and the gradients of h and w or None, on one device or on each of the mesh."""
    run = functools.partial(_device_loss, plan, with_gradients)
    if plan.split is None:
        return run(*args)
    data, tensor = plan.split.data or None, plan.split.tensor or None
    h, w, batch, whole = (PartitionSpec(None, data), PartitionSpec(tensor), PartitionSpec(data), PartitionSpec())
    return jax.shard_map(run, mesh=plan.split.mesh, in_specs=(h, w, batch, batch, whole, whole),
                         out_specs=(whole, (h, w) if with_gradients else None))(*args)


def _device_loss(plan, with_gradients, h_EBTD, w_VD, targets_BT, mask_BT, weights_E, terms):
    """As `_run`, on this device's part of the batch and of the vocabulary."""
    exits, width, count = h_EBTD.shape[0], h_EBTD.shape[-1], targets_BT.size
    h_END, targets_N, mask_N = h_EBTD.reshape(exits, count, width), targets_BT.ravel(), mask_BT.ravel()
    data, tensor = (plan.split.data, plan.split.tensor) if plan.split else ((), ())
    targets = jax.lax.psum(mask_N.sum(), data)
    share_N = jnp.where(mask_N == 0, 0, mask_N / targets)
    chunks = -(-count // plan.chunk)
    size = -(-count // chunks)
    # Exits of weight 0 come last, where the loop does not reach.
    order_E, computed = jnp.argsort(weights_E == 0), jnp.sum(weights_E != 0)

    def chunk_step(i, carry):
        # The last chunk reaches back over tokens already done, which count nothing in it: no padding, no remainder.
        start = jnp.minimum(i * size, count - size)
        cut = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, start, size, axis)  # noqa: E731
        new_C = start + jnp.arange(size) >= i * size
        share_C, targets_C, h_ECD = jnp.where(new_C, cut(share_N), 0), cut(targets_N), cut(h_END, 1)
        live_C1 = (share_C != 0)[:, None]
        teacher_CV = None if terms.distill is None else _logits(plan, h_ECD[-1], w_VD)

        def exit_step(j, carry):
            sums_E4, gradients = carry
            e = order_E[j]
            h_CD = h_ECD[e]
            parts_4C, slope_CV = _exit_terms(plan, _logits(plan, h_CD, w_VD), targets_C, terms, teacher_CV)
            sums_E4 = sums_E4.at[e].add(jnp.where(live_C1.T, share_C * parts_4C, 0).sum(1))
            if with_gradients:
                dh_END, dw_VD = gradients
                # Rows that do not count leave every product: 0 times their infinities would be NaN.
                slope_CV = jnp.where(live_C1, weights_E[e] * share_C[:, None] * slope_CV, 0)
                slope_CV = slope_CV.astype(jnp.promote_types(h_CD.dtype, w_VD.dtype))
                dw_VD += _product(slope_CV.T, jnp.where(live_C1, h_CD, 0))
                dh_CD = jax.lax.psum(_product(slope_CV, w_VD), tensor).astype(h_CD.dtype)
                dh_CD = jnp.where(new_C[:, None], dh_CD, cut(dh_END[e]))
                gradients = jax.lax.dynamic_update_slice(dh_END, dh_CD[None], (e, start, 0)), dw_VD
            return sums_E4, gradients

        return jax.lax.fori_loop(0, computed, exit_step, carry)

    wide = _wide(h_EBTD, w_VD)
    varying = lambda x, axes: jax.lax.pcast(x, axes, to="varying") if axes else x  # noqa: E731
    gradients = (varying(jnp.zeros_like(h_END), data), varying(jnp.zeros(w_VD.shape, wide), (*data, *tensor)))
    carry = varying(jnp.zeros((exits, 4), wide), data), gradients if with_gradients else None
    sums_E4, gradients = jax.lax.fori_loop(0, chunks, chunk_step, carry)
    loss, metrics = _summary(jax.lax.psum(sums_E4, data), weights_E, terms, targets)
    if with_gradients:
        dh_END, dw_VD = gradients
        gradients = dh_END.reshape(h_EBTD.shape), jax.lax.psum(dw_VD, data).astype(w_VD.dtype)
    return (loss, metrics), gradients


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=_wide(a, b))


def _first(plan, rows):
    """The number of this device's first row of the projection."""
    return jax.lax.axis_index(plan.split.tensor) * rows if plan.split and plan.split.tensor else 0


def _logits(plan, h_CD, w_VD):
    logits_CV = _product(h_CD, w_VD.T)
    rows = w_VD.shape[0]
    if plan.split and rows * plan.split.ways(plan.split.tensor) > plan.vocabulary:
        logits_CV = jnp.where(_first(plan, rows) + jnp.arange(rows) < plan.vocabulary, logits_CV, _NO_TOKEN)
    return logits_CV


def _exit_terms(plan, logits_CV, targets_C, terms, teacher_CV):
    """nll, hit, z and divergence of each token [4, C], and the gradient [C, V] of the terms' sum by its logits."""
    tensor = plan.split.tensor if plan.split else ()
    rows = logits_CV.shape[1]
    ids_C1 = (targets_C - _first(plan, rows))[:, None]
    own_C1 = (ids_C1 >= 0) & (ids_C1 < rows)
    picked_C1 = jnp.take_along_axis(logits_CV, jnp.clip(ids_C1, 0, rows - 1), axis=1)
    target_C = jax.lax.psum(jnp.where(own_C1, picked_C1, 0)[:, 0], tensor)
    target_C = jnp.where((targets_C >= 0) & (targets_C < plan.vocabulary), target_C, jnp.nan)
    log_sum_C, peak_C = _log_sum(logits_CV, tensor)
    z_C = log_sum_C**2

    softmax_CV = jnp.exp(logits_CV - log_sum_C[:, None])
    if terms.z_loss is not None:
        softmax_CV *= 1 + 2 * terms.z_loss * log_sum_C[:, None]
    slope_CV = softmax_CV - (jnp.arange(rows) == ids_C1)
    divergence_C = jnp.zeros_like(z_C)
    if teacher_CV is not None:
        # The last exit meets itself: divergence and slope are 0 there without being told.
        log_p_CV, log_q_CV = ((x_CV := l_CV / terms.temperature) - _log_sum(x_CV, tensor)[0][:, None]
                              for l_CV in (teacher_CV, logits_CV))
        p_CV = jnp.exp(log_p_CV)
        divergence_C = terms.temperature**2 * jax.lax.psum((p_CV * (log_p_CV - log_q_CV)).sum(1), tensor)
        slope_CV += terms.distill * terms.temperature * (jnp.exp(log_q_CV) - p_CV)
    return jnp.stack([log_sum_C - target_C, target_C >= peak_C, z_C, divergence_C]), slope_CV


def _log_sum(logits_CV, tensor):
    """Logarithm of the softmax's denominator over the whole vocabulary, and the largest logit: [C] each."""
    peak_C = jax.lax.pmax(logits_CV.max(1), tensor)
    return peak_C + jnp.log(jax.lax.psum(jnp.exp(logits_CV - peak_C[:, None]).sum(1), tensor)), peak_C


def _summary(sums_E4, weights_E, terms, targets):
    nll_E, accuracy_E, z_E, distillation_E = jnp.where(weights_E == 0, jnp.nan, sums_E4.T)
    loss_E = nll_E
    if terms.z_loss is not None:
        loss_E += terms.z_loss * z_E
    if terms.distill is not None:
        loss_E += terms.distill * distillation_E
    loss = jnp.where(weights_E == 0, 0, weights_E * loss_E).sum()
    return loss, ExitMetrics(nll_E, accuracy_E, z_E, None if terms.distill is None else distillation_E, targets)
