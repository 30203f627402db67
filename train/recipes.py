"""Recipes: all that decides what a training run computes, except for the model and the data.

    recipe = named("finetune", steps=500, learning_rate=1e-4)
    recipe = named("layerskip-llama2-7b", batch_size=64)

Published hyper-parameters stand here by name (`RECIPES`), each with its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sled.errors import SettingError
from sled.settings.decorator import setting, settings
from sled.settings.rules import LARGEST, Instance, Number, OneOf, OrNone, Whole
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
ALL, HEADS = TRAINABLE = ("all", "exit-heads")


@settings
class Recipe:
    """The settings of training.

    After a linear warm-up the learning rate is "constant"; falls to 0 ("linear", "cosine"); or is constant, and falls
    linearly to 0 over the run's last quarter ("warmup-stable-decay"). Parameters and optimiser stay float32. `remat` is
    explained in `sled.train.objective.forward.exit_states`; `z_loss`, `distill` and `temperature` in
    `sled.train.objective.cross_entropy.exit_cross_entropy`.

    Where "exit-heads" are trainable, the heads of early exits learn alone, each with weight 1, on a frozen backbone
    (EE-Tuning, arXiv 2402.00518), which runs forward once for all of them, and never backward; layers above the last of
    them run only to distil. Then exits and dropout are left at their defaults.
    """

    steps: int = setting(Whole(1, LARGEST, hint="1000 to 50,000 is usual"), default=1000,
                         help="steps of the whole run")
    batch_size: int = setting(Whole(1, hint="16 to 256 is usual"), default=32,
                              help="rows of a step, over all devices")
    context: int | None = setting(
        OrNone(Whole(2, hint="a row holds a token and its target at least"),
               f"as many as the model holds, at most {CONTEXT}"), default=None, help="tokens of a row")
    accumulate: int = setting(Whole(1, hint="1 works off the batch at once"), default=1,
                              help="parts in which a batch is worked off: less memory, the same result, but that layer "
                                   "dropout draws anew for each part")
    exits: ExitPlan = setting(Instance(ExitPlan, hint="give WeightedExits(...), FixedExits(...) or LastOnly()"),
                              default=LastOnly(), help="which exits learn at a step, and how much each counts")
    dropout: LayerDropout | None = setting(
        OrNone(Instance(LayerDropout, hint="give layerskip(0.1), for example, or None")), default=None,
        help="layer dropout, or None")
    optimizer: str = setting(OneOf(OPTIMIZERS), default="adamw",
                             help="muon is for the layers' matrices, with Adam for the rest")
    learning_rate: float = setting(Number(0, open_low=True, hint="1e-5 to 1e-3 is usual"), default=3e-4,
                                   help="peak of the learning rate")
    schedule: str = setting(OneOf(SCHEDULES), default="cosine", help="course of the learning rate after the warm-up")
    warmup: int = setting(Whole(0, LARGEST, hint="100 is usual"), default=100,
                          help="steps in which the learning rate rises")
    weight_decay: float = setting(Number(0, hint="0.1 is usual"), default=0.1,
                                  help="weight decay of matrices, while norms and biases do not decay")
    beta2: float = setting(Number(0, 1, open_high=True, hint="0.95 is usual"), default=0.95,
                           help="decay of the optimiser's second moments")
    clip: float = setting(Number(0, open_low=True, hint="1 is usual"), default=1.0,
                          help="bound of the gradient's global norm")
    z_loss: float | None = setting(OrNone(Number(0, hint="0 has no effect"), "off"), default=None,
                                   help="weight of the squared log of the softmax's denominator (PaLM: 1e-4)")
    distill: float | None = setting(OrNone(Number(0, hint="0 has no effect"), "off"), default=None,
                                    help="weight of each early exit's divergence from the last layer, which teaches it")
    temperature: float = setting(Number(0, open_low=True, hint="1 is usual"), default=1.0,
                                 help="temperature of that distillation")
    compute_dtype: str = setting(OneOf(DTYPES), default="float32",
                                 help="type of the arithmetic; parameters stay float32; bfloat16 on accelerators")
    remat: str = setting(REMAT_RULE, default="full", help="what the backward pass computes again")
    trainable: str = setting(OneOf(TRAINABLE), default=ALL, help="all parameters, or the exit heads alone")
    seed: int = setting(Whole(0, 2**32 - 1, hint="any will do"), default=0,
                        help="seed of the data's order, of layer dropout, and of weights that begin at random")

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise SettingError(f"Recipe.batch_size is {self.batch_size}, which accumulate {self.accumulate} does not "
                               "divide; all parts of a batch are of one size")
        if self.trainable == HEADS:
            for field, off in (("exits", LastOnly()), ("dropout", None)):
                if getattr(self, field) != off:
                    raise SettingError(f"Recipe.{field} is {getattr(self, field)!r}, but the recipe tunes exit heads "
                                       f"alone, which has no use for it; leave it at {off}")

    def text(self) -> str:
        """A line for each setting that is not at its default, and for those that every run is told by."""
        always = ("steps", "batch_size", "context", "learning_rate", "optimizer", "schedule", "warmup")
        lines = {field.name.replace("_", " "): _short(getattr(self, field.name)) for field in dataclasses.fields(self)
                 if field.name in always or getattr(self, field.name) != field.default}
        return "\n".join(f"  {name:<{max(map(len, lines))}}  {value}" for name, value in lines.items())


def _short(value: Any) -> str:
    """A setting as one reads it: of plain settings within it those that are not at their defaults."""
    if not dataclasses.is_dataclass(value):
        return "as the model's" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    inner = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)
             if dataclasses.is_dataclass(of := getattr(value, field.name)) or of != field.default]
    return type(value).__name__ + (f"({', '.join(f'{name} {_short(of)}' for name, of in inner)})" if inner else "")


def named(name: str, **changes) -> Recipe:
    """The recipe of this name in `RECIPES`, with other values in some fields.

    What a recipe lets move over the run (curricula, dropout, the learning rate) follows `steps`.
    Raises SettingError for an unknown name or field, and for a value out of range.
    """
    if name not in RECIPES:
        raise SettingError(f"recipe is {name!r}, which is unknown; choose one of {', '.join(RECIPES)}")
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := changes.keys() - known:
        raise SettingError(f"a recipe has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    default, fields = RECIPES[name]
    steps = changes.get("steps", default)
    return Recipe(**{**fields(max(int(steps), 2)), "steps": steps, **changes})


def _layerskip(learning_rate: float, p: float, scale: float, *, every: int | None = None, scratch=False, **rest):
    """A row of LayerSkip's tables, by steps. every: R of the rotation, None for the gradual curriculum."""
    return lambda steps: dict(
        learning_rate=learning_rate, dropout=layerskip(p, steps=steps if scratch else None),
        exits=WeightedExits(LayerSkipWeights(scale), Gradual(steps) if every is None else Rotational(every)), **rest)


