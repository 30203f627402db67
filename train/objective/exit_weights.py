"""The weight of each exit's loss at a step: which exits learn (curricula), and how much each counts (profiles).

An exit is a hidden state by its number n = 1..L, as everywhere in this library; the papers count layers
l = n - 1 = 0..L-1, whose loss is taken on the hidden state after the layer. Everything is a function of the step
alone, which may be traced: a run that resumes goes on exactly as it would have. How many exits there are (E) is static,
which ones is traced: no step recompiles, and none computes the exits whose turn it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from sled.errors import SettingError
from sled.settings.decorator import setting, settings
from sled.settings.rules import Each, Instance, Layers, Number, OneOf, Whole


@runtime_checkable
class Profile(Protocol):
    """The weight of an exit beside the others, whatever the step."""

    def weigh(self, layers_E, num_layers: int) -> jax.Array:
        """Positive numbers [E], float32, of hidden states `layers_E`; 0 for an exit that never counts."""


@runtime_checkable
class Curriculum(Protocol):
    """The exits that learn at a step."""

    def early_exits(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        """`layers_E`, ascending within 1..L-1, and whether each is on [E]. The last layer is none of them."""


@settings
class LayerSkipWeights:
    """LayerSkip's e(l) (arXiv 2404.16710, section 4.1.2): scale * sum_{i<=l} i, and for the last layer
    L - 1 + scale * sum_{i<=L-2} i.

    The first layer counts nothing (its sum is 0). A model of one layer has e = 1, where the formula says 0.
    """

    scale: float = setting(Number(0, hint="0.1 or 0.2 to pre-train or continue, 1 to fine-tune"), default=0.2,
                           traced=True, help="how fast the weight grows with the layer")

    def weigh(self, layers_E, num_layers: int) -> jax.Array:
        n = jnp.asarray(layers_E, jnp.float32)
        below = jnp.where(n < num_layers, n, n - 1)  # the last layer's sum ends where its predecessor's does
        bonus = jnp.where(n < num_layers, 0.0, max(num_layers - 1, 1))
        return bonus + self.scale * below * (below - 1) / 2


@settings
class ProportionalWeights:
    """Each exit in proportion to its number (CALM, arXiv 2207.07061, equation 6)."""

    def weigh(self, layers_E, num_layers: int) -> jax.Array:
        return jnp.asarray(layers_E, jnp.float32)


@settings
class UniformWeights:
    """Every exit alike."""

    def weigh(self, layers_E, num_layers: int) -> jax.Array:
        return jnp.ones(jnp.shape(layers_E), jnp.float32)


@settings
class AllExits:
    """The same exits at every step: `layers` and the last one, or every layer. E = their number."""

    layers: tuple[int, ...] | None = setting(Layers((None,)), default=None)

    def early_exits(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        chosen = range(1, num_layers + 1) if self.layers is None else self.layers
        _check_range(self, chosen, num_layers)
        early_E = jnp.array([n for n in chosen if n < num_layers], jnp.int32)
        return early_E, jnp.ones(early_E.shape, bool)


@settings
class Rotational:
    """Every R-th layer, one further at each step (LayerSkip's C_rot,R): those with l = step modulo R.

    R is at most L - 1, what `every` says beyond that being taken for it: else some turns would have no early exit.
    E = ceil((L - 1) / R) + 1. Where a turn has one layer less, layer L - 1 fills its place with weight 0.
    """

    every: int = setting(Whole(1, hint="it is the distance between the exits of a step; LayerSkip takes 8 to L - 1"))

    def early_exits(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        every = max(min(self.every, num_layers - 1), 1)
        first = 1 + step % every
        layers_E = first + every * jnp.arange(-(-(num_layers - 1) // every), dtype=jnp.int32)
        return jnp.minimum(layers_E, num_layers - 1), layers_E < num_layers


@settings
class Gradual:
    """From the last layer down to the first, one more every T / (2 L) steps (LayerSkip's C_grad), T = `steps`.

    Layer l learns from step T (L - 1 - l) / (2 L) on. E = L: exits whose time has not come have weight 0.
    """

    steps: int = setting(Whole(1, hint="it counts the steps of the whole run"), traced=True)

    def early_exits(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        layers_E = jnp.arange(1, num_layers, dtype=jnp.int32)
        waits_E = num_layers - layers_E
        # ceil(T waits / (2 L)) by parts: the product alone can exceed int32.
        whole, rest = self.steps // (2 * num_layers), self.steps % (2 * num_layers)
        begins_E = whole * waits_E + -(-rest * waits_E // (2 * num_layers))
        return layers_E, step >= begins_E


@runtime_checkable
class ExitPlan(Protocol):
    """The exits that a train step computes, and the weights of their losses."""

    def exits_at(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        """Exits of this step and the weights of their losses: [E] int32 strictly ascending, [E] float32.

        The last entry is the last layer. To tune exits on a frozen backbone leave it out (`[:-1]`).
        """


@settings
class LastOnly:
    """No early exit learns: a model is trained as usual."""

    def exits_at(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        return jnp.array([num_layers], jnp.int32), jnp.ones(1, jnp.float32)


@settings
class WeightedExits:
    """Weights of a profile, normalised over the exits that are on at the step: they add up to 1.

    LayerSkip: C(t, l) e(l) / sum_i C(t, i) e(i) with `LayerSkipWeights` and `Rotational` or `Gradual`.
    CALM: `ProportionalWeights` and `AllExits`.
    """

    profile: Profile = setting(Instance(Profile, hint="LayerSkipWeights(), for example"), default=LayerSkipWeights(),
                               traced=True)
    curriculum: Curriculum = setting(Instance(Curriculum, hint="Rotational(8), for example"), default=AllExits(),
                                     traced=True)

    def exits_at(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        early_E, on_E = self.curriculum.early_exits(step, num_layers)
        layers_E, on_E = jnp.append(early_E, num_layers), jnp.append(on_E, True)
        weights_E = jnp.where(on_E, self.profile.weigh(layers_E, num_layers), 0.0)
        return layers_E, weights_E / weights_E.sum()


_WEIGHT = Number(0, hint="0.1 to 0.5 is usual")


def _ascending(name: str, value) -> tuple[int, ...]:
    layers = Layers()(name, value)
    if tuple(value) != layers:
        raise SettingError(f"{name} is {value!r}, but must be ascending and name each layer once; give the weights in "
                           "that order too")
    return layers


@settings
class FixedExits:
    """EE-LLM's plan (arXiv 2312.04916): early exits at `layers` with a weight each beside the last layer's 1.

    The weights go from `initial` at step 0, one number for all or one per exit, above or below, to `weights` at step
    `warmup` and stay; they are not normalised. r = step / warmup of the way is "linear"; "cosine" is
    (1 - cos(pi r)) / 2 of it, slow at both ends. Initial weights, both courses and their names are those of EE-LLM's
    code.
    `layers` are hidden states, which EE-LLM calls post-exit; its pre-exit layer n is hidden state n - 1 here.
    """

    layers: tuple[int, ...] = setting(_ascending)
    weights: tuple[float, ...] = setting(
        Each(_WEIGHT), traced=True, option="exit_weights",
        help="weight of the loss of each early exit, beside the last layer's 1 (EE-LLM)")
    initial: float | tuple[float, ...] = setting(
        Each(_WEIGHT, one=True), default=0.0, traced=True, option="exit_initial",
        help="the weights at step 0, one for all exits or one for each")
    warmup: int = setting(Whole(0, hint="it counts the steps until the weights are reached"), default=0, traced=True,
                          option="exit_warmup", help="steps in which the weights go from the initial ones to their own")
    course: str = setting(OneOf(("linear", "cosine")), default="linear", option="exit_course",
                          help="course of the weights on that way")

    def __post_init__(self):
        several = isinstance(self.initial, tuple)
        for field, values in (("weights", self.weights), *([("initial", self.initial)] if several else [])):
            if len(values) != len(self.layers):
                raise SettingError(f"FixedExits.{field} has {len(values)} entries for {len(self.layers)} layers; "
                                   "give one per layer, none for the last layer of the model")

    def exits_at(self, step, num_layers: int) -> tuple[jax.Array, jax.Array]:
        _check_range(self, (*self.layers, num_layers), num_layers)
        if num_layers in self.layers:
            raise SettingError(f"FixedExits.layers names layer {num_layers}, the last one, whose weight is always 1; "
                               "leave it out")
        way = jnp.where(step < self.warmup, step / jnp.maximum(self.warmup, 1), 1.0)
        if self.course == "cosine":
            way = (1 - jnp.cos(jnp.pi * way)) / 2
        initial_E, weights_E = (jnp.asarray(values, jnp.float32) for values in (self.initial, self.weights))
        weights_E = initial_E + (weights_E - initial_E) * way
        return jnp.array([*self.layers, num_layers], jnp.int32), jnp.append(weights_E, 1.0)


def fixed_layers(plan: ExitPlan, num_layers: int, steps: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The exits of a plan that names the same ones at each of the steps 0..steps - 1; and those of them that learn at
    some step (weight > 0).

    Raises SettingError where they change: heads of their own need exits that are known before a step is compiled.
    """
    layers_E = plan.exits_at(0, num_layers)[0]

    def look(step, found):
        same, learns_E = found
        now_E, weights_E = plan.exits_at(step, num_layers)
        return same & (now_E == layers_E).all(), learns_E | (weights_E > 0)

    same, learns_E = jax.jit(lambda: jax.lax.fori_loop(
        0, steps, look, (jnp.array(True), jnp.zeros(layers_E.shape, bool))))()
    if not same:
        raise SettingError(f"the exits of {plan} change from step to step, but the model has exit heads, whose exits "
                           "must stay; give FixedExits(layers, weights), or WeightedExits with AllExits(layers) "
                           "(--exit-layers)")
    return tuple(layers_E.tolist()), tuple(layers_E[learns_E].tolist())


def exit_counter(plan: ExitPlan, num_layers: int) -> Callable[[int, int], float]:
    """From steps `first` to the last one before `end`: how many early exits learn (weight > 0), on average."""

    def total(first, end):
        on = lambda step: (plan.exits_at(step, num_layers)[1][:-1] > 0).sum(dtype=jnp.int32)  # noqa: E731
        return jax.lax.fori_loop(first, end, lambda step, count: count + on(step), jnp.int32(0))

    compiled = jax.jit(total)
    return lambda first, end: float(compiled(first, end)) / max(end - first, 1)


def _check_range(self, layers, num_layers: int) -> None:
    if wrong := [n for n in layers if not 1 <= n <= num_layers]:
        raise SettingError(f"{type(self).__name__}.layers names {wrong[0]}, but the exits of this model are "
                           f"1 to {num_layers}; choose among them")
