"""A way to decode, under a name: what evaluations and sweeps compare."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

from sled.decoding.options import A_POLICY, A_SAMPLING, A_STRATEGY, FINAL_LAYER, FULL_DEPTH, GREEDY, which_schedule
from sled.decoding.sampling import Sampling
from sled.errors import SettingError
from sled.exits import Policy, Schedule
from sled.fusion import SLED, ClampOnly, FinalLayer, Strategy
from sled.lm import LM
from sled.settings.describe import describe
from sled.settings.per_row import check_rows
from sled.settings.rules import Instance

A_MODEL = Instance(LM, traced=False, hint="give what sled.load returns")


@dataclasses.dataclass(frozen=True)
class Method:
    """Settings of `sled.LM.generate`, and the name that stands for them in tables.

    exits: None, or `sled.exits.FullDepth()`: no token leaves early. schedule: None is the exits' own.
    sampling: greedy, or what tokens are drawn with.

    Raises SettingError for what `LM.generate` refuses, and for arrays with an entry per row.
    """

    name: str
    fusion: Strategy = FINAL_LAYER
    exits: Policy | None = None
    schedule: Schedule | None = None
    sampling: Sampling = GREEDY

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise SettingError(f"Method.name is {self.name!r}, but must be a name to show in tables")
        for rule, field, settings in ((A_STRATEGY, "fusion", self.fusion), (A_SAMPLING, "sampling", self.sampling),
                                      (A_POLICY, "exits", self.exits or FULL_DEPTH)):
            check_rows(rule(f"Method.{field}", settings), 1, hint="a method is the same for every prompt")
        which_schedule(self.schedule, self.exits or FULL_DEPTH)

    def decoding(self) -> dict[str, Any]:
        """`fusion`, `exits` and `schedule` as `LM.generate` takes them."""
        return dict(fusion=self.fusion, exits=self.exits or FULL_DEPTH, schedule=self.schedule)

    def settings(self) -> dict[str, Any]:
        """All that decides the result besides model and prompt, as JSON has it. The name does not."""
        exits = self.exits or FULL_DEPTH
        return {"fusion": describe(self.fusion), "exits": describe(exits),
                "schedule": describe(which_schedule(self.schedule, exits)), "sampling": describe(self.sampling)}

    @property
    def samples(self) -> bool:
        """Whether the method says how tokens are drawn, rather than leaving it to the task."""
        return describe(self.sampling) != describe(GREEDY)

    @property
    def leaves_early(self) -> bool:
        return describe(self.exits or FULL_DEPTH) != describe(FULL_DEPTH)

    @property
    def verifies(self) -> bool:
        """Whether tokens that leave early are guesses, so that all of a text went through all layers."""
        return (self.exits or FULL_DEPTH).verifies


def baselines(method: Method) -> tuple[Method, ...]:
    """What `method` must be compared with to be believed: the last layer alone and, where it is SLED, the clamp alone.

    Part of SLED's gain on multiple choice comes from leaving out all but the last layer's top tokens, which needs no
    early layer (`sled.ClampOnly`). Both draw tokens as the method does, and go through all layers. A baseline that
    would be the method itself is left out.
    """
    found = [Method("final layer" if method.samples else "greedy", sampling=method.sampling)]
    if isinstance(method.fusion, SLED):
        same = {name: getattr(method.fusion, name) for name in ("scale", "lower_bound", "log_softmax", "max_scale")}
        found.append(Method("clamp only", fusion=ClampOnly(**same), sampling=method.sampling))
    return tuple(base for base in found if base.settings() != method.settings())


def deciding_versions() -> dict[str, str]:
    """Versions of the packages that may change an answer."""
    return {name: importlib.metadata.version(name) for name in ("sled-jax", "jax", "jaxlib", "flax", "tokenizers")}


def plain(method: Method) -> bool:
    """Whether the last layer alone decides and every token goes through all layers."""
    return isinstance(method.fusion, FinalLayer) and not method.leaves_early
