"""Plain decoding, as an exit policy: every token goes through all layers."""

from __future__ import annotations

from sled.exits.policy import Decision, ExitView, Policy
from sled.settings.decorator import settings


@settings
class FullDepth(Policy):
    """No token leaves early: the baseline that every other policy is compared with."""

    window = 1

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return (num_layers,)

    def at_exit(self, view: ExitView) -> Decision:
        raise AssertionError("there is no early exit")
