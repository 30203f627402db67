"""`Decoding`: everything that says how tokens are decoded, as one value, checked once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from sled.decoding.sampling import Sampling
from sled.errors import SettingError
from sled.exits import POLICIES, SCHEDULES, FullDepth, Policy, Schedule
from sled.fusion import FUSIONS, FinalLayer, Strategy
from sled.io import shown
from sled.settings.describe import describe
from sled.settings.per_row import check_alike, check_rows, one_row, take_rows
from sled.settings.rules import Instance, Several, Whole
from sled.settings.unknown import naming_unknown

A_STRATEGY = Instance(Strategy, hint="give a strategy such as sled.SLED(); sled.FinalLayer() is plain decoding")
A_POLICY = Instance(Policy, hint="give sled.EarlyExit(...), sled.SelfSpeculation(...) or what Calibration.policy "
                                 "returns, or leave it out")
A_SCHEDULE = Instance(Schedule, traced=False, hint="give sled.Immediate(), sled.Lockstep() or sled.Gather(...)")
A_SAMPLING = Instance(Sampling, hint="give sled.Sampling(temperature=...), or lm.checkpoint_sampling for the model's "
                                     "own; sled.Sampling() is greedy")
FULL_DEPTH, FINAL_LAYER, GREEDY, NEW_TOKENS = FullDepth(), FinalLayer(), Sampling(), 128  # the defaults
STOP = Several(str, "strings that end a text", hint="leave it out for none")
USUAL_CONTEXT = 64  # a bound up to this is taken, however small a model's context is
WITHIN = dict(sampling=(Sampling,), exits=POLICIES.values(), fusion=FUSIONS.values(), schedule=SCHEDULES.values())
BY_ROW = dict(fusion=A_STRATEGY, exits=A_POLICY, sampling=A_SAMPLING)  # settings that may have an entry per row


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are decoded.

    Equal texts are promised in float32: in a narrower type, near ties may fall otherwise in another batch or schedule,
    or where drafts are verified (`sled bench exactness` measures it).

    fusion: how the layers decide together (`sled.SLED()`, `sled.DoLa()`, ...).
    exits: whether a token may leave before the last layer (`sled.EarlyExit(...)`), or be drafted there
        and verified (`sled.SelfSpeculation(...)`); by default it goes through all layers.
    schedule: when deeper layers run, for the batch; changes the time, not the text. None: the exits' own.
    sampling: greedy unless told otherwise.
    max_new_tokens: the most tokens a row gets, within the model's context.
    stop: a string, or several, that end a text.

    Raises SettingError for a value that cannot be.
    """

    fusion: Strategy = FINAL_LAYER
    exits: Policy = FULL_DEPTH
    schedule: Schedule | None = None
    sampling: Sampling = GREEDY
    max_new_tokens: int = NEW_TOKENS
    stop: str | Sequence[str] = ()

    def __post_init__(self):
        for name, rule in BY_ROW.items():
            rule(name, getattr(self, name))
        if self.schedule is not None:
            A_SCHEDULE("schedule", self.schedule)
        new = Whole(1, hint="it counts the tokens to generate")("max_new_tokens", self.max_new_tokens)
        object.__setattr__(self, "max_new_tokens", new)
        object.__setattr__(self, "stop", tuple(stop_strings(self.stop)))

    @property
    def chosen_schedule(self) -> Schedule:
        """The schedule asked for, or the exits' own."""
        return self.exits.schedule if self.schedule is None else self.schedule

    def replace(self, **changes) -> Decoding:
        """The same decoding with other settings, which are checked."""
        return dataclasses.replace(self, **changes)

    def by_row(self, change: Callable[[str, Any], Any]) -> Decoding:
        """With change(name, settings) in place of each of the settings that may have an entry per row."""
        return dataclasses.replace(self, **{name: change(name, getattr(self, name)) for name in BY_ROW})

    def check_rows(self, rows: int, *, hint: str) -> Decoding:
        """Itself. Raises SettingError for an array that fits neither all rows alike nor each of `rows` rows."""
        for name in BY_ROW:
            check_rows(getattr(self, name), rows, hint=hint)
        return self

    def check_context(self, max_positions: int) -> Decoding:
        """Itself. Raises SettingError where more tokens may wait, or be drafted, than a context has positions."""
        bound = "max_draft" if self.exits.verifies else "max_deferred"
        if (waiting := self.exits.window - 1) > max(max_positions, USUAL_CONTEXT):
            raise SettingError(f"{type(self.exits).__name__}.{bound} is {waiting}, but the model's context holds "
                               f"{max_positions} positions; memory grows with it, so give at most that")
        return self

    def take_rows(self, rows: Sequence[int]) -> Decoding:
        """For these rows in this order."""
        return self.by_row(lambda _, settings: take_rows(settings, rows))

    def one_row(self) -> Decoding:
        """For one row, in plain numbers that nobody can change afterwards. Raises SettingError for several rows."""
        self.check_rows(1, hint="a request is one row, so give one value")
        return self.by_row(lambda _, settings: one_row(settings))

    def check_alike(self, like: Decoding) -> None:
        """Raises SettingError where it cannot share a batch with `like`."""
        for name in BY_ROW:
            check_alike(name, getattr(self, name), getattr(like, name))

    def describe(self) -> dict[str, Any]:
        """All settings as JSON has them."""
        return {"fusion": describe(self.fusion), "exits": describe(self.exits),
                "schedule": describe(self.chosen_schedule), "sampling": describe(self.sampling),
                "max_new_tokens": self.max_new_tokens, "stop": list(self.stop)}


Decoding.__init__ = naming_unknown(Decoding.__init__, "Decoding", within=WITHIN)
decoding_arguments = functools.partial(naming_unknown, within=WITHIN)  # a decorator of what takes them


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """One stop string or several, as a list. Raises SettingError for what is no string, or an empty one."""
    strings = STOP("stop", stop)
    if "" in strings:
        raise SettingError(f"stop is {shown(stop)}, but each stop string must have at least one character; leave it "
                           "out for none")
    return strings
