"""Three ways to drop a layer for some rows of a batch: masked, fixed rows left out, or the whole batch at once.

A way draws, at the start of a step, what each layer drops, and applies it where the layer would run. `run(h, rows)`
is the layer, h + f(h), on any number of rows; `rows` is a pytree of what else it reads per row (positions, masks),
each leaf with the rows' axis first, of length 1 where all rows share it.

With s = 0 where a row is dropped, else 1 or 1 / (1 - p), the layer becomes h + s f(h): h itself where s = 0, and
run(h) itself where s = 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.settings.pytree import traced
from sled.settings.rules import Each, Whole, settle

Run = Callable[[jax.Array, Any], jax.Array]


@runtime_checkable
class Way(Protocol):
    """How rows are dropped."""

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        """What each layer drops, with probabilities `rates_L`; `scale_L` multiplies what is kept."""
        ...

    def saving(self, rates_L: np.ndarray, batch: int) -> Way:
        """The way itself, told that the probabilities are `rates_L` at least."""
        ...

    def stretches(self, num_layers: int) -> list[int]:
        """Lengths of the runs of layers that are compiled alike."""
        ...

    def apply(self, run: Run, h_BTD, rows, drops: Drops, layer: int) -> jax.Array:
        """The layer's output [B, T, D]. `drops` is one layer's; `layer` is any of its stretch (0-based)."""
        ...


@traced("scale_LB", "order_LB", "way")
@dataclasses.dataclass(frozen=True)
class Drops:
    """A draw, for all layers or (under `lax.scan`, or mapped over the first axis) one.

    scale_LB: s of each row, [L, B], or [L, 1] where all rows share it. order_LB: the rows, those to drop first,
    only where the way needs it.
    """

    scale_LB: jax.Array
    order_LB: jax.Array | None
    way: Way


@traced()
@dataclasses.dataclass(frozen=True)
class Masked:
    """Each sequence on its own, with probability p: every row is computed and dropped ones are masked. Saves nothing.

    The definition that the papers give, and the baseline of the other ways.
    """

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        kept_LB = jax.random.uniform(key, (rates_L.shape[0], batch)) >= rates_L[:, None]
        return Drops(kept_LB * scale_L[:, None], None, self)

    def saving(self, rates_L: np.ndarray, batch: int) -> Masked:
        return self

    def stretches(self, num_layers: int) -> list[int]:
        return [num_layers]

    def apply(self, run: Run, h_BTD, rows, drops: Drops, layer: int) -> jax.Array:
        return _blend(run(h_BTD, rows), h_BTD, drops.scale_LB)


@traced()
@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """All sequences together, with probability p: a dropped layer costs nothing, forward or backward.

    Sequences are no longer independent, so a step's gradient varies more than with the other ways.
    """

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        kept_L = jax.random.uniform(key, rates_L.shape) >= rates_L
        return Drops((kept_L * scale_L)[:, None], None, self)

    def saving(self, rates_L: np.ndarray, batch: int) -> WholeBatch:
        return self

    def stretches(self, num_layers: int) -> list[int]:
        return [num_layers]

    def apply(self, run: Run, h_BTD, rows, drops: Drops, layer: int) -> jax.Array:
        keep = lambda h: _blend(run(h, rows), h, drops.scale_LB)  # noqa: E731
        return jax.lax.cond(drops.scale_LB[0] > 0, keep, lambda h: h, h_BTD)


@traced()
@dataclasses.dataclass(frozen=True)
class FixedRows:
    """As many sequences of a layer as p says, chosen at random: R p rows of R, up or down to a whole number at random.

    Each row is dropped with probability p exactly, at any step; unlike with `Masked`, how many rows a layer drops
    varies by less than one. Of these rows `saved` are static and left out of the computation (the rows that stay are
    gathered, run, and put back); the others, at most one where the counts fit the step's p, are computed and masked.
    So `saved` says what is saved, and never what is dropped: it may follow a schedule in coarse stretches of steps
    (`LayerDropout.saving`), with a compilation for each. A step whose p is too small for `saved` gives NaN: its counts
    were made for other steps.

    saved: rows left out of each shard, per layer; () leaves out none.
    shards: rows are chosen within each of so many equal parts of the batch. Where the batch lies on several devices,
        take their number: no row then moves between them. R is the rows of a part: below 1 / p it saves nothing.
    """

    saved: tuple[int, ...] = ()
    shards: int = 1

    def __post_init__(self):
        settle(self, saved=Each(Whole(0, hint="LayerDropout.saving gives the counts that fit a stretch of steps")),
               shards=Whole(1, hint="it is the number of parts that the batch is divided into"))

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        rows, layers = self._rows_per_shard(batch), rates_L.shape[0]
        saved_L1 = jnp.asarray(self.saved or (0,) * layers)[:, None]
        of_order, of_count = jax.random.split(key)
        order_LGR = jnp.argsort(jax.random.uniform(of_order, (layers, self.shards, rows)), axis=-1)
        expected_L1 = rows * rates_L[:, None]
        dropped_LG = jnp.floor(expected_L1 + jax.random.uniform(of_count, (layers, self.shards)))
        dropped_LG = jnp.maximum(dropped_LG, saved_L1)  # float32 may put expected_L1 a hair below a whole number
        kept_LGR = jnp.argsort(order_LGR, axis=-1) >= dropped_LG[..., None]
        fits_L1 = saved_L1 <= expected_L1 + 2 * _SLACK
        scale_LB = (kept_LGR * scale_L[:, None, None]).reshape(layers, batch)
        return Drops(jnp.where(fits_L1, scale_LB, jnp.nan), order_LGR.reshape(layers, batch), self)

    def saving(self, rates_L: np.ndarray, batch: int) -> FixedRows:
        whole_L = np.floor(self._rows_per_shard(batch) * rates_L + _SLACK)
        return dataclasses.replace(self, saved=tuple(int(rows) for rows in whole_L))

    def stretches(self, num_layers: int) -> list[int]:
        if self.saved and len(self.saved) != num_layers:
            raise SettingError(f"FixedRows.saved has {len(self.saved)} counts for {num_layers} layers; give one per "
                               "layer: LayerDropout.saving makes them")
        return [len(list(equal)) for _, equal in groupby(self.saved or (0,) * num_layers)]

    def apply(self, run: Run, h_BTD, rows, drops: Drops, layer: int) -> jax.Array:
        saved = self.saved[layer] if self.saved else 0
        if saved == 0:
            return _blend(run(h_BTD, rows), h_BTD, drops.scale_LB)
        kept_GK = drops.order_LB.reshape(self.shards, -1)[:, saved:]

        def split(x):
            return x.reshape(self.shards, -1, *x.shape[1:])

        def take(x):
            if x.shape[0] == 1:
                return x
            taken = jax.vmap(lambda part, kept: part[kept])(split(x), kept_GK)
            return taken.reshape(-1, *x.shape[1:])

        h_KTD = take(h_BTD)
        new_KTD = _blend(run(h_KTD, jax.tree.map(take, rows)), h_KTD, take(drops.scale_LB))
        # No promise that indices are unique: with it the gradient is wrong where parts span devices (jax 0.10).
        put = lambda part, kept, new: part.at[kept].set(new)  # noqa: E731
        return jax.vmap(put)(split(h_BTD), kept_GK, split(new_KTD)).reshape(h_BTD.shape)

    def _rows_per_shard(self, batch: int) -> int:
        if batch % self.shards:
            raise SettingError(f"FixedRows.shards is {self.shards}, which does not divide a batch of {batch}; give a "
                               "divisor")
        return batch // self.shards


_SLACK = 1e-3  # rows; what float32 may take from R p


def _blend(out_BTD, h_BTD, scale_B):
    """h + s f(h) of out = h + f(h). By selection, since rounding would show even in the gradients of s = 1."""
    wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
    s = scale_B.astype(wide)[:, None, None]
    h, out = h_BTD.astype(wide), out_BTD.astype(wide)
    return jnp.where(s == 1, out, jnp.where(s == 0, h, h + s * (out - h))).astype(h_BTD.dtype)
