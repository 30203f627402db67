"""The parts without which no layer is built: parameters, tables, linear maps, norms.

Axes: B batch, T tokens of this call, D width, F feed-forward, V vocabulary. Weights are [in, out], the transpose of
what most checkpoints store: XLA's CPU products with 2 to 16 rows (a batch, a block of drafts to verify) are 1.5 to 2
times as fast so; with one row of a large model 0.8 times.

Every parameter names its logical axes where it is made (`parameter`); `sled.models.sharding` splits them over a mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sled.models.config import DecoderConfig


def parameter(array: jax.Array, *axes: str) -> nnx.Param:
    """A parameter with a name for each axis of its array."""
    return nnx.Param(array, axes=axes)


class Embedding(nnx.Module):
    """A [rows, D] table: rows are looked up, for tokens or for positions; `axis` names the first axis."""

    def __init__(self, rows: int, width: int, axis: str, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.weight = parameter(init(rngs.params(), (rows, width), dtype), axis, "width")

    def __call__(self, rows_BT) -> jax.Array:
        """Of the table's type. Numbers beyond the table give its last row."""
        return jnp.take(self.weight[...], rows_BT, axis=0, mode="clip")


class Linear(nnx.Module):
    """y = x W (+ b), with W [in, out]; `axes` names the two.

    The bias of an output of the model's width stays whole: it is added to what is summed over the split input.
    """

    def __init__(self, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.weight = parameter(init(rngs.params(), (d_in, d_out), dtype), *axes)
        out = "vector" if axes[1] == "width" else axes[1]
        self.bias = parameter(jnp.zeros((d_out,), dtype), out) if bias else None

    def __call__(self, x, dtype=None):
        """dtype: of the result, to which the product is not rounded before; None: of its inputs."""
        y = jnp.matmul(x, self.weight[...], preferred_element_type=dtype)
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """x / rms(x) * w, or with `plus_one` * (1 + w) (Gemma), in float32 (or wider)."""

    def __init__(self, d: int, *, eps: float, plus_one: bool = False, dtype):
        self.eps, self.plus_one = eps, plus_one
        self.weight = parameter((jnp.zeros if plus_one else jnp.ones)((d,), dtype), "vector")

    def __call__(self, x, dtype=None):
        """dtype: of the result; None: the narrower of the types of x and of the weight."""
        wide, weight = _wide(x), self.weight[...]
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = weight.astype(wide.dtype) + self.plus_one  # 1 + w would lose w's last bits in w's own type
        return (wide * scale).astype(dtype or narrower(x.dtype, weight.dtype))


class LayerNorm(nnx.Module):
    """(x - mean) / std * w + b, in float32 (or wider)."""

    def __init__(self, d: int, *, eps: float, dtype):
        self.eps = eps
        self.weight = parameter(jnp.ones((d,), dtype), "vector")
        self.bias = parameter(jnp.zeros((d,), dtype), "vector")

    def __call__(self, x, dtype=None):
        """dtype: as of `RMSNorm`."""
        wide, weight = _wide(x), self.weight[...]
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * weight + self.bias[...]).astype(dtype or narrower(x.dtype, weight.dtype))


def norm_of(config: DecoderConfig, width: int, dtype) -> RMSNorm | LayerNorm:
    """A norm of the kind that the whole model has, over the last axis, which is `width` long."""
    if config.norm == "layer":
        return LayerNorm(width, eps=config.norm_eps, dtype=dtype)
    return RMSNorm(width, eps=config.norm_eps, plus_one=config.norm == "rms_plus_one", dtype=dtype)


def narrower(*types):
    """The one of these types that takes the fewest bytes, the first of several."""
    return min(types, key=lambda dtype: dtype.itemsize)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
