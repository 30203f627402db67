"""Layer dropout: which layers a sequence skips at a training step, and how skipping them saves work.

A layer is h <- h + f(h). Where it is dropped, h stays as it is; where it is kept, f(h) may be rescaled, so that
the expectation stays what it is without dropout. A `LayerDropout` is composed of

    rate       p_max, the largest probability of dropping
    profile    how it grows with the layer: `ExponentialProfile`, `LinearProfile`
    schedule   how it moves with the step: `Steady`, `Rising`, `Falling`
    rescale    whether what is kept is divided by 1 - p
    way        how rows are dropped: `Masked`, `FixedRows`, `WholeBatch`

and `layerskip` and `dont_drop_dropout` are the published recipes. What is dropped is a function of a key and the
step alone: a run that resumes at a step goes on exactly as it would have.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sled.settings.pytree import traced
from sled.settings.rules import LARGEST, Flag, Instance, Number, Whole, settle
from sled.train.objective.dropping import Drops, Masked, Way


@runtime_checkable
class DropProfile(Protocol):
    def shares(self, num_layers: int) -> np.ndarray:
        """p_l / p_max of each layer [L], float32: 0 for the first layer, never falling, at most 1."""
        ...


@runtime_checkable
class DropSchedule(Protocol):
    def share(self, step) -> jax.Array:
        """The factor of every probability at a step, in [0, 1]. It only rises, or only falls."""
        ...


@traced()
@dataclasses.dataclass(frozen=True)
class ExponentialProfile:
    """exp(l ln2 / (L - 1)) - 1 for layer l = 0..L-1 (LayerSkip, arXiv 2404.16710, section 4.1.1)."""

    def shares(self, num_layers: int) -> np.ndarray:
        return np.expm1(_depth(num_layers) * math.log(2)).astype(np.float32)


@traced()
@dataclasses.dataclass(frozen=True)
class LinearProfile:
    """l / (L - 1) for layer l = 0..L-1 (stochastic depth, arXiv 1603.09382; arXiv 2609.05275)."""

    def shares(self, num_layers: int) -> np.ndarray:
        return _depth(num_layers).astype(np.float32)


def _depth(num_layers: int) -> np.ndarray:
    return np.arange(num_layers) / max(num_layers - 1, 1)


@traced()
@dataclasses.dataclass(frozen=True)
class Steady:
    """The same probabilities at every step (LayerSkip, when continuing or fine-tuning)."""

    def share(self, step) -> jax.Array:
        return jnp.ones((), jnp.float32)


@traced("steps")
@dataclasses.dataclass(frozen=True)
class Rising:
    """exp(t ln2 / (T - 1)) - 1 at step t = 0..T-1, T = `steps` (LayerSkip's S_exp, from scratch); 1 afterwards."""

    steps: int

    def __post_init__(self):
        _settle_steps(self)

    def share(self, step) -> jax.Array:
        return jnp.expm1(_progress(step, self.steps) * math.log(2))


@traced("steps")
@dataclasses.dataclass(frozen=True)
class Falling:
    """1 - t / (T - 1) at step t = 0..T-1, T = `steps` (arXiv 2609.05275); 0 afterwards."""

    steps: int

    def __post_init__(self):
        _settle_steps(self)

    def share(self, step) -> jax.Array:
        return 1 - _progress(step, self.steps)


def _settle_steps(self) -> None:
    settle(self, steps=Whole(2, LARGEST, hint="it counts the steps of the whole run"))


def _progress(step, steps) -> jax.Array:
    return jnp.clip(jnp.float32(step) / (jnp.float32(steps) - 1), 0, 1)


@traced("rate", "profile", "schedule", "way")
@dataclasses.dataclass(frozen=True)
class LayerDropout:
    """See the module. `rate` and a schedule's steps are traced; `rescale` and the way are static.

    p_l(t) = schedule(t) * profile(l) * rate. A rate of 0 changes no bit of what is computed.
    """

    rate: float
    profile: DropProfile = dataclasses.field(default_factory=LinearProfile)
    schedule: DropSchedule = dataclasses.field(default_factory=Steady)
    rescale: bool = True
    way: Way = dataclasses.field(default_factory=Masked)

    def __post_init__(self):
        settle(self, rate=Number(0, 1, open_high=True, hint="0.1 or 0.2 is usual"),
               profile=Instance(DropProfile, hint="LinearProfile(), for example"),
               schedule=Instance(DropSchedule, hint="Falling(steps), for example"),
               rescale=Flag(hint="True divides what is kept by 1 - p"),
               way=Instance(Way, hint="Masked(), for example"))

    def rates(self, step, num_layers: int) -> jax.Array:
        """The probability of dropping each layer at this step: [L] float32."""
        return self.schedule.share(step) * self.rate * self.profile.shares(num_layers)

    def draw(self, key, step, batch: int, num_layers: int) -> Drops:
        """What is dropped at this step, of a batch of `batch` sequences. `key` is the run's, the same at every step."""
        rates_L = self.rates(step, num_layers)
        scale_L = 1 / (1 - rates_L) if self.rescale else jnp.ones_like(rates_L)
        return self.way.draw(jax.random.fold_in(key, step), rates_L, scale_L, batch)

    def saving(self, batch: int, num_layers: int, first_step: int, last_step: int) -> LayerDropout:
        """The same dropout, its way told how much work the steps first..last save at least (see `FixedRows`).

        The counts are static, so a train step compiles again when they change: ask for long stretches of steps.
        """
        ends = [np.asarray(self.rates(step, num_layers), np.float64) for step in (first_step, last_step)]
        return dataclasses.replace(self, way=self.way.saving(np.minimum(*ends), batch))


def layerskip(rate: float, *, steps: int | None = None, way: Way | None = None) -> LayerDropout:
    """LayerSkip's recipe (arXiv 2404.16710): exponential profile, nothing rescaled.

    `steps`: of a run from scratch, over which the probabilities rise; None where a trained model is continued.
    The paper's rates are 0.1 or 0.2.
    """
    schedule = Steady() if steps is None else Rising(steps)
    return LayerDropout(rate, ExponentialProfile(), schedule, rescale=False, way=Masked() if way is None else way)


def dont_drop_dropout(rate: float, *, steps: int, way: Way | None = None) -> LayerDropout:
    """The later recipe (arXiv 2609.05275): linear profile, probabilities fall to 0 over the run, rescaled."""
    return LayerDropout(rate, LinearProfile(), Falling(steps), rescale=True, way=Masked() if way is None else way)

