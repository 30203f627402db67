"""A way to decode, under a name: what evaluations and sweeps compare."""

from __future__ import annotations

import dataclasses

from sled.arguments import FINAL_LAYER, GREEDY
from sled.decoding.sampling import Sampling
from sled.exits import Policy, Schedule
from sled.fusion import Strategy


@dataclasses.dataclass(frozen=True)
class Method:
    """Settings of `sled.LM.generate`, and the name that stands for them in tables.

    exits: None, or `sled.exits.FullDepth()`: no token leaves early. schedule: None is the exits' own.
    """

    name: str
    fusion: Strategy = FINAL_LAYER
    exits: Policy | None = None
    schedule: Schedule | None = None
    sampling: Sampling = GREEDY
