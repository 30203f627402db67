"""A mixture of experts in the MLP's place: of many MLPs a router chooses a few for each token.

Shazeer et al. 2017 (arXiv 1701.06538), as Mixtral (2401.04088) has it: an expert takes all tokens that chose it, so
that none is dropped and none depends on another.

Axes: B rows, T tokens, D width, X experts, A chosen by a token, F feed-forward width of one expert; P pairs of a token
and an expert that it chose; M blocks of R pairs of one expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from sled.models.config import DecoderConfig, Experts
from sled.models.layers.basic import Linear, parameter
from sled.models.layers.mlp import FUNCTIONS
from sled.models.sharding.mesh import ROWS, ways_in_use

MOST_ROWS = 128  # of a block: more make no faster products, and more of a block is empty
LEAST_ROWS = 8  # fewer would not be faster, unless every pair has another expert
CACHE_BYTES = 2**19  # of a stretch of a matrix that is copied, read, and forgotten, within a CPU's cache


class Routing(NamedTuple):
    """The router's logits, float32 (or wider), and the experts that it chose, the best first."""

    logits_BTX: jax.Array
    chosen_BTA: jax.Array


class ExpertLinear(nnx.Module):
    """The matrices [X, in, out] of all experts, and their biases [X, out]; `axes` as of `Linear`."""

    def __init__(self, count: int, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.weight = parameter(init(rngs.params(), (count, d_in, d_out), dtype), "experts", *axes)
        out = "vector" if axes[1] == "width" else axes[1]
        self.bias = parameter(jnp.zeros((count, d_out), dtype), "experts", out) if bias else None


class Matrices(NamedTuple):
    """What experts multiply with, but for the last bias: of all, [X, ...], of each pair, [P, ...], or of one."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None
    up_bias: jax.Array | None

    def map(self, function: Callable, *others: Matrices) -> Matrices:
        """`function(array, axis, *arrays of the others)` of each array that there is; F is this axis of [X, ...]."""
        return Matrices(*(None if own is None else function(own, axis, *rest)
                          for axis, own, *rest in zip((2, 2, 1, 1, 1), self, *others, strict=True)))


Form = Callable[[jax.Array, jax.Array], jax.Array]


class ExpertMLP(nnx.Module):
    """The sum over a token's experts of weight * (down(form(gate x, up x))); see `Experts` of the configuration."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        c, kw = config, dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.experts, self.activation = c.experts, c.activation
        count, width = c.experts.count, c.experts.width
        self.router = Linear(c.width, count, ("width", "experts"), **kw)
        self.gate = ExpertLinear(count, c.width, width, ("width", "mlp"), **kw)
        self.up = ExpertLinear(count, c.width, width, ("width", "mlp"), **kw)
        self.down = ExpertLinear(count, width, c.width, ("mlp", "width"), **kw)

    def __call__(self, x_BTD, dtype=None, mesh: jax.sharding.Mesh | None = None) -> tuple[jax.Array, Routing]:
        """The output [B, T, D], of type `dtype` (None: of x), and how tokens were routed.

        mesh: over which rows are split, and weights as `sled.models.sharding` splits them; None: weights as the mesh
            in whose program this is traced splits them, where there is one.
        """
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTX = self.router(x_BTD, wide)
        matrices = Matrices(*(None if one is None else one[...] for one in (
            self.gate.weight, self.up.weight, self.down.weight, self.gate.bias, self.up.bias)))
        y_BTD, chosen_BTA, share_BTA = _on_mesh(mesh, self.experts, self.activation, matrices, x_BTD, logits_BTX)
        if self.down.bias is not None:
            hot_BTAX = jax.nn.one_hot(chosen_BTA, self.experts.count, dtype=wide)
            share_BTX = (hot_BTAX * share_BTA[..., None]).sum(-2)
            y_BTD = y_BTD + jnp.matmul(share_BTX, self.down.bias[...].astype(wide))
        return y_BTD.astype(dtype or x_BTD.dtype), Routing(logits_BTX, chosen_BTA)


def _form(activation: str, clamp: tuple[float, float] | None, gate, up):
    if clamp is None:
        return FUNCTIONS[activation](gate) * up
    slope, limit = clamp
    gate = jnp.minimum(gate, limit)
    return gate * jax.nn.sigmoid(slope * gate) * (jnp.clip(up, -limit, limit) + 1)


def _on_mesh(mesh, experts: Experts, activation: str, matrices: Matrices, x_BTD, logits_BTX):
    """`_mixture` where every device routes its own rows, to its own part of every expert.

    Left to the partitioner, which cannot divide a sort over all tokens, each would compute them all.
    """
    mixture = functools.partial(_mixture, experts, functools.partial(_form, activation, experts.clamp))
    if mesh is None and not ways_in_use("tensor"):
        return mixture(matrices, x_BTD, logits_BTX)
    if mesh is None:  # within a program over some axes of the mesh, the others are left
        here = jax.sharding.get_abstract_mesh()
        axes = {axis for axis, kind in zip(here.axis_names, here.axis_types, strict=True) if kind == AxisType.Auto}
    else:
        here, axes = mesh, set(mesh.axis_names)
    of_rows = [axis for axis in ROWS if axis in axes]
    even = x_BTD.shape[0] % math.prod(here.shape[axis] for axis in of_rows) == 0
    rows = PartitionSpec(tuple(of_rows) if even else None)
    split = matrices.map(lambda _, axis: PartitionSpec(*[None] * axis, "tensor"))

    def on_device(*args):
        y_BTD, *routing = mixture(*args)
        return jax.lax.psum(y_BTD, "tensor"), *routing

    return jax.shard_map(on_device, mesh=mesh, in_specs=(split, rows, rows), out_specs=(rows, rows, rows),
                         axis_names=axes, check_vma=False)(matrices, x_BTD, logits_BTX)


def _mixture(experts: Experts, form: Form, matrices: Matrices, x_BTD, logits_BTX):
    """The output [B, T, D], the experts chosen [B, T, A], and how much each counts [B, T, A]."""
    best_BTA, chosen_BTA = jax.lax.top_k(logits_BTX, experts.chosen)
    every = best_BTA if experts.normalised else logits_BTX
    share_BTA = jnp.exp(best_BTA - jax.nn.logsumexp(every, axis=-1, keepdims=True))
    x_ND, chosen_NA, share_NA = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, chosen_BTA, share_BTA))
    known = isinstance(x_ND.shape[0], int)  # an exported program's is symbolic
    # Not by the platform that is lowered for: a gradient through such a choice keeps what both forms would need.
    mixture = in_blocks if jax.default_backend() == "cpu" or not known else in_groups
    return mixture(form, matrices, x_ND, chosen_NA, share_NA).reshape(x_BTD.shape), chosen_BTA, share_BTA


