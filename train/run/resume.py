"""The check that a resumed run has the settings it had: those that decide what it computes may not change.

Some may change within rules, such as the number of steps. A rule is a function of the value then, the value now and
the step that the run has reached; it returns why they may not differ, or None.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sled.errors import CheckpointError
from sled.settings.describe import differences, in_words

BLOCK = 4096  # steps whose rates are computed at once; always as many, so that nothing compiles twice
Rule = Callable[[Any, Any, int], str | None]


def anything(then, now, step: int) -> None:
    """The rule for what does not decide what a run computes: folders, logging, how often to save."""
    return None


def same_rates(schedule: Callable[[int], Callable]) -> Rule:
    """The rule for a run's number of steps: it may change while the steps already taken would have been the same.

    schedule: from the number of steps of the whole run to the learning rate as a function of the step (optax's
    `Schedule`). So a run with a constant middle part may be made longer or shorter until its decay begins.
    """

    def rule(then, now, step: int) -> str | None:
        if not (isinstance(then, int) and isinstance(now, int)):
            return "no number of steps"
        if now < step:
            return f"step {step} is behind it already"
        for start in range(0, step, BLOCK):
            past = jnp.arange(start, start + BLOCK)
            rates = [np.broadcast_to(schedule(total)(past), BLOCK) for total in (then, now)]
            changed = np.flatnonzero(rates[0] != rates[1])
            if len(changed) and start + changed[0] < step:
                return (f"the learning rate of step {start + changed[0]}, which is behind it already, would have been "
                        "another")
        return None

    return rule


def check_resumable(run: str, then: Mapping[str, Any], now: Mapping[str, Any], step: int,
                   may_change: Mapping[str, Rule], follow: Mapping[str, Sequence[str]] | None = None) -> None:
    """Raises CheckpointError that names each setting of `run` that differs and may not, with both values.

    may_change: rules by name; a name such as `data` or `data.folder` also holds for all settings below it.
    follow: by the name of a setting those that differ when it does, and are then left unsaid.
    """
    wrong = {}
    for name, before, after in differences(then, now):
        rule = next((may_change[prefix] for prefix in _prefixes(name) if prefix in may_change), None)
        reason = rule(before, after, step) if rule else ""
        if reason is not None:
            wrong[name] = in_words(name, before, after) + (f" ({reason})" if reason else "")
    causes = {prefix for name in wrong for prefix in _prefixes(name)}
    unsaid = {name for cause, names in (follow or {}).items() if cause in causes for name in names}
    if wrong:
        said = [text for name, text in wrong.items() if not unsaid & set(_prefixes(name))]
        raise CheckpointError(f"{run} holds a run of other settings: {'; '.join(said)}. Give the settings it was made "
                              "with, or another folder for a new run")


def _prefixes(name: str) -> list[str]:
    """a.b.c, a.b and a."""
    return [*itertools.accumulate(name.split("."), "{}.{}".format)][::-1]
