"""Optimisers and learning rates by name, for the parameters of a stacked decoder. Others of optax serve as well."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
import optax.contrib

SCHEDULES = ("constant", "linear", "cosine", "warmup-stable-decay")
OPTIMIZERS = ("adamw", "muon")


def rate_schedule(name: str, peak: float, warmup: int) -> Callable[[int], optax.Schedule]:
    """From the number of steps of a run to the learning rate as a function of the step, 0 and up.

    After a linear warm-up of `warmup` steps (at most all), whose first already learns: one of `SCHEDULES`.
    """

    def of(steps: int) -> optax.Schedule:
        rising = min(warmup, steps)
        falling = max(steps - rising, 1)
        quarter = max(steps // 4, 1)
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, 0.0, falling),
            "cosine": optax.cosine_decay_schedule(peak, falling),
            "warmup-stable-decay": optax.linear_schedule(peak, 0.0, quarter, max(falling - quarter, 0)),
        }[name]
        if not rising:
            return after
        return optax.join_schedules(
            [optax.linear_schedule(peak / rising, peak, max(rising - 1, 1)), after], [rising])

    return of


def make_optimizer(name: str, rate: optax.Schedule, *, weight_decay: float, beta2: float,
                   clip: float) -> optax.GradientTransformation:
    """"adamw", or "muon": Muon for the layers' matrices and Adam for norms, biases and tables.

    The gradient is first clipped to a global norm of `clip`; norms and biases do not decay. Muon's updates are scaled
    to Adam's usual size (root mean square 0.2; arXiv 2502.16982), so that one rate serves both.
    """
    if name == "adamw":
        step = optax.adamw(rate, b2=beta2, weight_decay=weight_decay, mask=_decays)
    else:
        stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

        def matrices(path, leaf):  # an exit's own projection is a table too
            return stacked if leaf.ndim > 2 and "projection" not in jax.tree_util.keystr(path) else None

        direction = optax.contrib.muon(
            1.0, adam_b2=beta2, consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda weights: jax.tree_util.tree_map_with_path(matrices, weights))
        # Its own weight decay spares what Adam moves, tables among them. What it gives is downhill already.
        step = optax.chain(direction, optax.add_decayed_weights(-weight_decay, _decays), optax.scale_by_schedule(rate))
    return optax.chain(optax.clip_by_global_norm(clip), step)


def _decays(weights):
    """A mask of the parameters that decay: matrices and tables, not norms and biases, which the stacked form's ranks do
    not distinguish."""

    def decays(path, leaf) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(decays, weights)
