"""One decoder layer."""

from __future__ import annotations

import jax
from flax import nnx

from sled.models.config import DecoderConfig
from sled.models.layers.attention import KV, Attention, LayerContext
from sled.models.layers.basic import narrower, norm_of
from sled.models.layers.experts import ExpertMLP, Routing
from sled.models.layers.mlp import MLP


class Block(nnx.Module):
    """Attention, then the MLP or a mixture of experts, a residual around both.

    `attention_norm` and `mlp_norm` are before the two, `attention_post_norm` and `mlp_post_norm` between each and its
    residual; None where the model has no norm there (`DecoderConfig.norms_at`).
    """

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        def norm(*places: str):
            return norm_of(config, config.width, dtype) if config.norms_at in places else None

        self.attention_norm = norm("before", "around")
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm("after", "around")
        self.mlp_norm = norm("before", "around")
        self.mlp = (ExpertMLP if config.experts else MLP)(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm("after", "around")

    def __call__(self, h_BTD, context: LayerContext, cache: KV | None) -> tuple[jax.Array, KV]:
        """Returns the layer's output [B, T, D] and its keys and values.

        With `cache` None the block attends within itself and returns its own K/V [B, K, T, H];
        otherwise it writes into the cache, attends over it, and returns it.
        Packed rows are without a cache. Hidden states may be wider than the weights: what is added to them is then
        not rounded before.
        """
        return self.run(h_BTD, context, cache)[:2]

    def run(self, h_BTD, context: LayerContext, cache: KV | None) -> tuple[jax.Array, KV, Routing | None]:
        """As a call, and how tokens were routed to experts, where there are any."""
        with jax.named_scope("attention"):
            mixed, kv = self.attention(self._before(self.attention_norm, h_BTD), context, cache, h_BTD.dtype)
            h_BTD = h_BTD + _after(self.attention_post_norm, mixed)
        with jax.named_scope("mlp"):
            x_BTD, routing = self._before(self.mlp_norm, h_BTD), None
            if isinstance(self.mlp, ExpertMLP):
                mixed, routing = self.mlp(x_BTD, h_BTD.dtype, context.mesh)
            else:
                mixed = self.mlp(x_BTD, h_BTD.dtype)
            return h_BTD + _after(self.mlp_post_norm, mixed), kv, routing

    def write_kv(self, h_BTD, context: LayerContext, cache: KV) -> KV:
        """The cache with the K/V of tokens that enter this layer as `h_BTD`; the layer itself does not run."""
        return self.attention.write_kv(self._before(self.attention_norm, h_BTD), context, cache)

    def _before(self, norm, h_BTD):
        """What the weights are multiplied with: of their type, if that is the narrower."""
        if norm is not None:
            return norm(h_BTD)
        return h_BTD.astype(narrower(h_BTD.dtype, self.attention.o.weight.dtype))


def _after(norm, mixed_BTD):
    return mixed_BTD if norm is None else norm(mixed_BTD, mixed_BTD.dtype)
