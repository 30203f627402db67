"""What a calibration holds for, in a form to write down and compare: settings by value, arrays by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from sled.decoding.options import A_SAMPLING, A_STRATEGY, stop_strings, which_schedule
from sled.exits import EarlyExit
from sled.io import add_array
from sled.settings.describe import describe
from sled.settings.rules import Instance, Whole, check_rows

if TYPE_CHECKING:
    from sled.lm import LM

AN_EARLY_EXIT = Instance(EarlyExit, hint="only sled.EarlyExit(...) trusts tokens that the last layer has not seen, and "
                                         "has a threshold to calibrate")
ONE_FOR_ALL = "a calibration is for prompts to come, so give one value for all"


def bind(lm: LM, *, exits: EarlyExit, fusion, schedule, sampling, max_new_tokens: int,
         stop: str | Sequence[str]) -> dict[str, Any]:
    """All that decides a text, but the prompt and the exits' threshold, as JSON has it.

    Reads all weights once: for a large model, seconds. Raises SettingError for settings that `LM.generate` would
    refuse, and for those with an entry per row.
    """
    for rule, name, settings in ((AN_EARLY_EXIT, "exits", exits), (A_STRATEGY, "fusion", fusion),
                                 (A_SAMPLING, "sampling", sampling)):
        check_rows(rule(name, settings), 1, hint=ONE_FOR_ALL)
    return {
        "model": describe(lm.config),
        "exits": describe(exits, leave_out=("threshold",)),
        "fusion": describe(fusion),
        "schedule": describe(which_schedule(schedule, exits)),
        "sampling": describe(sampling),
        "max_new_tokens": Whole(1, hint="it counts the tokens to generate")("max_new_tokens", max_new_tokens),
        "stop": stop_strings(stop),
        "weights": digest_of_weights(lm.params),
    }


def digest_of_weights(params) -> str:
    """SHA-256, in hexadecimal, over the name, type, shape and bytes of every parameter, in the names' order."""
    total = hashlib.sha256()
    named = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    for name in sorted(named):
        total.update(f"{name} ".encode())
        add_array(total, np.asarray(named[name][...]))
    return total.hexdigest()