_DEMO = dict(batch_size=8, context=256, optimizer="muon", learning_rate=3e-3, schedule="warmup-stable-decay",
             beta2=0.98, remat="none")

# By name: the number of steps unless another is asked for, and the other fields by the number of steps.
RECIPES: Mapping[str, tuple[int, Callable[[int], Mapping[str, Any]]]] = {
    # Of general use. Their rates and lengths are this library's, their exits and dropout LayerSkip's of its kind.
    "pretrain": (10_000, _layerskip(8e-4, 0.1, 0.2, every=8, scratch=True, schedule="warmup-stable-decay")),
    "continue": (10_000, _layerskip(3e-5, 0.1, 0.2, every=8)),
    "finetune": (1000, _layerskip(1e-4, 0.1, 1.0, every=16, schedule="linear", weight_decay=0.0)),
    "plain": (1000, lambda steps: {}),
    # For small models of the demo's problems: packed rows of one length, so that one program compiles.
    "demo": (5000, lambda steps: dict(_DEMO, exits=WeightedExits(UniformWeights(), Rotational(5)),
                                      dropout=layerskip(0.1, steps=steps))),
    # The same without early exits and layer dropout, to compare with.
    "demo-plain": (5000, lambda steps: _DEMO),
    # EE-Tuning (arXiv 2402.00518); the rate, the number of steps and the last layer as a teacher are this library's.
    "tune-exits": (1000, lambda steps: dict(trainable=HEADS, learning_rate=1e-3, schedule="linear", weight_decay=0.0,
                                            distill=1.0)),
    # LayerSkip (arXiv 2404.16710), tables of hyper-parameters; rates that it does not give are those of its kind above.
    "layerskip-llama2-7b": (50_000, _layerskip(3e-5, 0.1, 0.2, every=8, context=4096)),
    "layerskip-llama2-13b": (50_000, _layerskip(3e-5, 0.1, 0.1, every=39, context=4096)),
    "layerskip-llama3-8b": (50_000, _layerskip(3e-5, 0.1, 0.1, every=8, context=4096)),
    "layerskip-llama3.2-1b": (50_000, _layerskip(3e-5, 0.1, 0.1, every=8, context=4096)),
    "layerskip-scratch-1.5b": (50_000, _layerskip(8e-4, 0.1, 0.2, every=23, scratch=True, context=4096)),
    "layerskip-scratch-7b": (50_000, _layerskip(8e-4, 0.2, 0.2, every=31, scratch=True, context=4096)),
    "layerskip-code": (10_000, _layerskip(1e-4, 0.1, 1.0, every=16, context=4096)),
    "layerskip-topv2": (5800, _layerskip(1e-4, 0.2, 1.0, context=1024)),
    # The later recipe of layer dropout (arXiv 2609.05275): rescaled, linear in depth, falling to 0 over the run.
    "dont-drop-dropout": (10_000, lambda steps: dict(
        learning_rate=3e-4, exits=WeightedExits(UniformWeights(), Rotational(8)),
        dropout=dont_drop_dropout(0.1, steps=steps))),
}
