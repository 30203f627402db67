"""The head of one early exit: from its hidden state to what is projected, and the projection, if it has its own.

Every head starts as the identity: a decoder with new heads says at each exit exactly what it said without.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sled.fusion.projection import SharedHead
from sled.models.config import DecoderConfig
from sled.models.layers import MLP, LayerNorm, Linear, RMSNorm, norm_of, parameter


class ExitHead(nnx.Module):
    """One head, or those of all exits with a leading axis E on every parameter (the stacked form).

    Its parts are None where its kind lacks them: `affine` [D, D] and [D], `mlp` with `mlp_norm`, `norm` [D], and
    `projection` [V, D] of an untied one.
    """

    def __init__(self, config: DecoderConfig, *, norm: RMSNorm | LayerNorm, projection: jax.Array, rngs: nnx.Rngs):
        """`norm` and `projection` are the model's own: untied ones start as copies of them."""
        kind, dtype = config.exit_heads.kind, projection.dtype
        new_norm = lambda: norm_of(config, config.width, dtype)  # noqa: E731
        square = dict(bias=True, dtype=dtype, rngs=rngs)
        self.affine = Linear(config.width, config.width, ("width", "vector"), **square) if kind == "affine" else None
        self.mlp_norm = new_norm() if kind == "mlp" else None
        self.mlp = MLP(config, dtype=dtype, rngs=rngs) if kind == "mlp" else None
        self.norm = new_norm() if kind in ("norm", "mlp") else None
        self.projection = None if config.exit_heads.tied else parameter(jnp.array(projection), "vocab", "width")
        if self.affine is not None:
            self.affine.weight[...] = jnp.zeros_like(self.affine.weight[...])
        if self.mlp is not None:
            self.mlp.down.weight[...] = jnp.zeros_like(self.mlp.down.weight[...])
        if self.norm is not None:
            nnx.update(self.norm, jax.tree.map(jnp.array, nnx.state(norm)))  # copies

    def __call__(self, h, final_norm: RMSNorm | LayerNorm) -> jax.Array:
        """Hidden states [..., D], ready for projection; `final_norm` is the model's, for kinds without one."""
        if self.affine is not None:
            h = h + self.affine(h)
        if self.mlp is not None:
            h = h + self.mlp(self.mlp_norm(h))
        return final_norm(h) if self.norm is None else self.norm(h)


class BoundHead(NamedTuple):
    """One exit's head beside the model's final norm and projection: all that reading its hidden state takes."""

    head: ExitHead
    final_norm: RMSNorm | LayerNorm
    shared_head: SharedHead

    @property
    def projection(self) -> SharedHead | None:
        """Its own projection, or None where it ends in the shared one."""
        own = self.head.projection
        return None if own is None else self.shared_head.with_weights(own[...])

    def read(self, h) -> jax.Array:
        """The exit's hidden states [..., D] made ready for projection."""
        return self.head(h, self.final_norm)
