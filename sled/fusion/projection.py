"""The final projection, and how it is walked over the vocabulary: the one place where logits are formed.

The network makes a `SharedHead`; fusion, drafts, the lens and the training loss get their logits from it. It holds the
matrix together with the choice of how to use it: at once (`tile=None`, the definition) or streamed in tiles of
vocabulary rows, so that the logits of all candidate layers never exist together.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp

from sled.errors import SettingError
from sled.settings.decorator import setting, settings
from sled.settings.rules import Number, OrNone, Whole

# Above this many bytes of logits the temporaries leave the processor's cache (CPU) or start to crowd
# out the K/V cache (accelerators), and streaming wins. Measured on a CPU with 32 MB of L3, see `sled bench`.
_DENSE_BYTES = {"cpu": 24 * 2**20}
_DENSE_BYTES_ELSEWHERE = 256 * 2**20
_TILE = {"cpu": 1024}
_TILE_ELSEWHERE = 8192


@settings
class SharedHead:
    """The projection from hidden states to logits.

    Where `shards` devices split the vocabulary axis of `w_VD`, the tiled form walks every shard's own rows side
    by side, so that no device needs another's rows. A vocabulary that they do not divide is taken at once.
    """

    w_VD: jax.Array = setting(traced=True, help="one row per token of the vocabulary")
    tile: int | None = setting(OrNone(Whole(1, hint="it counts vocabulary rows; None takes all at once")), default=None,
                               help="how many vocabulary rows to stream at a time")
    shards: int = setting(Whole(1, hint="it counts devices"), default=1,
                          help="how many devices split the vocabulary axis")
    cap: float | None = setting(OrNone(Number(0, open_low=True, hint="None leaves logits as they are")), default=None,
                                help="logits l become cap * tanh(l / cap), in every layer's (Gemma)")

    def __post_init__(self):
        if self.tile is not None and self.vocabulary % self.shards:
            raise SettingError(
                f"SharedHead.shards is {self.shards}, but does not divide the vocabulary of {self.vocabulary} rows, "
                "which cannot be streamed then; choose a divisor, or leave tile out")

    @property
    def vocabulary(self) -> int:
        return self.w_VD.shape[0]

    def with_weights(self, w_VD) -> SharedHead:
        """The same way to logits by other weights: an exit's own, or some rows of these."""
        return dataclasses.replace(self, w_VD=w_VD)

    def some(self, rows) -> SharedHead:
        """The same way to logits by some rows alone: so many of the first, or those of an array of numbers.

        Where devices split the vocabulary they are looked up, and each device gets all of them: a slice would pass
        from device to device.
        """
        if isinstance(rows, numbers.Integral):
            rows = slice(rows) if self.shards == 1 else jnp.arange(min(rows, self.vocabulary))
        return dataclasses.replace(self, w_VD=self.w_VD[rows], shards=1)

    def project(self, h_xD):
        """Logits (..., V) of hidden states (..., D), accumulated in float32 (float64 for such inputs)."""
        return self._logits("...d,vd->...v", h_xD, self.w_VD)

    def project_vjp(self, h_CD):
        """Logits, and what takes slopes by them to slopes by h and w: not rounded to their types, as `jax.vjp` does."""
        product = functools.partial(jnp.einsum, preferred_element_type=self.dtype(h_CD))

        def pull_back(slope_CV, by_h: bool, by_w: bool):
            if self.cap is not None:
                slope_CV = slope_CV * (1 - (logits_CV / self.cap) ** 2)  # the slope of tanh
            slope_CV = slope_CV.astype(jnp.promote_types(h_CD.dtype, self.w_VD.dtype))
            return (product("cv,vd->cd", slope_CV, self.w_VD) if by_h else None,
                    product("cv,cd->vd", slope_CV, h_CD) if by_w else None)

        logits_CV = self.project(h_CD)
        return logits_CV, pull_back

    def project_rows(self, h_BCD, ids_BK):
        """Logits (B, C, K) of chosen tokens only, from their K rows of the projection."""
        return self._logits("bcd,bkd->bck", h_BCD, jnp.take(self.w_VD, ids_BK, axis=0))

    def dtype(self, h):
        """The type of logits and statistics: float32, or float64 where the inputs are."""
        return jnp.promote_types(jnp.float32, jnp.promote_types(h.dtype, self.w_VD.dtype))

    def stream(self, h_BCD, carry, step):
        """Fold `step` over the vocabulary, `tile` rows of every shard at a time, without a B x C x V array.

        step(carry, l_SBCV, start) -> carry, where l_SBCV are the logits of rows [start, start + tile) of
        each of the S shards. The last call may see fewer rows.
        """
        w_SVD = self.w_VD.reshape(self.shards, self.vocabulary // self.shards, -1)
        rows = w_SVD.shape[1]

        def one(carry, tile_SVD, start):
            if self.shards == 1:  # spelled so that the CPU's product comes out in this order of axes
                l_SBCV = self._logits("bcd,vd->bcv", h_BCD, tile_SVD[0])[None]
            else:
                l_SBCV = self._logits("bcd,svd->sbcv", h_BCD, tile_SVD)
            return step(carry, l_SBCV, start)

        def body(i, carry):
            tile_SVD = jax.lax.dynamic_slice_in_dim(w_SVD, i * self.tile, self.tile, axis=1)
            return one(carry, tile_SVD, i * self.tile)

        # The remainder is a smaller tile of its own: no padding, no masks.
        whole = rows // self.tile
        if whole:
            carry = jax.lax.fori_loop(0, whole, body, carry)
        if rows % self.tile:
            carry = one(carry, w_SVD[:, whole * self.tile :], whole * self.tile)
        return carry

    def _logits(self, axes, h, w):
        logits = jnp.einsum(axes, h, w, preferred_element_type=self.dtype(h))
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)


