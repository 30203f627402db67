"""Arguments that several functions of the face share: their defaults, and what they may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sled.decoding.sampling import Sampling
from sled.errors import SettingError
from sled.exits import FullDepth, Policy, Schedule
from sled.fusion import FinalLayer, Strategy
from sled.settings.rules import Instance

NEW_TOKENS = 128
GREEDY = Sampling()
FINAL_LAYER = FinalLayer()
FULL_DEPTH = FullDepth()
A_STRATEGY = Instance(Strategy, hint="give a strategy such as sled.SLED(); sled.FinalLayer() is plain decoding")
A_POLICY = Instance(Policy, hint="give sled.EarlyExit(...), sled.SelfSpeculation(...) or what Calibration.policy "
                                 "returns, or leave it out")
A_SCHEDULE = Instance(Schedule, traced=False, hint="give sled.Immediate(), sled.Lockstep() or sled.Gather(...)")
A_SAMPLING = Instance(Sampling, hint="give sled.Sampling(temperature=...), or leave it out to be greedy")


def which_schedule(schedule: Schedule | None, exits: Policy) -> Schedule:
    """The schedule asked for, or the policy's own. Raises SettingError for what is none."""
    return exits.schedule if schedule is None else A_SCHEDULE("schedule", schedule)


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """One stop string or several, as a list. Raises SettingError for what is no string, or an empty one."""
    strings = [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else list(stop)
    if any(not isinstance(s, str) or not s for s in strings):
        raise SettingError(f"stop is {stop!r}, but each stop string must be a string of at least one character; "
                           "leave it out for none")
    return strings
