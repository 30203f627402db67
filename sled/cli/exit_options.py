"""Options of early exit and self-speculation."""

from __future__ import annotations

import dataclasses
from typing import Any

from sled.cli.derived import build, choice, derive, explained, offers, refuse_others, settings_by_choice, written
from sled.errors import SettingError
from sled.exits import POLICIES, SCHEDULES, Policy

OFFERS, SCHEDULE_OFFERS = offers(POLICIES), offers(SCHEDULES)


def schedule_options(usual: str) -> tuple[tuple[str, Any, Any], ...]:
    """The choice of a schedule, and its settings. usual: which one it is where it is left out, in words."""
    return (choice("schedule", SCHEDULES, default=None, help=(
        "When deeper layers run for prompts decoded together. It changes the time, not the text "
        "(in bfloat16: but for near ties).\n"
        f"{explained(SCHEDULES)}"), hint=f"(default: {usual})"), *settings_by_choice(SCHEDULE_OFFERS))


SCHEDULE = schedule_options("lockstep for speculate, else immediate")


@dataclasses.dataclass(frozen=True)
class ExitOptions(derive(
        "Exits", choice("exits", POLICIES, default="none", help=explained(POLICIES)),
        *settings_by_choice(OFFERS), *SCHEDULE)):
    """Early exit and self-speculation. A setting left out keeps the policy's own default.

    sled layers tells after which layers it pays, and how to set it. The bundled model and
    facebook/layerskip-llama3.2-1B were trained for early exits; on a model that was not, nearly all drafts are wrong,
    and early tokens too.
    """

    def settings(self) -> dict[str, Any]:
        """`exits` and `schedule` of `LM.generate`, as far as chosen. Raises SettingError for what has no meaning."""
        if self.exits == "none":
            refuse_others(self, "exits", ())
            return {}
        policy, schedule = OFFERS[self.exits], SCHEDULE_OFFERS.get(self.schedule)
        of_schedule = {name for name, *_ in SCHEDULE}
        refuse_others(self, "exits", {*policy.options, *of_schedule})
        refuse_others(self, "schedule", {"exits", *policy.options, *(schedule.options if schedule else ())})
        if self.exit_layers is None:
            raise SettingError(f"--exits {self.exits} was given without --exit-layers, so no token can leave; say "
                               "after which layers it may, such as --exit-layers 4 (sled layers tells where it pays)")
        return dict(exits=build(self, policy), schedule=schedule and build(self, schedule))


def exits_written(policy: Policy) -> str:
    """A policy as options of `sled generate`."""
    [word] = [word for word, kind in POLICIES.items() if type(policy) is kind]
    return " ".join(["--exits", word, *written(policy, OFFERS[word])])