def default_tile(rows: int, vocabulary: int, platform: str | None = None) -> int | None:
    """A sensible `tile` for `rows` = batch x candidate layers, on the given (or the default) platform.

    None, the dense form, while the logits of all candidates are small: XLA then multiplies by the whole
    matrix in place, where a tile is copied first (on a CPU 15 to 20% of a step at batch 1). A tile beyond
    that: it bounds the memory, and on a CPU at batch 8 it is 1.1 to 1.3 times as fast as the dense form.

    Rows that are not a number are the symbolic batch of an exported program, which may come to any and run anywhere:
    then a tile wherever it is less than the vocabulary.
    """
    if not isinstance(rows, int):
        return _TILE_ELSEWHERE if vocabulary > _TILE_ELSEWHERE else None
    platform = platform or jax.default_backend()
    if 4 * rows * vocabulary <= _DENSE_BYTES.get(platform, _DENSE_BYTES_ELSEWHERE):
        return None
    return _TILE.get(platform, _TILE_ELSEWHERE)


def fused_logits(fusion, h_BCD, head: SharedHead):
    """A strategy's logits (B, V), by the tile that suits the platform for which the computation is lowered.

    Raises SettingError where a strategy gives something else than logits (B, V).
    """
    def logits(tiled, h_BCD):
        logits_BV, expected = fusion.logits(h_BCD, tiled), (h_BCD.shape[0], head.vocabulary)
        if jnp.shape(logits_BV) != expected:
            raise SettingError(f"{type(fusion).__name__}.logits gave an array of the shape {jnp.shape(logits_BV)} for "
                               f"hidden states of {h_BCD.shape}, but must give one row of logits for each of the first "
                               f"axis, {expected}")
        return logits_BV

    return with_tile(logits, head, h_BCD)


def with_tile(compute, head: SharedHead, h_BCD, *arrays):
    """`compute(head, h_BCD, *arrays)`, its head with the tile that suits these hidden states and the platform for which
    the computation is lowered."""
    if head.vocabulary % head.shards:
        return compute(head, h_BCD, *arrays)
    rows = h_BCD.shape[0] * h_BCD.shape[1]
    on_cpu, elsewhere = (dataclasses.replace(head, tile=default_tile(rows, head.vocabulary // head.shards, name))
                         for name in ("cpu", "elsewhere"))
    if on_cpu.tile == elsewhere.tile:
        return compute(on_cpu, h_BCD, *arrays)
    return jax.lax.platform_dependent(h_BCD, *arrays, cpu=functools.partial(compute, on_cpu),
                                      default=functools.partial(compute, elsewhere))
