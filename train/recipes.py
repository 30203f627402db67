"""Recipes: all that decides what a training run computes, but for the model and the data.

    recipe = named("finetune", steps=500, rate=1e-4)
    recipe = named("layerskip-llama2-7b", batch=64)

Published hyper-parameters stand here by name (`RECIPES`), each with its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sled.errors import SettingError
from sled.settings.rules import LARGEST, Instance, Number, OneOf, OrNone, Whole, settle
from sled.train.objective.exit_weights import (
    ExitPlan,
    Gradual,
    LastOnly,
    LayerSkipWeights,
    Rotational,
    UniformWeights,
    WeightedExits,
)
from sled.train.objective.forward import REMAT_RULE
from sled.train.objective.layer_dropout import LayerDropout, dont_drop_dropout, layerskip
from sled.train.optimizers import OPTIMIZERS, SCHEDULES

DTYPES = ("float32", "bfloat16")
CONTEXT = 512
ALL, HEADS = LEARNERS = ("all", "exit-heads")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    steps: of the whole run. batch: rows of a step, over all devices.
    context: tokens of a row; None for as many as the model holds, at most `CONTEXT`.
    accumulate: parts in which a batch is worked off, their gradients summed: less memory, the same result, but that
        layer dropout draws anew for each part.
    exits: which exits learn at a step, and how much each counts; the last layer always does.
    dropout: layer dropout, or None.
    optimizer: "adamw", or "muon" (for the layers' matrices; Adam for the rest).
    rate: the learning rate's peak. schedule: after a linear `warmup` of so many steps, "constant"; "linear" or
        "cosine" down to 0; or "warmup-stable-decay": constant, and over the run's last quarter linear to 0.
    weight_decay, beta2: of the optimiser; norms and biases do not decay. clip: bounds the gradient's global norm.
    z_loss, distill, temperature: see `sled.train.objective.cross_entropy.exit_cross_entropy`; None is off.
    compute_dtype: of the forward and backward pass; parameters and optimiser stay float32.
    remat: see `sled.train.objective.forward.exit_states`.
    learns: "all", or "exit-heads": the heads of early exits alone, each with weight 1, on a frozen backbone
        (EE-Tuning, arXiv 2402.00518); layers above the last of them are not run, and none has a backward pass. Then
        exits, dropout and distill are left at their defaults.
    seed: of the data's order, of what layer dropout drops, and of weights that begin at random.

    Raises `SettingError` for a value out of range.
    """

    steps: int = 1000
    batch: int = 32
    context: int | None = None
    accumulate: int = 1
    exits: ExitPlan = dataclasses.field(default_factory=LastOnly)
    dropout: LayerDropout | None = None
    optimizer: str = "adamw"
    rate: float = 3e-4
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    z_loss: float | None = None
    distill: float | None = None
    temperature: float = 1.0
    compute_dtype: str = "float32"
    remat: str = "full"
    learns: str = ALL
    seed: int = 0

    def __post_init__(self):
        settle(
            self,
            steps=Whole(1, LARGEST, hint="it counts the steps of the whole run"),
            batch=Whole(1, hint="it counts the rows of a step"),
            accumulate=Whole(1, hint="1 works off the batch at once"),
            exits=Instance(ExitPlan, hint="give WeightedExits(...), FixedExits(...) or LastOnly()"),
            rate=Number(0, open_low=True, hint="1e-5 to 1e-3 is usual"),
            warmup=Whole(0, LARGEST, hint="it counts steps"),
            weight_decay=Number(0, hint="0.1 is usual"),
            beta2=Number(0, 1, open_high=True, hint="0.95 is usual"),
            clip=Number(0, open_low=True, hint="1 is usual"),
            temperature=Number(0, open_low=True, hint="1 is usual"),
            seed=Whole(0, 2**32 - 1, hint="any will do"),
            context=OrNone(Whole(2, hint="it counts the tokens of a row")),
            z_loss=OrNone(Number(0, hint="None is off")),
            distill=OrNone(Number(0, hint="None is off")),
            dropout=OrNone(Instance(LayerDropout, hint="give layerskip(0.1), for example, or None")),
            schedule=OneOf(SCHEDULES), optimizer=OneOf(OPTIMIZERS), compute_dtype=OneOf(DTYPES), remat=REMAT_RULE,
            learns=OneOf(LEARNERS))
        if self.batch % self.accumulate:
            raise SettingError(f"Recipe.batch is {self.batch}, which accumulate {self.accumulate} does not divide; "
                               "all parts of a batch are of one size")
        if self.learns == HEADS:
            for field, off in (("exits", LastOnly()), ("dropout", None), ("distill", None)):
                if getattr(self, field) != off:
                    raise SettingError(f"Recipe.{field} is {getattr(self, field)!r}, but the recipe tunes exit heads "
                                       f"alone, which has no use for it; leave it at {off}")