def _expert(form: Form, dot: Callable, matrices: Matrices, x, dtype):
    """One expert's MLP without the last bias, or each row by its own: `dot` multiplies rows with their matrix."""
    gate, up = (dot(x, matrix, x.dtype) if bias is None else dot(x, matrix, x.dtype) + bias
                for matrix, bias in ((matrices.gate, matrices.gate_bias), (matrices.up, matrices.up_bias)))
    return dot(form(gate, up), matrices.down, dtype)


# On accelerators: by the products that JAX has.

def in_groups(form: Form, matrices: Matrices, x_ND, chosen_NA, share_NA):
    """The mixture [N, D], float32 (or wider): pairs sorted by expert, or where those are fewer than experts, each with
    its own matrices."""
    experts, expert_P = matrices.gate.shape[0], chosen_NA.ravel()
    x_PD = jnp.repeat(x_ND, chosen_NA.shape[1], axis=0)
    if expert_P.shape[0] < experts:
        dot = lambda x, m, dtype: jnp.einsum("pi,pio->po", x, m, preferred_element_type=dtype)  # noqa: E731
        y_PD = _expert(form, dot, matrices.map(lambda m, _: m[expert_P]), x_PD, share_NA.dtype)
    else:
        order_P = jnp.argsort(expert_P)
        sizes_X = jnp.bincount(expert_P, length=experts).astype(jnp.int32)
        dot = lambda x, m, dtype: jax.lax.ragged_dot(x, m, sizes_X, preferred_element_type=dtype)  # noqa: E731
        own = matrices._replace(**{name: bias if bias is None else bias[expert_P[order_P]] for name, bias in
                                   (("gate_bias", matrices.gate_bias), ("up_bias", matrices.up_bias))})
        y_PD = _expert(form, dot, own, x_PD[order_P], share_NA.dtype)
        y_PD = jnp.zeros_like(y_PD).at[order_P].set(y_PD)
    return (y_PD.reshape(*chosen_NA.shape, -1) * share_NA[..., None]).sum(1)


# On a CPU, where XLA makes a ragged product of as many whole ones as there are experts, and copies what it gathers.

