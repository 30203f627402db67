"""The pieces of a decoder: embeddings, linear maps, norms, rotary positions, attention, gated MLP, block.

Axes: B batch, T tokens of this call, S cache slots, D width, F feed-forward, N query heads,
K key/value heads, G = N / K, H head width. Weights are [in, out], the transpose of what checkpoints
store: XLA's CPU products with 2 to 16 rows (a batch, a block of drafts to verify) are 1.5 to 2 times
as fast so; with one row of a large model 0.8 times.

A key/value cache is laid out [B, K, S, H]: with S next to H, attention over it is a plain batched
matrix product (on a CPU several times faster than [B, S, K, H], which is transposed at every step).
The token at position p of a row always lies in slot p, so a query at position p sees exactly the
slots 0..p, whatever the padding to its right holds. One slot more than there are positions takes what
tokens that are switched off would write.

Every parameter names its logical axes where it is made (`parameter`); `sled.models.sharding` splits them over a mesh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sled.fusion.projection import SharedHead
from sled.models.config import DecoderConfig, LinearScaling, Llama3Scaling

KV = tuple[jax.Array, jax.Array]


def parameter(array: jax.Array, *axes: str) -> nnx.Param:
    """A parameter with a name for each axis of its array."""
    return nnx.Param(array, axes=axes)


class Embedding(nnx.Module):
    """A [V, D] table: rows looked up for tokens, or multiplied with hidden states for logits."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.weight = parameter(init(rngs.params(), (config.vocab_size, config.width), dtype), "vocab", "width")

    def __call__(self, tokens_BT) -> jax.Array:
        """Of the table's type."""
        return jnp.take(self.weight[...], tokens_BT, axis=0)

    @property
    def projection(self) -> SharedHead:
        return SharedHead(self.weight[...])


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
    """x / rms(x) * w, the mean square taken in float32 (or wider); of the weight's type where x is wider."""

    def __init__(self, d: int, *, eps: float, dtype):
        self.eps = eps
        self.weight = parameter(jnp.ones((d,), dtype), "vector")

    def __call__(self, x):
        wide, weight = x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.weight[...]
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(min(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)) * weight


def rotary_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position of each of the H/2 rotary pairs, scaling applied. float64 [H/2]."""
    frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return frequency / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_positions * frequency / (2 * np.pi)  # over the original context
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        return frequency * (keep + (1 - keep) / scaling.factor)
    return frequency


class LayerContext(NamedTuple):
    """What a layer reads beside hidden states; leaves have the rows' axis first, of length 1 where all rows share it.

    angles: cos and sin of every position's angles, each [B, 1, T, H] (both halves alike).
    segments_BT: the document of each token in a packed row, which is all that it sees; None: rows are not packed.
    window: how many positions back the layer sees: None for all, a number, or one of `traced_windows`.
    """

    positions_BT: jax.Array
    angles: tuple[jax.Array, jax.Array]
    segments_BT: jax.Array | None
    window: Any = None

    @classmethod
    def of(cls, config: DecoderConfig, positions_BT, segments_BT=None) -> LayerContext:
        angles = positions_BT[..., None] * jnp.asarray(rotary_frequencies(config), jnp.float32)
        angles = jnp.concatenate([angles, angles], axis=-1)[:, None]
        return cls(positions_BT, (jnp.cos(angles), jnp.sin(angles)), segments_BT)

    def for_window(self, window) -> LayerContext:
        """The same for a layer of this window."""
        return self._replace(window=window)


def traced_windows(config: DecoderConfig) -> jax.Array:
    """Every layer's window as a number, for a scan over layers: [L]."""
    unlimited = jnp.iinfo(jnp.int32).max  # not max_positions: a longer sequence would be cut
    return jnp.array([unlimited if window is None else window for window in config.windows])


def rotate(x_BNTH, cos, sin):
    """Rotate pair (i, i + H/2) of every head by its position's angle."""
    low, high = jnp.split(x_BNTH, 2, axis=-1)
    turned_BNTH = jnp.concatenate([-high, low], axis=-1)
    return x_BNTH * cos.astype(x_BNTH.dtype) + turned_BNTH * sin.astype(x_BNTH.dtype)


