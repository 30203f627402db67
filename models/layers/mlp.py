"""The feed-forward part of a layer."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from sled.models.config import DecoderConfig
from sled.models.layers.basic import Linear

FUNCTIONS = {  # of `sled.models.config.ACTIVATIONS`
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(act(gate x) * up x), or without a gate down(act(up x))."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation
        self.gate = Linear(config.width, config.mlp_width, ("width", "mlp"), **kw) if config.gated else None
        self.up = Linear(config.width, config.mlp_width, ("width", "mlp"), **kw)
        self.down = Linear(config.mlp_width, config.width, ("mlp", "width"), **kw)

    def __call__(self, x, dtype=None):
        """dtype: as of `Linear`."""
        act, up = FUNCTIONS[self.activation], self.up(x)
        return self.down(act(up) if self.gate is None else act(self.gate(x)) * up, dtype)
