"""What a calibration holds for, in a form to write down and compare: settings by value, arrays by digest."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from sled.arguments import A_SAMPLING, A_SCHEDULE, A_STRATEGY, stop_strings
from sled.checks import Instance, Whole, check_rows, is_array
from sled.errors import CalibrationError
from sled.exits import EarlyExit

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
        "schedule": describe(A_SCHEDULE("schedule", schedule)),
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
        _add(total, np.asarray(named[name][...]))
    return total.hexdigest()


def describe(value, *, leave_out: Sequence[str] = ()) -> Any:
    """A setting as JSON has it: a dataclass by its class and fields, an array by its type, shape and SHA-256.

    leave_out: fields of `value` itself to leave out.
    Raises CalibrationError for what is neither of these nor a number, a string, None, or a sequence of such.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_array(value):
        if not value.ndim:
            return describe(value.item())
        total = hashlib.sha256()
        _add(total, np.asarray(value))
        return {"array": str(value.dtype), "shape": list(value.shape), "sha256": total.hexdigest()}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))  # JSON knows no infinity
    if isinstance(value, (tuple, list)):
        return [describe(x) for x in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)
                  if f.name not in leave_out}
        return {"kind": _kind(type(value)), **fields}
    raise CalibrationError(f"{value!r} cannot be written into a calibration, which is bound to every setting by value; "
                           "make a strategy of your own a frozen dataclass of numbers, strings, tuples and arrays")


def differences(name: str, then: Any, now: Any) -> Iterator[str]:
    """Where two descriptions differ, in words: one line for each field, or for the whole where the kinds differ."""
    if then == now:
        return
    if isinstance(then, dict) and isinstance(now, dict) and then.get("kind") == now.get("kind") and "array" not in now:
        for field in dict.fromkeys([*then, *now]):
            yield from differences(f"{name}.{field}", then.get(field), now.get(field))
        return
    yield f"{name} was {_short(then)} and is {_short(now)}"


def _add(total, array: np.ndarray) -> None:
    total.update(f"{array.dtype} {array.shape}\n".encode())
    total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _kind(cls: type) -> str:
    """A class by its package and name, which stay when it moves to another module of the package."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _short(described: Any) -> str:
    if isinstance(described, dict):
        kind = described.get("kind", "an array")
        return f"{kind} with SHA-256 {described['sha256'][:12]}..." if "sha256" in described else kind
    text = repr(described)
    return text if len(text) <= 40 else f"{text[:16]}..."