def attend(q_BNTH, k_BKSH, v_BKSH, visible_BTS):
    """Grouped-query attention. Query head n reads key/value head n // G. Returns [B, N, T, H].

    Scores and softmax are float32 (or wider).
    """
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    q = rearrange(q_BNTH, "b (k g) t h -> b k (g t) h", g=groups)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkth,bksh->bkts", q, k_BKSH, preferred_element_type=wide)
    visible = jnp.tile(visible_BTS, (1, groups, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, jnp.finfo(wide).min), axis=-1)
    mixed = jnp.einsum("bkts,bksh->bkth", weights.astype(v_BKSH.dtype), v_BKSH)
    return rearrange(mixed, "b k (g t) h -> b (k g) t h", g=groups)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, rngs=rngs)
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.head_dim = c.head_dim
        self.q = Linear(c.width, heads, ("width", "heads"), bias=c.qkv_bias, **kw)
        self.k = Linear(c.width, kv_heads, ("width", "kv_heads"), bias=c.qkv_bias, **kw)
        self.v = Linear(c.width, kv_heads, ("width", "kv_heads"), bias=c.qkv_bias, **kw)
        self.o = Linear(heads, c.width, ("heads", "width"), bias=c.out_bias, **kw)
        self.q_norm = RMSNorm(c.head_dim, eps=c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, eps=c.norm_eps, dtype=dtype) if c.qk_norm else None

    def __call__(self, x_BTD, context: LayerContext, cache: KV | None, dtype=None) -> tuple[jax.Array, KV]:
        """The output [B, T, D], of type `dtype` (None: of x), and the keys and values."""
        positions_BT, angles, segments_BT, window = context
        q = self._heads(self.q(x_BTD))
        q = rotate(q if self.q_norm is None else self.q_norm(q), *angles)
        k, v = self.keys_values(x_BTD, context, cache)
        slots_BS = positions_BT if cache is None else jnp.arange(k.shape[2])[None]
        visible = slots_BS[:, None, :] <= positions_BT[:, :, None]
        if window is not None:
            visible &= slots_BS[:, None, :] > positions_BT[:, :, None] - window
        if segments_BT is not None:
            visible &= segments_BT[:, None, :] == segments_BT[:, :, None]
        out = rearrange(attend(q, k, v, visible), "b n t h -> b t (n h)")
        return self.o(out, dtype), (k, v)

    def keys_values(self, x_BTD, context: LayerContext, cache: KV | None) -> KV:
        """The tokens' own K/V [B, K, T, H], or the cache with them written into it."""
        k, v = self._heads(self.k(x_BTD)), self._heads(self.v(x_BTD))
        k = rotate(k if self.k_norm is None else self.k_norm(k), *context.angles)
        return (k, v) if cache is None else tuple(
            _write(old, new, context.positions_BT) for old, new in zip(cache, (k, v), strict=True))

    def _heads(self, y):
        return rearrange(y, "b t (n h) -> b n t h", h=self.head_dim)


def _write(cache_BKSH, new_BKTH, positions_BT):
    """Put each token's key (or value) into the slot of its position.

    Positions from the last slot on go into the last slot, which no token owns: a write that is clipped
    happens in place, one that is dropped makes XLA copy the cache (at batch 1 four times a layer).
    """
    slots_BT = jnp.minimum(positions_BT, cache_BKSH.shape[2] - 1)
    new_BTKH = rearrange(new_BKTH, "b k t h -> b t k h").astype(cache_BKSH.dtype)
    if slots_BT.size == 1:
        # Written twice: XLA turns a scatter of one place into an update that it fuses with the reading, and
        # then copies the whole cache for it, four times a layer and token (measured: half of a small model's time).
        slots_BT, new_BTKH = jnp.repeat(slots_BT, 2, axis=1), jnp.repeat(new_BTKH, 2, axis=1)
    rows = jnp.arange(cache_BKSH.shape[0])[:, None]
    return cache_BKSH.at[rows, :, slots_BT].set(new_BTKH, mode="promise_in_bounds")


class MLP(nnx.Module):
    """down( silu(gate x) * up x )."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate = Linear(config.width, config.mlp_width, ("width", "mlp"), **kw)
        self.up = Linear(config.width, config.mlp_width, ("width", "mlp"), **kw)
        self.down = Linear(config.mlp_width, config.width, ("mlp", "width"), **kw)

    def __call__(self, x, dtype=None):
        """dtype: as of `Linear`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x), dtype)


class Block(nnx.Module):
    """One decoder layer, norms before attention and MLP, residual around both."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, h_BTD, context: LayerContext, cache: KV | None) -> tuple[jax.Array, KV]:
        """Returns the layer's output [B, T, D] and its keys and values.

        With `cache` None the block attends within itself and returns its own K/V [B, K, T, H];
        otherwise it writes into the cache, attends over it, and returns it.
        Packed rows are without a cache. Hidden states may be wider than the weights: what is added to them is then
        not rounded before.
        """
        mixed, kv = self.attention(self.attention_norm(h_BTD), context, cache, h_BTD.dtype)
        h_BTD = h_BTD + mixed
        return h_BTD + self.mlp(self.mlp_norm(h_BTD), h_BTD.dtype), kv

    def write_kv(self, h_BTD, context: LayerContext, cache: KV) -> KV:
        """The cache with the K/V of tokens that enter this layer as `h_BTD`; the layer itself does not run."""
        return self.attention.keys_values(self.attention_norm(h_BTD), context, cache)
