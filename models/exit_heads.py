"""The head of one early exit: from its hidden state to what is projected, and the projection, if it has its own.

Every head starts as the identity: a decoder with new heads says at each exit exactly what it said without.

A head of kind "block" looks back, through a whole layer with K/V of its own. These depend on the exit's hidden states
alone: they are written wherever the layers below the exit run, and are exact wherever those layers' K/V are.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sled.fusion.projection import SharedHead
from sled.models.config import DecoderConfig
from sled.models.layers import (
    KV,
    MLP,
    Block,
    LayerContext,
    LayerNorm,
    Linear,
    RMSNorm,
    empty_cache,
    norm_of,
    parameter,
)


class ExitHead(nnx.Module):
    """One head, or those of all exits with a leading axis E on every parameter (the stacked form).

    Its parts are None where its kind lacks them: `block`, a layer that runs before all else; `affine` [D, D] and [D];
    `mlp` with `mlp_norm`; `norm` [D]; and `projection` [V, D] of an untied one.
    """

    def __init__(self, config: DecoderConfig, *, above: Block | None, norm: RMSNorm | LayerNorm, projection: jax.Array,
                 rngs: nnx.Rngs):
        """`norm` and `projection` are the model's own: untied ones start as copies of them. above: the layer above the
        exit, from which a block begins."""
        kind, dtype = config.exit_heads.kind, projection.dtype
        new_norm = lambda: norm_of(config, config.width, dtype)  # noqa: E731
        square = dict(bias=True, dtype=dtype, rngs=rngs)
        self.affine = Linear(config.width, config.width, ("width", "vector"), **square) if kind == "affine" else None
        self.mlp_norm = new_norm() if kind == "mlp" else None
        self.mlp = MLP(config, dtype=dtype, rngs=rngs) if kind == "mlp" else None
        self.block = begun_as(above, config, dtype, rngs) if kind == "block" else None
        self.norm = new_norm() if kind in ("norm", "mlp", "block") else None
        self.projection = None if config.exit_heads.tied else parameter(jnp.array(projection), "vocab", "width")
        if self.affine is not None:
            self.affine.weight[...] = jnp.zeros_like(self.affine.weight[...])
        if self.mlp is not None:
            self.mlp.down.weight[...] = jnp.zeros_like(self.mlp.down.weight[...])
        if self.norm is not None:
            nnx.update(self.norm, jax.tree.map(jnp.array, nnx.state(norm)))  # copies

    def __call__(self, h, final_norm: RMSNorm | LayerNorm) -> jax.Array:
        """Hidden states [..., D], or what `block` made of them, ready for projection; `final_norm` is the model's, for
        kinds without one."""
        if self.affine is not None:
            h = h + self.affine(h)
        if self.mlp is not None:
            h = h + self.mlp(self.mlp_norm(h))
        return final_norm(h) if self.norm is None else self.norm(h)


def begun_as(above: Block, config: DecoderConfig, dtype, rngs: nnx.Rngs) -> Block:
    """A layer that begins with the weights of `above`, but changes nothing yet.

    The layer above the exit is made for what the exit reads: its norms, positions and window fit. What attention and
    MLP add begins as 0: the last product of each, or where a norm follows that (which makes any small number large),
    this norm's scale. In place of experts there is an MLP, which begins at random.
    """
    block = Block(dataclasses.replace(config, experts=None), dtype=dtype, rngs=rngs)
    theirs = dict(nnx.to_flat_state(nnx.state(above)))
    for path, own in nnx.to_flat_state(nnx.state(block)):
        if path[0] != "mlp" or config.experts is None:
            own[...] = jnp.array(theirs[path][...], dtype)
    for last, norm in ((block.attention.o, block.attention_post_norm), (block.mlp.down, block.mlp_post_norm)):
        silenced = last if norm is None else norm
        none = -1.0 if getattr(norm, "plus_one", False) else 0.0
        silenced.weight[...] = jnp.full_like(silenced.weight[...], none)
        if getattr(silenced, "bias", None) is not None:
            silenced.bias[...] = jnp.zeros_like(silenced.bias[...])
    return block


@dataclasses.dataclass(frozen=True)
class BoundHead:
    """One exit's head beside the model's final norm and projection: all that reading its hidden state takes."""

    head: ExitHead
    final_norm: RMSNorm | LayerNorm
    shared_head: SharedHead

    @property
    def projection(self) -> SharedHead | None:
        """Its own projection, or None where it ends in the shared one."""
        own = self.head.projection
        return None if own is None else self.shared_head.with_weights(own[...][:self.shared_head.vocabulary])

    def read(self, h) -> jax.Array:
        """The exit's hidden states [..., D] made ready for projection."""
        return self.head(h, self.final_norm)


@dataclasses.dataclass(frozen=True)
class BoundBlockHead(BoundHead):
    """One of kind "block": what `run` makes of the exit's hidden states is then read. window: of its layer."""

    config: DecoderConfig
    window: int | None

    def empty_cache(self, batch: int, slots: int, ahead: int) -> KV:
        """Zeroed K/V of its layer for `slots` positions, as `Decoder.empty_caches` has them of the others."""
        return empty_cache(self.config, self.window, batch, slots, ahead, self.shared_head.w_VD.dtype)

    def run(self, h_BTD, positions_BT, cache: KV | None) -> tuple[jax.Array, KV]:
        """Its layer on a block of tokens, whose `h_BTD` are the exit's; arguments as of `Decoder.run_layers`."""
        context = LayerContext.of(self.config, positions_BT).for_window(self.window)
        return self.head.block(h_BTD, context, cache)
