"""The fingerprint of a calibration: all that its guarantee depends on, settings by value, arrays by digest."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from flax import nnx

from sled.decoding.options import Decoding
from sled.io import add_array
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
            "weights": digest_of_weights(lm.params), "arithmetic": ARITHMETIC}


def digest_of_weights(params) -> str:
    """SHA-256, in hexadecimal, over the name, type, shape and bytes of every parameter, in the names' order."""
    total = hashlib.sha256()
    named = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    for name in sorted(named):
        total.update(f"{name} ".encode())
        add_array(total, np.asarray(named[name][...]))
    return total.hexdigest()