def named(name: str, **changes) -> Recipe:
    """The recipe of this name in `RECIPES`, with other values in some fields.

    What a recipe lets move over the run (curricula, dropout, the rate) follows `steps`.
    Raises SettingError for an unknown name or field, and for a value out of range.
    """
    if name not in RECIPES:
        raise SettingError(f"recipe is {name!r}, which is unknown; choose one of {', '.join(RECIPES)}")
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := changes.keys() - known:
        raise SettingError(f"a recipe has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    fields = RECIPES[name]
    steps = changes.get("steps", fields.get("steps", Recipe.steps))
    made = {field: value(steps) if isinstance(value, OverSteps) else value for field, value in fields.items()}
    return Recipe(**{**made, **changes})


@dataclasses.dataclass(frozen=True)
class OverSteps:
    """A field whose value depends on the number of steps of the run."""

    make: Callable[[int], Any]

    def __call__(self, steps: int) -> Any:
        return self.make(max(int(steps), 2))


def _layerskip(*, rate: float, p: float, scale: float, every: int | None, scratch: bool = False, **rest) -> Mapping:
    """A row of LayerSkip's tables. every: R of the rotation, None for the gradual curriculum."""
    curriculum = (lambda steps: Gradual(steps)) if every is None else (lambda steps: Rotational(every))
    return dict(
        rate=rate, exits=OverSteps(lambda steps: WeightedExits(LayerSkipWeights(scale), curriculum(steps))),
        dropout=OverSteps(lambda steps: layerskip(p, steps=steps if scratch else None)), **rest)


_DEMO = dict(steps=5000, batch=16, context=128, optimizer="muon", rate=3e-3, schedule="warmup-stable-decay", beta2=0.98)

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Of general use. Their rates and lengths are this library's, their exits and dropout LayerSkip's of its kind.
    "pretrain": _layerskip(rate=8e-4, p=0.1, scale=0.2, every=8, scratch=True, steps=10_000,
                           schedule="warmup-stable-decay"),
    "continue": _layerskip(rate=3e-5, p=0.1, scale=0.2, every=8, steps=10_000),
    "finetune": _layerskip(rate=1e-4, p=0.1, scale=1.0, every=16, steps=1000, schedule="linear", weight_decay=0.0),
    "plain": dict(steps=1000),
    # For small models of the demo's problems: packed rows of one length, so that one program compiles.
    "demo": dict(
        _DEMO, exits=WeightedExits(UniformWeights(), Rotational(5)),
        dropout=OverSteps(lambda steps: layerskip(0.1, steps=steps))),
    # The same without early exits and layer dropout, to compare with.
    "demo-plain": dict(_DEMO),
    # EE-Tuning (arXiv 2402.00518); the rate and the number of steps are this library's.
    "tune-exits": dict(learns=HEADS, steps=1000, rate=1e-3, schedule="linear", weight_decay=0.0),
    # LayerSkip (arXiv 2404.16710), tables of hyper-parameters; rates that it does not give are those of its kind above.
    "layerskip-llama2-7b": _layerskip(rate=3e-5, p=0.1, scale=0.2, every=8, steps=50_000, context=4096),
    "layerskip-llama2-13b": _layerskip(rate=3e-5, p=0.1, scale=0.1, every=39, steps=50_000, context=4096),
    "layerskip-llama3-8b": _layerskip(rate=3e-5, p=0.1, scale=0.1, every=8, steps=50_000, context=4096),
    "layerskip-llama3.2-1b": _layerskip(rate=3e-5, p=0.1, scale=0.1, every=8, steps=50_000, context=4096),
    "layerskip-scratch-1.5b": _layerskip(rate=8e-4, p=0.1, scale=0.2, every=23, scratch=True, steps=50_000,
                                         context=4096),
    "layerskip-scratch-7b": _layerskip(rate=8e-4, p=0.2, scale=0.2, every=31, scratch=True, steps=50_000,
                                       context=4096),
    "layerskip-code": _layerskip(rate=1e-4, p=0.1, scale=1.0, every=16, steps=10_000, context=4096),
    "layerskip-topv2": _layerskip(rate=1e-4, p=0.2, scale=1.0, every=None, steps=5800, context=1024),
    # The later recipe of layer dropout (arXiv 2609.05275): rescaled, linear in depth, falling to 0 over the run.
    "dont-drop-dropout": dict(
        rate=3e-4, steps=10_000, exits=WeightedExits(UniformWeights(), Rotational(8)),
        dropout=OverSteps(lambda steps: dont_drop_dropout(0.1, steps=steps))),
}
