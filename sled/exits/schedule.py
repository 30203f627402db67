"""When the deeper layers run: at once, when nobody can go on without them, or when it pays.

A schedule decides about time alone. A row's tokens do not depend on it (in types narrower than float32: but for near
ties, which are rounded otherwise in other blocks).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from sled.settings.decorator import setting, settings
from sled.settings.rules import Whole

NEVER = 2**30


class Timing(NamedTuple):
    """The two numbers that every schedule comes down to; traced, so that changing the schedule compiles nothing.

    Deeper layers run when `rows` rows wait for them, or when one has waited for `patience` steps.
    """

    rows: int
    patience: int

    def due(self, blocked_B, waited_B, full_B, moving_B) -> jax.Array:
        """A scalar: true where a segment runs now. All arguments are [B].

        blocked: rows that cannot go on without it; waited: for how many steps they have waited for any segment; full:
        rows whose next token could not be deferred; moving: rows that go on without it. A segment runs for blocked
        rows when there are `rows` of them, one has waited `patience` steps, one is full, or none is moving.
        """
        longest = jnp.where(blocked_B, waited_B, -1).max()
        urgent = (blocked_B.sum() >= self.rows) | (longest >= self.patience) | full_B.any() | ~moving_B.any()
        return blocked_B.any() & urgent


@runtime_checkable
class Schedule(Protocol):
    def timing(self, verifies: bool) -> Timing:
        """The numbers for the loop; `verifies` as in `Policy`."""
        ...


@settings
class Immediate:
    """Deeper layers run as soon as one row waits for them."""

    def timing(self, verifies: bool) -> Timing:
        return Timing(1, 0)


@settings
class Lockstep:
    """All rows go at the pace of the slowest: the baseline of batched early exit.

    With early exit every row makes one token a step, so deeper layers run in each step in which any row
    needs them, as in `Immediate`. With self-speculation all rows end their drafts before any is verified.
    """

    def timing(self, verifies: bool) -> Timing:
        return Timing(NEVER, NEVER) if verifies else Timing(1, 0)


@settings
class Gather:
    """Rows that need deeper layers wait until enough of them do; the others go on meanwhile.

    The deeper layers also run when one row has waited `patience` steps, when a row has no room to defer
    another token, and when no row can go on without them.
    """

    rows: int = setting(Whole(1, hint="the others go on meanwhile"), default=4, traced=True,
                        option="gather_rows", help="how many rows wait for each other")
    patience: int = setting(Whole(0, hint="0 never waits"), default=16, traced=True,
                            help="how many steps a row waits at most")

    def timing(self, verifies: bool) -> Timing:
        return Timing(self.rows, self.patience)
