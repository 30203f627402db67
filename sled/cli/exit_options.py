"""Options of early exit and self-speculation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import sled
from sled.cli.options import given, refuse_others
from sled.errors import SettingError

# What a choice builds, and what its options are called there.
POLICIES = {
    "early": ("EarlyExit", {"exit_layers": "layers", "threshold": "threshold", "measure": "measure", "kv": "kv",
                            "decay": "decay"}),
    "speculate": ("SelfSpeculation", {"exit_layers": "layer", "draft": "draft", "draft_confidence": "confidence",
                                      "adaptive": "adaptive"}),
}
SCHEDULES = {"immediate": ("Immediate", {}), "lockstep": ("Lockstep", {}),
             "gather": ("Gather", {"gather_rows": "rows", "patience": "patience"})}


@dataclasses.dataclass(frozen=True)
class ExitOptions:
    """Whether a token may leave before the last layer. A setting left out keeps the policy's own default."""

    exits: Literal["none", "early", "speculate"] = "none"
    """early: a token leaves at the first exit that is sure of it, unchecked. Less work; the text may change.
    speculate: the first layers guess, the whole model checks blocks of guesses. The text stays the same."""
    exit_layers: tuple[int, ...] | None = None
    """After which layers a token may leave, from 1 to the last but one.
    early takes one or several (1 2 4), speculate one, or several with --adaptive.
    A quarter of the layers is a good first try on a model trained for early exits."""
    threshold: tuple[float, ...] | None = None
    """early: how sure an exit must be, 0 to 1 (0.9); one number, or one per exit.
    Lower leaves earlier and errs more; 1 never leaves."""
    measure: Literal["max_probability", "margin", "entropy", "saturation"] | None = None
    """early: what sure means. max_probability (the usual): of the best token.
    margin: its lead over the second. entropy: there is little of it.
    saturation: the exit's own layer hardly turned the hidden state."""
    kv: Literal["exact", "propagate"] | None = None
    """early: the keys and values that a token lacks in the layers it skipped.
    exact (the usual): made up in a block when a token next goes that deep.
    propagate: made at once from the exit's hidden state; cheaper, approximate."""
    decay: Literal["none", "calm-paper", "calm-code"] | None = None
    """early: lower the threshold as the text grows, since early errors cost more: as CALM's paper or its code."""
    draft: int | None = None
    """speculate: tokens guessed before they are checked (6)."""
    draft_confidence: float | None = None
    """speculate: stop guessing at a guess less probable than this (0: never)."""
    adaptive: bool = False
    """speculate: each row picks its draft length (up to --draft) and its layer by what was accepted so far."""
    schedule: Literal["immediate", "lockstep", "gather"] | None = None
    """When deeper layers run for prompts decoded together. It changes the time, never the text.
    Left out: lockstep for speculate, else immediate.
    immediate: as soon as one row waits; lockstep: at the pace of the slowest; gather: when enough rows wait."""
    gather_rows: int | None = None
    """gather: how many rows wait for each other (4); the others go on meanwhile."""
    patience: int | None = None
    """gather: how many rounds a row waits at most (16)."""

    def settings(self) -> dict[str, Any]:
        """`exits` and `schedule` of `LM.generate`, as far as chosen. Raises SettingError for what has no meaning."""
        if self.exits == "none":
            refuse_others(self, "exits", ())
            return {}
        policy, of_policy = POLICIES[self.exits]
        schedule, of_schedule = SCHEDULES[self.schedule] if self.schedule else (None, {})
        refuse_others(self, "exits", {*of_policy, "schedule", "gather_rows", "patience"})
        refuse_others(self, "schedule", {"exits", *of_policy, *of_schedule})
        values = given(self)
        if "exit_layers" not in values:
            raise SettingError(f"--exits {self.exits} was given without --exit-layers, so no token can leave; "
                               "say after which layers it may, such as --exit-layers 4")
        if self.threshold is not None and len(self.threshold) == 1:
            values["threshold"] = self.threshold[0]
        take = lambda names: {names[name]: value for name, value in values.items() if name in names}  # noqa: E731
        return dict(exits=getattr(sled, policy)(**take(of_policy)),
                    schedule=schedule and getattr(sled, schedule)(**take(of_schedule)))
