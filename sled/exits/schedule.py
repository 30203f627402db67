"""When the deeper layers run: at once, when nobody can go on without them, or when it pays.

A schedule decides about time alone. What a row says does not depend on it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sled.checks import Whole, settle
from sled.pytree import traced


class Queue(NamedTuple):
    """The rows in front of a deeper segment, after the first one has run. All [B].

    waiting: cannot go on without it. waited: for how many ticks it has been so. full: waiting because
    no further token of the row may be deferred. ready: can go on without it. A row with nothing to do
    is neither.
    """

    waiting_B: jax.Array
    waited_B: jax.Array
    full_B: jax.Array
    ready_B: jax.Array


class Schedule(Protocol):
    def due(self, queue: Queue, verifies: bool) -> jax.Array:
        """Whether the segment runs now (a scalar). Only asked when somebody waits."""
        ...


@traced()
@dataclasses.dataclass(frozen=True)
class Immediate:
    """Deeper layers run as soon as one row waits for them."""

    def due(self, queue: Queue, verifies: bool) -> jax.Array:
        return jnp.asarray(True)


@traced()
@dataclasses.dataclass(frozen=True)
class Lockstep:
    """All rows go at the pace of the slowest: the baseline of batched early exit.

    With early exit every row makes one token a round, so deeper layers run in each round in which any
    row needs them. With self-speculation all rows end their drafts before any is verified.
    """

    def due(self, queue: Queue, verifies: bool) -> jax.Array:
        return ~queue.ready_B.any() if verifies else jnp.asarray(True)


@traced("rows", "patience")
@dataclasses.dataclass(frozen=True)
class Gather:
    """Rows that need deeper layers wait until `rows` of them do; the others go on meanwhile.

    The deeper layers also run when one row has waited `patience` rounds, when a row has no room to
    defer another token, and when no row can go on without them. Both numbers are traced.
    """

    rows: int = 4
    patience: int = 16

    def __post_init__(self):
        settle(self, rows=Whole(1, hint="it counts the rows that wait for each other"),
               patience=Whole(0, hint="it counts the rounds a row waits at most"))

    def due(self, queue: Queue, verifies: bool) -> jax.Array:
        waiting = queue.waiting_B.sum()
        longest = jnp.where(queue.waiting_B, queue.waited_B, 0).max()
        return ((waiting >= self.rows) | (longest >= self.patience) | queue.full_B.any() | ~queue.ready_B.any())
