"""The fingerprint of a calibration: all that its guarantee depends on, settings by value, arrays by digest."""

from __future__ import annotations

from typing import Any

from sled.decoding.options import Decoding
from sled.lm import LM
from sled.models.decoder import ARITHMETIC
from sled.settings.describe import describe


def fingerprint(lm: LM, decoding: Decoding) -> dict[str, Any]:
    """All that decides a text, but the prompt and the exits' threshold, as JSON has it.

    Reads all weights once: for a large model, seconds. Raises SettingError for settings with an entry per row, and for
    exits that have no threshold.
    """
    decoding.check_rows(1, hint="a calibration is for prompts to come, so give one value for all")
    low, high = (describe(decoding.exits.with_threshold(threshold)) for threshold in (0.0, 1.0))
    exits = {name: value for name, value in low.items() if value == high[name]}
    return {"model": describe(lm.config), "exits": exits, **(decoding.describe() | {"exits": exits}),
            "weights": lm.weights_digest(), "arithmetic": ARITHMETIC}
