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
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sled.errors import SettingError
from sled.fusion.projection import SharedHead
from sled.settings.rules import Number, Whole, is_array

_CHUNK = 512  # the fewest tokens at a time, unless told: fewer make slower products
_NO_TOKEN = -1e30  # the logit of a row that only pads the vocabulary; finite, since differences of it are taken


@dataclasses.dataclass(frozen=True)
class Split:
    """The way in which a mesh splits the loss: the batch over the axes `data`, the vocabulary over the axes `tensor`.

    Axes of the mesh that neither names hold copies. Inside a `shard_map` over other axes (pipeline stages) the mesh is
    `jax.sharding.get_abstract_mesh()`, and a projection that all stages share is cast to vary over them.
    Raises `SettingError` for an axis that the mesh lacks.
    """

    mesh: Mesh | AbstractMesh
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
        return math.prod(self.mesh.shape[axis] for axis in axes)


class ExitMetrics(NamedTuple):
    """The parts of the loss: weighted means over the targets, NaN for an exit of weight 0, not differentiable.

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


def exit_cross_entropy(h_EBTD, head: SharedHead, targets_BT, mask_BT, weights_E, *, z_loss=None, distill=None,
                       temperature=1.0, chunk: int | None = None,
                       split: Split | None = None) -> tuple[jax.Array, ExitMetrics]:
    """sum_e weights_e mean_n(nll_en + z_loss z_en + distill T^2 KL(p_n || q_en)), a scalar in nats; and its parts.

    h_EBTD: normed hidden states of E exits, the last layer's last. Differentiable, as is the head.
    head: the projection they share. An exit with one of its own is a call of its own, with E = 1.
    targets_BT: token ids, and mask_BT how much each counts in the mean. Where the mask is 0 any id may stand, and
        nothing of that token, finite or not, reaches the loss or a gradient, and it is not projected. A target outside
        the vocabulary makes the loss NaN. Without any target loss and gradients are 0.
    weights_E: how much each exit counts. One of weight 0 is not computed at all, and its gradient is exactly 0.
    z_loss: weight of z = logsumexp(logits)^2 (PaLM, arXiv 2204.02311, section 5: 1e-4). None: off, at no cost.
    distill: weight of the divergence of each earlier exit's q = softmax(logits / T) from the last exit's p, through
        which no gradient flows (arXiv 1905.08094; T^2 as in 1503.02531). None: off, at no cost.
    temperature: T > 0 of the distillation.
    chunk: at most so many tokens at a time on each device. None: D, so that their logits are as large as the gradient
        of w that is held anyway, but no fewer than 512.
    split: the mesh to run on; without it one device's form. A vocabulary that does not divide is padded.

    Arithmetic is in float32, or float64 for such inputs; gradients come in the types of h and w. The gradient of w is
    summed once over exits and chunks. Mask, weights and coefficients are traced, and constants to differentiation.
    Raises `SettingError` for shapes that do not fit each other, distillation of a single exit, and a batch that
    `split` cannot divide.
    """
    h_EBTD, targets_BT, mask_BT, weights_E = map(jnp.asarray, (h_EBTD, targets_BT, mask_BT, weights_E))
    _check_shapes(h_EBTD, head.w_VD, targets_BT, mask_BT, weights_E)
    exits, batch, _, width = h_EBTD.shape
    if distill is not None and exits < 2:
        raise SettingError("distill is given, but there is only the last exit, which teaches the others; leave it None")
    vocabulary, ways = head.vocabulary, split.ways(split.tensor) if split else 1
    if split and batch % split.ways(split.data):
        raise SettingError(f"the batch has {batch} rows, which axes {split.data} of {split.ways(split.data)} devices "
                           "cannot split; give a multiple")
    wide = head.dtype(h_EBTD)
    chunk = max(_CHUNK, width) if chunk is None else Whole(1, hint="it counts tokens")("chunk", chunk)
    plan = _Plan(vocabulary, chunk, *((split.mesh, split.data, split.tensor) if split else (None, (), ())))
    if vocabulary % ways:
        head = head.with_weights(jnp.pad(head.w_VD, ((0, -vocabulary % ways), (0, 0))))
    coefficients = _Coefficients(_number("z_loss", z_loss, wide), _number("distill", distill, wide),
                                None if distill is None else _number("temperature", temperature, wide, positive=True))
    return _loss(plan, h_EBTD, head, targets_BT, mask_BT.astype(wide), weights_E.astype(wide), coefficients)


def _number(name, value, dtype, positive=False):
    if value is None:
        return None
    rule = Number(0, open_low=positive, hint="an array is traced, and not checked")
    return jnp.asarray(value if is_array(value) else rule(name, value), dtype)


def _check_shapes(h_EBTD, w_VD, targets_BT, mask_BT, weights_E):
    if h_EBTD.ndim != 4 or w_VD.ndim != 2 or 0 in h_EBTD.shape:
        raise SettingError(f"hidden states are of shape {h_EBTD.shape} and w_VD of {w_VD.shape}, but must be "
                           "[E, B, T, D] and [V, D], none of them 0; reshape them")
    exits, *tokens, width = h_EBTD.shape
    for name, array, shape in (("w_VD", w_VD, (w_VD.shape[0], width)), ("targets_BT", targets_BT, tuple(tokens)),
                               ("mask_BT", mask_BT, tuple(tokens)), ("weights_E", weights_E, (exits,))):
        if array.shape != shape:
            raise SettingError(f"{name} is of shape {array.shape}, but must be {shape} beside hidden states "
                               f"[E, B, T, D] of shape {h_EBTD.shape}; check its axes")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan, *args):
    return _run(plan, (False, False), *args)[0]


def _forward(plan, *primals):
    """The loss and what the backward pass scales: the gradients of h and head, None where nothing depends on one."""
    return _run(plan, (primals[0].perturbed, primals[1].w_VD.perturbed), *jax.tree.map(lambda x: x.value, primals))


def _backward(plan, gradients, cotangents):
    if isinstance(cotangents[0], jax.custom_derivatives.SymbolicZero):
        gradients = None, None  # only the metrics were differentiated
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
    return *scaled, None, None, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(plan, wanted, *args):
    """(loss, metrics) and the gradients of h and head, those that are `wanted`, on one device or each of the mesh."""
    run = functools.partial(_device_loss, plan, wanted)
    if plan.mesh is None:
        return run(*args)
    data, tensor = plan.data or None, plan.tensor or None
    h, w, batch, whole = (PartitionSpec(None, data), PartitionSpec(tensor), PartitionSpec(data), PartitionSpec())
    return jax.shard_map(run, mesh=plan.mesh, in_specs=(h, w, batch, batch, whole, whole),
                         out_specs=(whole, (h, w)))(*args)


def _device_loss(plan, wanted, h_EBTD, head, targets_BT, mask_BT, weights_E, coefficients):
    """As `_run`, on this device's part of the batch and of the vocabulary."""
    exits, width, count = h_EBTD.shape[0], h_EBTD.shape[-1], targets_BT.size
    h_END, targets_N, mask_N = h_EBTD.reshape(exits, count, width), targets_BT.ravel(), mask_BT.ravel()
    targets = _psum(mask_N.sum(), plan.data)
    share_N = jnp.where(mask_N == 0, 0, mask_N / targets)
    size = -(-count // -(-count // plan.chunk))
    # Tokens that count come first, in their order, and exits of weight 0 last: the loops end before the rest.
    order_N, live = jnp.argsort(mask_N == 0), _pmax(jnp.sum(mask_N != 0), plan.data)
    order_E, computed = jnp.argsort(weights_E == 0), jnp.sum(weights_E != 0)

    def chunk_step(i, carry):
        # The last chunk reaches back over tokens already done, which count nothing in it: no padding, no remainder.
        start = jnp.minimum(i * size, count - size)
        tokens_C, new_C = jax.lax.dynamic_slice_in_dim(order_N, start, size), start + jnp.arange(size) >= i * size
        share_C, targets_C, h_ECD = jnp.where(new_C, share_N[tokens_C], 0), targets_N[tokens_C], h_END[:, tokens_C]
        live_C1 = (share_C != 0)[:, None]
        teacher_CV = None if coefficients.distill is None else plan.mask(head.project(h_ECD[-1]))

        def exit_step(j, carry):
            sums_E4, dh_END, dw_VD = carry
            # The barrier keeps XLA from making a [C, V] of the targets once for all exits, and holding it.
            e, ids_C = jax.lax.optimization_barrier((order_E[j], targets_C))
            # Rows that do not count leave every product: 0 times their infinities would be NaN.
            logits_CV, pull_back = head.project_vjp(jnp.where(live_C1, h_ECD[e], 0))
            terms_4C, slope_CV = _token_loss(plan, plan.mask(logits_CV), ids_C, coefficients, teacher_CV)
            sums_E4 = sums_E4.at[e].add(jnp.where(live_C1.T, share_C * terms_4C, 0).sum(1))
            slope_CV = jnp.where(live_C1, weights_E[e] * share_C[:, None] * slope_CV, 0)
            dh_CD, exit_dw_VD = pull_back(slope_CV, *wanted)
            if dh_CD is not None:
                dh_CD = _psum(dh_CD, plan.tensor).astype(h_END.dtype)
                dh_END = dh_END.at[e, tokens_C].add(dh_CD, unique_indices=True)
            if exit_dw_VD is not None:
                dw_VD += exit_dw_VD
            return sums_E4, dh_END, dw_VD

        return jax.lax.fori_loop(0, computed, exit_step, carry)

    w_VD, wide, rows = head.w_VD, head.dtype(h_EBTD), (h_END, share_N, weights_E)
    sums_E4, dh_END, dw_VD = jax.lax.fori_loop(0, -(-live // size), chunk_step, (
        _zeros((exits, 4), wide, *rows),
        _zeros(h_END.shape, h_END.dtype, *rows) if wanted[0] else None,
        _zeros(w_VD.shape, wide, *rows, w_VD) if wanted[1] else None))
    dh_EBTD = None if dh_END is None else dh_END.reshape(h_EBTD.shape)
    dhead = None if dw_VD is None else head.with_weights(_psum(dw_VD, plan.data).astype(w_VD.dtype))
    return _summary(_psum(sums_E4, plan.data), weights_E, coefficients, targets), (dh_EBTD, dhead)


def _zeros(shape, dtype, *like):
    """Zeros that inside a `shard_map` count as varying over every axis that one of `like` varies over."""
    return jnp.zeros(shape, dtype) + sum(jnp.zeros_like(x[(0,) * x.ndim], dtype) for x in like)


def _summary(sums_E4, weights_E, coefficients, targets):
    nll_E, accuracy_E, z_E, distillation_E = jnp.where(weights_E == 0, jnp.nan, sums_E4.T)
    loss_E = nll_E
    if coefficients.z_loss is not None:
        loss_E += coefficients.z_loss * z_E
    if coefficients.distill is not None:
        loss_E += coefficients.distill * distillation_E
    loss = jnp.where(weights_E == 0, 0, weights_E * loss_E).sum()
    return loss, ExitMetrics(nll_E, accuracy_E, z_E, None if coefficients.distill is None else distillation_E, targets)


class _Coefficients(NamedTuple):
    """Traced weights of the terms beside the likelihood, and the distillation's temperature; None is off."""

    z_loss: jax.Array | None
    distill: jax.Array | None
    temperature: jax.Array | None


def _psum(x, axes: tuple[str, ...]):
    """The sum over mesh axes, of which there may be none."""
    return jax.lax.psum(x, axes) if axes else x


def _pmax(x, axes: tuple[str, ...]):
    """The largest over mesh axes, of which there may be none."""
    return jax.lax.pmax(x, axes) if axes else x


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the vocabulary's size, tokens at a time on a device, and the mesh with its axes (see `Split`).

    Rows of the projection are split evenly over the axes `tensor`, the last rows padding.
    """

    vocabulary: int
    chunk: int
    mesh: Mesh | AbstractMesh | None
    data: tuple[str, ...]
    tensor: tuple[str, ...]

    def rows(self, count: int):
        """The numbers of this device's rows, of which each device has `count`."""
        first = jax.lax.axis_index(self.tensor) * count if self.tensor else 0
        return first + jnp.arange(count)

    def mask(self, logits_CV):
        """Logits over this device's rows, those of rows that only pad the vocabulary out of reach."""
        count = logits_CV.shape[1]
        padded = count * (jax.lax.axis_size(self.tensor) if self.tensor else 1) > self.vocabulary
        return jnp.where(self.rows(count) < self.vocabulary, logits_CV, _NO_TOKEN) if padded else logits_CV

    def sum(self, x_CV):
        """Over all tokens: [C]."""
        return _psum(x_CV.sum(1), self.tensor)

    def log_sum(self, logits_CV):
        """Logarithm of the softmax's denominator, and the largest logit: [C] each."""
        peak_C = _pmax(logits_CV.max(1), self.tensor)
        return peak_C + jnp.log(self.sum(jnp.exp(logits_CV - peak_C[:, None]))), peak_C

    def log_softmax(self, logits_CV):
        return logits_CV - self.log_sum(logits_CV)[0][:, None]

    def pick(self, logits_CV, ids_C):
        """The logit of one token each, [C], from the device that has it; NaN where none has."""
        rows = self.rows(logits_CV.shape[1])
        ids_C1 = (ids_C - rows[0])[:, None]
        mine_C1 = (ids_C1 >= 0) & (ids_C1 < rows.size)
        picked_C1 = jnp.take_along_axis(logits_CV, jnp.clip(ids_C1, 0, rows.size - 1), axis=1)
        inside_C = (ids_C >= 0) & (ids_C < self.vocabulary)
        return jnp.where(inside_C, self.sum(jnp.where(mine_C1, picked_C1, 0)), jnp.nan)


def _token_loss(plan: _Plan, logits_CV, targets_C, coefficients: _Coefficients, teacher_CV=None):
    """Each token's terms [4, C]: nll, hit, z, divergence; and the slope [C, V] of what they add up to, by the logits.

    A hit is a target that no other token's logit exceeds. `teacher_CV` are the last exit's logits, where
    `coefficients.distill` is on.
    """
    log_sum_C, peak_C = plan.log_sum(logits_CV)
    target_C = plan.pick(logits_CV, targets_C)
    softmax_CV = jnp.exp(logits_CV - log_sum_C[:, None])
    if coefficients.z_loss is not None:
        softmax_CV *= 1 + 2 * coefficients.z_loss * log_sum_C[:, None]
    slope_CV = softmax_CV - (plan.rows(logits_CV.shape[1]) == targets_C[:, None])
    divergence_C = jnp.zeros_like(log_sum_C)
    if teacher_CV is not None:
        # The last exit meets itself here: its divergence and slope are 0 without a case of their own.
        temperature = coefficients.temperature
        log_p_CV, log_q_CV = (plan.log_softmax(l_CV / temperature) for l_CV in (teacher_CV, logits_CV))
        p_CV = jnp.exp(log_p_CV)
        divergence_C = temperature**2 * plan.sum(p_CV * (log_p_CV - log_q_CV))
        slope_CV += coefficients.distill * temperature * (jnp.exp(log_q_CV) - p_CV)
    return jnp.stack([log_sum_C - target_C, target_C >= peak_C, log_sum_C**2, divergence_C]), slope_CV
