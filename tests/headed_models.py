"""A random model, the same with exit heads of every kind, and what such a head says by its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_lm import settling

from sled.models import DecoderConfig, ExitHeads
from sled.train.objective.exit_heads import merge, partition

CONFIG = DecoderConfig(family="llama", vocab_size=47, width=16, mlp_width=24, num_layers=4, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=32, eos_ids=(5,))
KINDS = {f"{kind}{'' if tied else ', untied'}": ExitHeads((1, 3), kind, tied) for kind, tied in (
    ("projection", False), ("norm", True), ("affine", True), ("affine", False), ("mlp", True), ("mlp", False))}


@functools.cache
def bare():
    return settling(CONFIG, 0.4)


def stirred(model, scale=0.3):
    """The model with exit heads that have moved from where they start."""
    heads, backbone = partition(nnx.state(model))
    key = jax.random.key(3)
    heads = jax.tree.map(lambda x: x + scale * jax.random.normal(key, x.shape, x.dtype) * jnp.std(x, keepdims=True)
                         + 0.1 * scale * jax.random.normal(key, x.shape, x.dtype), heads)
    return nnx.merge(nnx.graphdef(model), merge(heads, backbone))


@functools.cache
def headed(name):
    """The model with the heads of KINDS, moved from their start; separate form."""
    return stirred(bare().with_exit_heads(KINDS[name], rngs=nnx.Rngs(0)))


def plain_logits(model, h, layer):
    """The head's definition in float64, without any of the model's code; h [..., D]."""
    w = {path: np.float64(x[...]) for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    heads, h = model.config.exit_heads, np.float64(h)
    rms = lambda x, weight: x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight  # noqa: E731
    norm, projection = w["norm", "weight"], w["head", "weight"]
    if heads is not None and layer in heads.layers:
        part = lambda *name: w["exit_heads", heads.layers.index(layer), *name]  # noqa: E731
        if heads.kind == "affine":
            h = h + h @ part("affine", "weight") + part("affine", "bias")
        if heads.kind == "mlp":
            x = rms(h, part("mlp_norm", "weight"))
            gate = x @ part("mlp", "gate", "weight")
            h = h + gate / (1 + np.exp(-gate)) * (x @ part("mlp", "up", "weight")) @ part("mlp", "down", "weight")
        norm = part("norm", "weight") if heads.kind in ("norm", "mlp") else norm
        projection = projection if heads.tied else part("projection")
    return rms(h, norm) @ projection.T
