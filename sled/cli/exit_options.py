"""Options of early exit and self-speculation."""

from __future__ import annotations

import dataclasses
from typing import Any

import sled
from sled.cli.derived import build, choice, derive, offer, refuse_others, settings_by_choice
from sled.errors import SettingError

POLICIES = {
    "early": offer(sled.EarlyExit, "threshold", "measure", "kv", "decay", exit_layers="layers"),
    "speculate": offer(sled.SelfSpeculation, "draft", "adaptive", exit_layers="layer", draft_confidence="confidence"),
}
SCHEDULES = {"immediate": offer(sled.Immediate), "lockstep": offer(sled.Lockstep),
             "gather": offer(sled.Gather, "patience", gather_rows="rows")}
SCHEDULE = (choice("schedule", SCHEDULES, default=None, help=(
    "When deeper layers run for prompts decoded together. It changes the time, never the text.\n"
    "Left out: lockstep for speculate, else immediate.\n"
    "immediate: as soon as one row waits; lockstep: at the pace of the slowest; gather: when enough rows wait.")),
            *settings_by_choice(SCHEDULES))


@dataclasses.dataclass(frozen=True)
class ExitOptions(derive(
        "Exits", choice("exits", POLICIES, default="none", help=(
            "early: a token leaves at the first exit that is sure of it, unchecked. Less work; the text may change.\n"
            "speculate: the first layers draft, the whole model verifies the drafts. The text stays the same.")),
        *settings_by_choice(POLICIES), *SCHEDULE)):
    """Early exit and self-speculation. A setting left out keeps the policy's own default.

    A quarter of the layers is a good first exit on a model trained for early exits.
    """

    def settings(self) -> dict[str, Any]:
        """`exits` and `schedule` of `LM.generate`, as far as chosen. Raises SettingError for what has no meaning."""
        if self.exits == "none":
            refuse_others(self, "exits", ())
            return {}
        policy, schedule = POLICIES[self.exits], SCHEDULES.get(self.schedule)
        of_schedule = {name for name, *_ in SCHEDULE}
        refuse_others(self, "exits", {*policy.options, *of_schedule})
        refuse_others(self, "schedule", {"exits", *policy.options, *(schedule.options if schedule else ())})
        if self.exit_layers is None:
            raise SettingError(f"--exits {self.exits} was given without --exit-layers, so no token can leave; "
                               "say after which layers it may, such as --exit-layers 4")
        return dict(exits=build(self, policy), schedule=schedule and build(self, schedule))
