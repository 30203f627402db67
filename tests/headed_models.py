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
    ("projection", False), ("norm", True), ("affine", True), ("affine", False), ("mlp", True), ("mlp", False),
    ("block", True), ("block", False))}


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
    """The head's definition in float64, without any of the model's code; h [..., T, D]."""
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
        if heads.kind == "block":
            h = _plain_block(h, lambda *name: part("block", *name), rms)
        norm = part("norm", "weight") if heads.kind in ("norm", "mlp", "block") else norm
        projection = projection if heads.tied else part("projection")
    return rms(h, norm) @ projection.T


def _plain_block(h, part, rms):
    x, size = rms(h, part("attention_norm", "weight")), CONFIG.head_dim
    angles = np.arange(h.shape[-2])[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))
    turn = lambda x: x * cos + np.concatenate([-x[..., size // 2:], x[..., :size // 2]], -1) * sin  # noqa: E731
    q, k, v = (x @ part("attention", name, "weight") for name in "qkv")
    mixed = []
    for one in np.split(q, CONFIG.num_heads, -1):  # all read the one head of keys and values
        scores = turn(one) @ turn(k).swapaxes(-1, -2) / np.sqrt(size)
        weights = np.exp(np.where(np.tri(h.shape[-2], dtype=bool), scores, -np.inf))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    h = h + np.concatenate(mixed, -1) @ part("attention", "o", "weight")
    x = rms(h, part("mlp_norm", "weight"))
    gate = x @ part("mlp", "gate", "weight")
    return h + gate / (1 + np.exp(-gate)) * (x @ part("mlp", "up", "weight")) @ part("mlp", "down", "weight")
