"""Attention, its keys and values, and what a layer reads beside hidden states.

Axes: B batch, T tokens of this call, S cache slots, D width, N query heads, K key/value heads, G = N / K, H head width.

A key/value cache is laid out [B, K, S, H]: with S next to H, attention over it is a plain batched
matrix product (on a CPU several times faster than [B, S, K, H], which is transposed at every step).
The token at position p of a row lies in slot p, so a query at position p sees exactly the slots 0..p, whatever the
padding to its right holds. One slot more than there are positions takes what tokens that are switched off (at a
negative position) would write.

A layer with a window has only as many slots as the window and what may be written ahead of a query take: a ring, in
which the token at position p lies in slot p modulo its size (`ring_size`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sled.models.config import DecoderConfig
from sled.models.layers.basic import Linear, norm_of, parameter
from sled.models.positions import Rope
from sled.models.sharding.mesh import split_in_use

SHORT = 128  # slots of a cache that are attended to at least

KV = tuple[jax.Array, jax.Array]
Angles = tuple[jax.Array, jax.Array]
UNLIMITED = jnp.iinfo(jnp.int32).max  # a traced window that hides nothing; max_positions would cut a longer sequence


class LayerContext(NamedTuple):
    """What a layer reads beside hidden states; leaves have the rows' axis first, of length 1 where all rows share it.

    angles: cos and sin of every position's angles, each [B, 1, T, R] (both halves alike), of the R numbers of a head
        that turn; None where layers do not rotate. local_angles: those of layers with a window, where they have theirs.
    segments_BT: the document of each token in a packed row, which is all that it sees; None: rows are not packed.
    window: how many positions back the layer sees: None for all, a number, or one of `traced_windows`.
    mesh: over which rows and weights are split; None: they are not. No leaf: it is set where the layer runs.
    """

    positions_BT: jax.Array
    angles: Angles | None
    local_angles: Angles | None
    segments_BT: jax.Array | None
    window: Any = None
    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def of(cls, config: DecoderConfig, positions_BT, segments_BT=None) -> LayerContext:
        angles, local = (rope and _angles(rope, config.head_dim, positions_BT)
                         for rope in (config.rope, config.local_rope))
        return cls(positions_BT, angles, local, segments_BT)

    def for_window(self, window) -> LayerContext:
        """The same for a layer of this window."""
        angles = self.angles
        if self.local_angles is not None and window is not None:
            full = window == UNLIMITED
            angles = jax.tree.map(lambda all_, local: jnp.where(full, all_, local), angles, self.local_angles)
        return self._replace(angles=angles, window=window)


def _angles(rope: Rope, head_dim: int, positions_BT) -> Angles:
    angles = positions_BT[..., None] * jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, None]
    amplitude = rope.amplitude()
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def traced_windows(windows: Sequence[int | None]) -> jax.Array:
    """These windows, of a scan's layers one each, as numbers: [L]."""
    return jnp.array([UNLIMITED if window is None else window for window in windows])


def rotate(x_BNTH, angles: Angles | None):
    """Rotate pair (i, i + R/2) of every head by its position's angle; what a head has beyond R stays."""
    if angles is None:
        return x_BNTH
    cos, sin = (table.astype(x_BNTH.dtype) for table in angles)
    x_BNTR, rest = jnp.split(x_BNTH, [cos.shape[-1]], axis=-1)
    low, high = jnp.split(x_BNTR, 2, axis=-1)
    turned_BNTR = x_BNTR * cos + jnp.concatenate([-high, low], axis=-1) * sin
    return jnp.concatenate([turned_BNTR, rest], axis=-1) if rest.shape[-1] else turned_BNTR


