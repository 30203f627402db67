"""Layer dropout: which layers a sequence skips at a training step, and how skipping them saves work.

A layer is h <- h + f(h). Where it is dropped, h stays as it is; where it is kept, f(h) may be rescaled, so that
the expectation stays what it is without dropout. `layerskip` and `dont_drop_dropout` are the published recipes. What is
dropped is a function of a key and the step alone: a run that resumes goes on exactly as it would have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.settings.decorator import setting, settings
from sled.settings.rules import Each, Flag, Instance, Number, Whole

RunLayer = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@runtime_checkable
class DropStrategy(Protocol):
    """Drops a layer for some rows of a batch: draws which at the start of a step, and applies it where the layer runs.

    `run(h, rows)` is the layer on any number of rows: h + f(h), and a pytree of what it counted of each, to become 0
    where one is dropped (None: nothing). `rows` is a pytree of what else it reads per row (positions, masks). Leaves
    have the rows' axis first, in `rows` of length 1 where all rows share it. With s = 0 where a row is dropped, else 1
    or 1 / (1 - p), the layer becomes h + s f(h).
    """

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        """A draw of what each layer drops, with probabilities `rates_L`; `scale_L` multiplies what is kept."""

    def saving(self, rates_L: np.ndarray, batch: int) -> DropStrategy:
        """The same strategy for steps whose probabilities are at least `rates_L`, so that work can be saved."""
        return self

    def computing_all(self) -> DropStrategy:
        """The same strategy, for steps that leave no single rows out of the computation."""
        return self

    def stretches(self, num_layers: int) -> list[int]:
        """Lengths of the runs of layers that are compiled alike."""
        return [num_layers]

    def apply(self, run: RunLayer, h_BTD, rows, drops: Drops, layer: int) -> tuple[jax.Array, Any]:
        """The layer's output [B, T, D] and its counts. `drops` is one layer's; `layer` is any of its stretch (0-based).

        By default all rows are computed, and dropped ones masked.
        """
        return _kept(run, h_BTD, rows, drops.scale_LB)


@settings
class Drops:
    """A draw, for all layers or (under `lax.scan`, or mapped over the first axis) one.

    scale_LB: s of each row, [L, B], or [L, 1] where all rows share it. order_LB: the rows, those to drop first,
    only where the strategy needs it.
    """

    scale_LB: jax.Array = setting(traced=True)
    order_LB: jax.Array | None = setting(traced=True)
    strategy: DropStrategy = setting(traced=True)


@settings
class Masked(DropStrategy):
    """Drops each sequence on its own, as the papers define it: all rows are computed and dropped ones masked."""

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        kept_LB = jax.random.uniform(key, (rates_L.shape[0], batch)) >= rates_L[:, None]
        return Drops(kept_LB * scale_L[:, None], None, self)


@settings
class WholeBatch(DropStrategy):
    """Drops all sequences together, with probability p: a dropped layer costs nothing, forward or backward.

    Sequences are no longer independent, so a step's gradient varies more than with the other strategies.
    """

    def draw(self, key, rates_L, scale_L, batch: int) -> Drops:
        kept_L = jax.random.uniform(key, rates_L.shape) >= rates_L
        return Drops((kept_L * scale_L)[:, None], None, self)

    def apply(self, run: RunLayer, h_BTD, rows, drops: Drops, layer: int) -> tuple[jax.Array, Any]:
        keep = lambda h: _kept(run, h, rows, drops.scale_LB)  # noqa: E731
        nothing = jax.tree.map(lambda counts: jnp.zeros(counts.shape, counts.dtype), jax.eval_shape(keep, h_BTD)[1])
        return jax.lax.cond(drops.scale_LB[0] > 0, keep, lambda h: (h, nothing), h_BTD)


@settings
class FixedRows(DropStrategy):
    """Drops R p of R sequences in each layer, chosen at random, R p being rounded up or down at random.

    Each row is dropped with probability p exactly, at any step; unlike with `Masked`, how many rows a layer drops
    varies by less than one. Of these rows `saved` are static and left out of the computation (the rows that stay are
    gathered, run, and put back); the others, at most one where the counts fit the step's p, are computed and masked.
    So `saved` says what is saved, and never what is dropped: it may follow a schedule in coarse stretches of steps
    (`LayerDropout.saving`), with a compilation for each. A step whose p is too small for `saved` gives NaN: its counts
    were made for other steps.

    Rows are chosen within each of `shards` equal parts of the batch. Where the batch lies on several devices, take
    their number: no row then moves between them. R is the rows of a part: below 1 / p it saves nothing.
    """

    saved: tuple[int, ...] = setting(
        Each(Whole(0, hint="LayerDropout.saving gives the counts that fit a stretch of steps")), default=(),
        help="rows left out of each shard, per layer; () leaves out none")
    shards: int = setting(Whole(1, hint="it is the number of parts that the batch is divided into"), default=1)

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

    def computing_all(self) -> FixedRows:
        return dataclasses.replace(self, saved=())

    def stretches(self, num_layers: int) -> list[int]:
        if self.saved and len(self.saved) != num_layers:
            raise SettingError(f"FixedRows.saved has {len(self.saved)} counts for {num_layers} layers; give one per "
                               "layer: LayerDropout.saving makes them")
        return [len(list(equal)) for _, equal in groupby(self.saved or (0,) * num_layers)]

    def apply(self, run: RunLayer, h_BTD, rows, drops: Drops, layer: int) -> tuple[jax.Array, Any]:
        saved = self.saved[layer] if self.saved else 0
        if saved == 0:
            return super().apply(run, h_BTD, rows, drops, layer)
        kept_GK = drops.order_LB.reshape(self.shards, -1)[:, saved:]

        split = lambda x: x.reshape(self.shards, -1, *x.shape[1:])  # noqa: E731

        def take(x):
            if x.shape[0] == 1:
                return x
            return jax.vmap(lambda part, kept: part[kept])(split(x), kept_GK).reshape(-1, *x.shape[1:])

        h_KTD = take(h_BTD)
        new_KTD, counts = _kept(run, h_KTD, jax.tree.map(take, rows), take(drops.scale_LB))

        def put(into, new):
            # No promise that indices are unique: with it the gradient is wrong where parts span devices (jax 0.10).
            put = lambda part, kept, new: part.at[kept].set(new)  # noqa: E731
            return jax.vmap(put)(split(into), kept_GK, split(new)).reshape(into.shape)

        return put(h_BTD, new_KTD), jax.tree.map(
            lambda of_kept: put(jnp.zeros((len(h_BTD), *of_kept.shape[1:]), of_kept.dtype), of_kept), counts)

    def _rows_per_shard(self, batch: int) -> int:
        if batch % self.shards:
            raise SettingError(f"FixedRows.shards is {self.shards}, which does not divide a batch of {batch}; give a "
                               "divisor")
        return batch // self.shards


_SLACK = 1e-3  # rows; what float32 may take from R p


def _kept(run: RunLayer, h_BTD, rows, scale_B) -> tuple[jax.Array, Any]:
    """All rows computed, and those of scale 0 masked."""
    out_BTD, counts = run(h_BTD, rows)
    mask = lambda of_rows: of_rows * (scale_B > 0).reshape(-1, *[1] * (of_rows.ndim - 1))  # noqa: E731
    return _blend(out_BTD, h_BTD, scale_B), jax.tree.map(mask, counts)


def _blend(out_BTD, h_BTD, scale_B):
    """h + s f(h) of out = h + f(h). By selection, since rounding would show even in the gradients of s = 1."""
    wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
    s = scale_B.astype(wide)[:, None, None]
    h, out = h_BTD.astype(wide), out_BTD.astype(wide)
    return jnp.where(s == 1, out, jnp.where(s == 0, h, h + s * (out - h))).astype(h_BTD.dtype)


@runtime_checkable
class DropProfile(Protocol):
    def shares(self, num_layers: int) -> np.ndarray:
        """p_l / p_max of each layer [L], float32: 0 for the first layer, never falling, at most 1."""


@runtime_checkable
class DropSchedule(Protocol):
    def share(self, step) -> jax.Array:
        """The factor of every probability at a step, in [0, 1]. It only rises, or only falls."""


@settings
class ExponentialProfile:
    """exp(l ln2 / (L - 1)) - 1 for layer l = 0..L-1 (LayerSkip, arXiv 2404.16710, section 4.1.1)."""

    def shares(self, num_layers: int) -> np.ndarray:
        return np.expm1(_depth(num_layers) * math.log(2)).astype(np.float32)


@settings
class LinearProfile:
    """l / (L - 1) for layer l = 0..L-1 (stochastic depth, arXiv 1603.09382; arXiv 2609.05275)."""

    def shares(self, num_layers: int) -> np.ndarray:
        return _depth(num_layers).astype(np.float32)


def _depth(num_layers: int) -> np.ndarray:
    return np.arange(num_layers) / max(num_layers - 1, 1)


@settings
class Steady:
    """The same probabilities at every step (LayerSkip, when continuing or fine-tuning)."""

    def share(self, step) -> jax.Array:
        return jnp.ones((), jnp.float32)


_STEPS = Whole(2, hint="it counts the steps of the whole run")


@settings
class Rising:
    """exp(t ln2 / (T - 1)) - 1 at step t = 0..T-1, T = `steps` (LayerSkip's S_exp, from scratch); 1 afterwards."""

    steps: int = setting(_STEPS, traced=True)

    def share(self, step) -> jax.Array:
        return jnp.expm1(_progress(step, self.steps) * math.log(2))


@settings
class Falling:
    """1 - t / (T - 1) at step t = 0..T-1, T = `steps` (arXiv 2609.05275); 0 afterwards."""

    steps: int = setting(_STEPS, traced=True)

    def share(self, step) -> jax.Array:
        return 1 - _progress(step, self.steps)


def _progress(step, steps) -> jax.Array:
    return jnp.clip(jnp.float32(step) / (jnp.float32(steps) - 1), 0, 1)


@settings
class LayerDropout:
    """Drops layer l at step t with probability p_l(t) = schedule(t) * profile(l) * rate.

    The rate and a schedule's steps are traced; `rescale` and the strategy are static. A rate of 0 changes no bit of
    what is computed.
    """

    rate: float = setting(Number(0, 1, open_high=True, hint="0.1 or 0.2 is usual"), traced=True,
                          help="the largest probability of dropping")
    profile: DropProfile = setting(Instance(DropProfile, hint="LinearProfile(), for example"), default=LinearProfile(),
                                   traced=True, help="how the probability grows with the layer")
    schedule: DropSchedule = setting(Instance(DropSchedule, hint="Falling(steps), for example"), default=Steady(),
                                     traced=True, help="how the probability moves with the step")
    rescale: bool = setting(Flag(hint="True divides what is kept by 1 - p"), default=True)
    strategy: DropStrategy = setting(Instance(DropStrategy, hint="Masked(), for example"), default=Masked(),
                                     traced=True, help="how rows are dropped")

    def rates(self, step, num_layers: int) -> jax.Array:
        """The probability of dropping each layer at this step: [L] float32."""
        return self.schedule.share(step) * self.rate * self.profile.shares(num_layers)

    def draw(self, key, step, batch: int, num_layers: int) -> Drops:
        """A draw for this step, of a batch of `batch` sequences. `key` is the run's, the same at every step."""
        rates_L = self.rates(step, num_layers)
        scale_L = 1 / (1 - rates_L) if self.rescale else jnp.ones_like(rates_L)
        return self.strategy.draw(jax.random.fold_in(key, step), rates_L, scale_L, batch)

    def saving(self, batch: int, num_layers: int, first_step: int, last_step: int) -> LayerDropout:
        """The same dropout, which saves the work that the steps first..last save at least (see `FixedRows`).

        The counts are static, so a train step compiles again when they change: ask for long stretches of steps.
        """
        ends = [np.asarray(self.rates(step, num_layers), np.float64) for step in (first_step, last_step)]
        return dataclasses.replace(self, strategy=self.strategy.saving(np.minimum(*ends), batch))


def layerskip(rate: float, *, steps: int | None = None, strategy: DropStrategy | None = None) -> LayerDropout:
    """LayerSkip's recipe (arXiv 2404.16710): exponential profile, nothing rescaled; the paper's rates are 0.1 or 0.2.

    `steps`: of a run from scratch, over which the probabilities rise; None where a trained model is continued.
    """
    schedule = Steady() if steps is None else Rising(steps)
    return LayerDropout(rate, ExponentialProfile(), schedule, rescale=False, strategy=strategy or Masked())


def dont_drop_dropout(rate: float, *, steps: int, strategy: DropStrategy | None = None) -> LayerDropout:
    """The later recipe (arXiv 2609.05275): linear profile, probabilities fall to 0 over the run, rescaled."""
    return LayerDropout(rate, LinearProfile(), Falling(steps), rescale=True, strategy=strategy or Masked())

