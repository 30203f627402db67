"""Plain decoding, as an exit policy: every token goes through all layers."""

from __future__ import annotations

from sled.exits.schedule import Immediate
from sled.settings.decorator import settings


@settings
class FullDepth:
    """No token leaves early: the baseline that every other policy is compared with."""

    verifies = False
    propagates = False
    window = 1
    positions_per_token = 1
    schedule = Immediate()

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return (num_layers,)

    def prepare(self, network) -> None:
        """Nothing is taken from the network beforehand."""