def attend(q_BNTH, k_BKSH, v_BKSH, visible_BTS, *, scale: float, cap: float | None = None, sink_N=None):
    """Grouped-query attention. Query head n reads key/value head n // G. Returns [B, N, T, H].

    Scores and softmax are float32 (or wider). scale: of the scores. cap: scores s become cap * tanh(s / cap). sink_N:
    a logit of each head beside its scores, whose share of the softmax is lost.
    """
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    q = rearrange(q_BNTH, "b (k g) t h -> b k (g t) h", g=groups)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkth,bksh->bkts", q, k_BKSH, preferred_element_type=wide) * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    visible = jnp.tile(visible_BTS, (1, groups, 1))[:, None]
    scores = jnp.where(visible, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if sink_N is not None:
        sink = jnp.tile(sink_N.reshape(-1, groups, 1), (1, 1, q_BNTH.shape[2])).reshape(*q.shape[1:3], 1)
        weights *= jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1, keepdims=True) - sink)
    mixed = jnp.einsum("bkts,bksh->bkth", weights.astype(v_BKSH.dtype), v_BKSH)
    return rearrange(mixed, "b k (g t) h -> b (k g) t h", g=groups)


def _attend_to_used(mix, q_BNTH, cache: KV, visible_BTS, positions_BT):
    """`mix` over a cache's first 128, 512, 2,048, ... slots, as many as hold all that is visible.

    Each number of slots is a branch of the program, so there are few, and none that leaves out less than half of all.
    A row further on than the cache has slots, around a ring, sees all of them.
    """
    slots = cache[0].shape[2]
    sizes = []
    if isinstance(slots, int):  # not the symbolic size of an exported program
        sizes = [SHORT * 4**i for i in range(slots.bit_length()) if 2 * SHORT * 4**i <= slots]

    def first(size):
        return lambda cache: mix(q_BNTH, *(array[:, :, :size] for array in cache), visible_BTS[..., :size])

    used = jnp.sum(positions_BT.max() >= jnp.array(sizes, int))
    return jax.lax.switch(used, [first(size) for size in (*sizes, slots)], cache)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, rngs=rngs)
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.head_dim, self.cap = c.head_dim, c.attention_cap
        self.scale = c.head_dim ** -0.5 if c.query_scale is None else c.query_scale
        self.q = Linear(c.width, heads, ("width", "heads"), bias=c.qkv_bias, **kw)
        self.k = Linear(c.width, kv_heads, ("width", "kv_heads"), bias=c.qkv_bias, **kw)
        self.v = Linear(c.width, kv_heads, ("width", "kv_heads"), bias=c.qkv_bias, **kw)
        self.o = Linear(heads, c.width, ("heads", "width"), bias=c.out_bias, **kw)
        self.sinks = parameter(jnp.zeros((c.num_heads,), dtype), "heads") if c.sinks else None
        self.whole_norm = c.qk_norm == "whole"
        normed = (heads, kv_heads) if self.whole_norm else (c.head_dim, c.head_dim)
        self.q_norm, self.k_norm = (norm_of(c, d, dtype) for d in normed) if c.qk_norm else (None, None)

    def __call__(self, x_BTD, context: LayerContext, cache: KV | None, dtype=None) -> tuple[jax.Array, KV]:
        """The output [B, T, D], of type `dtype` (None: of x), and the keys and values."""
        positions_BT, segments_BT, window = context.positions_BT, context.segments_BT, context.window
        q = rotate(self._heads(self.q(x_BTD), self.q_norm), context.angles)
        own = self._own_keys_values(x_BTD, context)
        kv = own if cache is None else _write(cache, own, positions_BT, window)
        if cache is None:
            seen, at = own, positions_BT[:, None]
        elif _fits(cache, positions_BT.shape[1], window):
            seen, at = kv, _positions_of_slots(kv, positions_BT, window)
        else:  # what the block writes may be in the place of what its first tokens still see
            seen = tuple(jnp.concatenate([old, new.astype(old.dtype)], axis=2)
                         for old, new in zip(cache, own, strict=True))
            before_B1S = _positions_of_slots(cache, positions_BT[:, :1] - 1, window)
            at = jnp.concatenate([before_B1S, positions_BT[:, None]], axis=-1)
        visible = (at >= 0) & (at <= positions_BT[:, :, None])
        if window is not None:
            visible &= at > positions_BT[:, :, None] - window
        if segments_BT is not None:
            visible &= segments_BT[:, None, :] == segments_BT[:, :, None]
        mix = functools.partial(attend, scale=self.scale, cap=self.cap,
                                sink_N=None if self.sinks is None else self.sinks[...])
        mixed = _attend_to_used(mix, q, kv, visible, positions_BT) if seen is kv else mix(q, *seen, visible)
        return self.o(rearrange(mixed, "b n t h -> b t (n h)"), dtype), kv

    def write_kv(self, x_BTD, context: LayerContext, cache: KV) -> KV:
        """The cache with the tokens' K/V written into it."""
        return _write(cache, self._own_keys_values(x_BTD, context), context.positions_BT, context.window)

    def _own_keys_values(self, x_BTD, context: LayerContext) -> KV:
        """The tokens' own K/V [B, K, T, H]."""
        k = rotate(self._heads(self.k(x_BTD), self.k_norm), context.angles)
        return k, self._heads(self.v(x_BTD))

    def _heads(self, y, norm=None):
        """[B, N, T, H], normed before the heads are split, or each by itself."""
        y = norm(y) if norm is not None and self.whole_norm else y
        y = rearrange(y, "b t (n h) -> b n t h", h=self.head_dim)
        return norm(y) if norm is not None and not self.whole_norm else y