def in_blocks(form: Form, matrices: Matrices, x_ND, chosen_NA, share_NA):
    """As `in_groups`: every expert's pairs in blocks of R, the last one filled up; blocks one after the other."""
    experts, expert_P = matrices.gate.shape[0], chosen_NA.ravel()
    (tokens, chosen), pairs = chosen_NA.shape, expert_P.shape[0]
    if isinstance(tokens, int) and tokens == 1:
        x_A1D = jnp.broadcast_to(x_ND[None], (chosen, 1, x_ND.shape[1]))
        return _blocks(form, matrices, x_A1D, share_NA.T, expert_P, jnp.int32(chosen)).sum(0)
    if isinstance(tokens, int):
        fair = 2 ** (pairs // experts).bit_length() // 2
        rows = min(max(fair, LEAST_ROWS), MOST_ROWS)
        most = min(pairs, (pairs + experts * (rows - 1)) // rows)  # blocks that there can be
    else:
        rows = LEAST_ROWS
        most = (pairs + experts * (rows - 1)) // rows
    size_X = (expert_P[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    blocks_X = (size_X + rows - 1) // rows
    sorted_X, ends_X = jnp.cumsum(size_X) - size_X, jnp.cumsum(blocks_X)  # where its pairs begin once sorted
    begin_X = rows * (ends_X - blocks_X)  # and in blocks
    expert_M = jnp.searchsorted(ends_X, jnp.arange(most), side="right", method="compare_all").clip(max=experts - 1)
    rank_MR = rows * jnp.arange(most)[:, None] + jnp.arange(rows) - begin_X[expert_M][:, None]
    filled_MR = rank_MR < size_X[expert_M][:, None]
    order_P = jnp.argsort(expert_P)
    pair_MR = order_P.at[sorted_X[expert_M][:, None] + rank_MR].get(mode="clip")
    x_MRD = jnp.where(filled_MR[..., None], x_ND[pair_MR // chosen], 0)
    y_MRD = _blocks(form, matrices, x_MRD, jnp.where(filled_MR, share_NA.ravel()[pair_MR], 0), expert_M, ends_X[-1])
    place_P = jnp.argsort(order_P) + (begin_X - sorted_X)[expert_P]
    return y_MRD.reshape(most * rows, -1)[place_P].reshape(tokens, chosen, -1).sum(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(form: Form, matrices: Matrices, x_MRD, share_MR, expert_M, used):
    """Every block's outputs times the shares, [M, R, D]; those of the first `used`, the others are 0.

    Of an expert's matrices a stretch of F is taken at a time. The backward pass computes each block again.
    """
    stretches = _stretches(matrices)

    def add(i, y_MRD):
        m, _, own = _turn(i, matrices, expert_M, stretches)
        return _add(y_MRD, m, _shared(form, own, x_MRD[m], share_MR[m]))

    return jax.lax.fori_loop(0, used * stretches, add, jnp.zeros(x_MRD.shape, share_MR.dtype))


def _blocks_forward(form: Form, *args):
    return _blocks(form, *args), args


def _blocks_backward(form: Form, args, dy_MRD):
    matrices, x_MRD, share_MR, expert_M, used = args
    stretches = _stretches(matrices)

    def add(i, gradients):
        m, place, own = _turn(i, matrices, expert_M, stretches)
        pull = jax.vjp(functools.partial(_shared, form), own, x_MRD[m], share_MR[m])[1]
        of_matrices, dx_RD, dshare_R = pull(dy_MRD[m])
        sums, dx_MRD, dshare_MR = gradients
        added = jax.tree.map(lambda total, part: total + part.astype(total.dtype),
                             _stretch(sums, place, stretches), of_matrices)
        return _put_stretch(sums, place, stretches, added), _add(dx_MRD, m, dx_RD), _add(dshare_MR, m, dshare_R)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, share_MR.dtype), (matrices, x_MRD, share_MR))
    gradients = jax.lax.fori_loop(0, used * stretches, add, zeros)
    return *jax.tree.map(lambda total, a: total.astype(a.dtype), gradients, args[:3]), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _shared(form: Form, matrices: Matrices, x_RD, share_R):
    dot = lambda x, m, dtype: jnp.matmul(x, m, preferred_element_type=dtype)  # noqa: E731
    return _expert(form, dot, matrices, x_RD, share_R.dtype) * share_R[:, None]


def _turn(i, matrices: Matrices, expert_M, stretches: int) -> tuple[jax.Array, tuple, Matrices]:
    """What turn i of the loop is about: the block, the place (expert, stretch) of its matrices, and these."""
    # Else XLA, which computes bfloat16 in float32 on a CPU, would convert all experts before the loop.
    matrices, i = jax.lax.optimization_barrier((matrices, i))
    m, stretch = (function(i, jnp.asarray(stretches, i.dtype)) for function in (jax.lax.div, jax.lax.rem))
    place = expert_M[m], stretch.astype(expert_M.dtype)
    return m, place, _stretch(matrices, place, stretches)


def _stretches(matrices: Matrices) -> int:
    """Into how many parts F is cut, so that one of a matrix fits a CPU's cache."""
    _, d, f = matrices.gate.shape
    size = d * f * matrices.gate.dtype.itemsize
    return next((n for n in range(1, f // 16 + 1) if f % n == 0 and size <= n * CACHE_BYTES), 1)


def _begin_and_shape(array, axis: int, place, stretches: int):
    expert, stretch = place
    length = array.shape[axis] // stretches
    begin = [expert, *(jnp.zeros_like(expert) for _ in array.shape[1:])]  # all of one type, with 64-bit integers too
    begin[axis] = stretch * length
    return begin, (1, *(length if i == axis else n for i, n in enumerate(array.shape) if i))


def _stretch(matrices: Matrices, place, stretches: int) -> Matrices:
    """One expert's matrices, a stretch of them."""
    return matrices.map(lambda a, axis: jax.lax.dynamic_slice(a, *_begin_and_shape(a, axis, place, stretches))[0])


def _put_stretch(matrices: Matrices, place, stretches: int, parts: Matrices) -> Matrices:
    return matrices.map(lambda a, axis, part: jax.lax.dynamic_update_slice(
        a, part[None], _begin_and_shape(a, axis, place, stretches)[0]), parts)


def _add(whole, m, part):
    """Adds a block's part."""
    return jax.lax.dynamic_update_index_in_dim(whole, whole[m] + part.astype(whole.dtype), m, 0)