def empty_cache(config: DecoderConfig, window: int | None, batch: int, slots: int, ahead: int, dtype) -> KV:
    """Zeroed keys and values of a layer with this window for `slots` positions: [B, K, slots + 1, H] each, with
    fewer slots where `ring_size` says so."""
    shape = batch, config.num_kv_heads, ring_size(slots, window, ahead) + 1, config.head_dim
    return tuple(split_in_use(jnp.zeros(shape, dtype), None, "tensor") for _ in range(2))


def ring_size(slots: int, window: int | None, ahead: int) -> int:
    """How many positions a layer's cache holds of `slots`: all, or as many as its window takes.

    ahead: by how many positions a block's last token, or a draft that was not right, may be ahead of the token that
    attends. What is written there must not be in the place of what that token sees.
    """
    if window is None or not isinstance(slots, int):  # the symbolic size of an exported program
        return slots
    return min(slots, window + ahead)


def _positions_of_slots(cache: KV, positions_BT, window: int | None):
    """The position whose K/V a slot holds for a query at each of these positions, [B or 1, T or 1, S]; of slots that
    hold nothing for it, a negative one or one beyond the query's."""
    size = cache[0].shape[2] - 1
    slots_S = jnp.arange(size + 1)
    if window is None or not isinstance(size, int):
        return slots_S[None, None]
    at_BTS = positions_BT[:, :, None] - (positions_BT[:, :, None] - slots_S) % size
    return jnp.where(slots_S < size, at_BTS, -1)


def _fits(cache: KV, block: int, window: int | None) -> bool:
    """Whether a block can be written before its tokens attend: nothing that they see is in the places it takes."""
    size = cache[0].shape[2] - 1
    return window is None or not isinstance(size, int) or size < window or block - 1 <= size - window


def _write(cache: KV, new: KV, positions_BT, window: int | None) -> KV:
    """Puts each token's key and value into the slot of its position.

    Negative positions go into the last slot, which no token owns: a write that is clipped
    happens in place, one that is dropped makes XLA copy the cache (at batch 1 four times a layer).
    """
    size = cache[0].shape[2] - 1
    if window is not None and isinstance(size, int):
        if positions_BT.shape[1] > size:  # of several tokens with one slot the last counts
            positions_BT = jnp.where(positions_BT > positions_BT.max(1, keepdims=True) - size, positions_BT, -1)
        slots_BT = jnp.where(positions_BT < 0, size, positions_BT % size)
    else:
        slots_BT = jnp.where(positions_BT < 0, size, positions_BT)
    return tuple(split_in_use(_put(old, own, slots_BT), None, "tensor") for old, own in zip(cache, new, strict=True))


def _put(cache_BKSH, new_BKTH, slots_BT):
    new_BTKH = rearrange(new_BKTH, "b k t h -> b t k h").astype(cache_BKSH.dtype)
    if slots_BT.size == 1:
        # Written twice: XLA turns a scatter of one place into an update that it fuses with the reading, and
        # then copies the whole cache for it, four times a layer and token (measured: half of a small model's time).
        slots_BT, new_BTKH = jnp.repeat(slots_BT, 2, axis=1), jnp.repeat(new_BTKH, 2, axis=1)
    rows = jnp.arange(cache_BKSH.shape[0])[:, None]
    return cache_BKSH.at[rows, :, slots_BT].set(new_BTKH, mode="promise_in_bounds")
