"""A batch of prompts being continued: drives the jitted loop from the host, chunk by chunk."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from sled.decoding import loop, state
from sled.decoding.buckets import bucket
from sled.decoding.network import Build
from sled.decoding.sampling import Sampling
from sled.exits.schedule import Timing

HEADROOM = 256  # new positions allocated at first: attention costs by the slot, growing costs a compilation
NO_LIMIT = np.int32(2**31 - 1)


class Batch:
    """Rows in flight, as the host sees them. A subclass fills `_state`, and calls `_fetch` when it changed.

    policy, schedule: of `sled.exits`; stop_ids: token ids that end a row.
    """

    _state: state.DecodeState

    def __init__(self, build: Build, params: Any, *, policy, schedule, fusion, sampling: Sampling,
                 stop_ids: tuple[int, ...]):
        timing = Timing(*map(np.int32, schedule.timing(policy.verifies)))
        self._settings = dict(policy=policy, fusion=fusion, sampling=sampling)
        self._fixed = dict(build=build, params=params, timing=timing, stop_ids=np.array(stop_ids or (-1,), np.int32))
        self.plan = state.Plan.of(policy, fusion, build(params))
        self._verifies = policy.verifies

    def stop(self, rows: list[int]) -> None:
        """End these rows where they are; the others do not notice."""
        self.active[rows] = False
        self._state = state.set_active(self._state, self.active)

    def new_tokens(self, row: int) -> list[int]:
        """Tokens made so far for a row, an ending token included."""
        return self._tokens[row, self.prompt_lengths[row]:self.lengths[row]].tolist()

    def exit_layers(self, row: int) -> list[int]:
        """The layer that said each of `new_tokens`."""
        exits = self._exits[row, self.prompt_lengths[row]:self.lengths[row]]
        return [self.plan.exits[e] for e in exits.tolist()]

    @property
    def tally(self) -> state.Tally:
        return self._state.tally

    def arguments(self, until_B, *, ticks=NO_LIMIT, rows: int = 1) -> dict[str, Any]:
        """What `loop.decode` takes, by name."""
        return dict(self._fixed, **self._settings, state=self._state, until_B=until_B.astype(np.int32),
                    ticks=np.int32(ticks), rows=np.int32(rows))

    def _decode(self, until_B, **named) -> None:
        self._state = loop.decode(**self.arguments(until_B, **named))
        self._fetch()

    def _fetch(self) -> None:
        self._tokens, self._exits = np.asarray(self._state.tokens_BS), np.asarray(self._state.exit_BS)
        self.lengths = np.asarray(self._state.deep_B) + 1 if self._verifies else np.asarray(self._state.length_B)
        self.prompt_lengths = np.asarray(self._state.prompt_B)
        self.active = np.array(self._state.active_B)  # a copy: `stop` writes to it


class Generation(Batch):
    """One batch of prompts, from beginning to end.

    prompts: token ids [T_b] of each row; limits: new tokens each row may get, 0 for a row that only
    fills the batch; seeds: one per row; settings: as for `Batch`.

    After `__init__` the prompts are in the caches; every `advance` makes tokens for all active rows.
    """

    def __init__(self, build: Build, params: Any, prompts: list[np.ndarray], *, limits: list[int],
                 seeds: list[int], **settings):
        super().__init__(build, params, **settings)
        lengths = np.array([len(p) for p in prompts])
        self._ends = lengths + limits
        begun = time.perf_counter()
        capacity = bucket(min(int(self._ends.max()), int(lengths.max()) + HEADROOM))
        self._state = state.start(build, params, prompts, list(self._ends), seeds, capacity=capacity, plan=self.plan)
        self._fetch()
        self.prefill_seconds = time.perf_counter() - begun
        self.decode_seconds = 0.0

    def advance(self, steps: int | None = None) -> None:
        """Up to `steps` more tokens per active row, or all that are left."""
        begun = time.perf_counter()
        most = int(self._ends.max())  # `steps` may be more than an int32 holds
        goal_B = self._ends if steps is None else np.minimum(self._ends, self.lengths + min(steps, most))
        while (self.active & (self.lengths < goal_B)).any():
            if (self.active & (self.lengths == self._state.capacity)).any():
                self._state = state.grow(self._state, capacity=bucket(self._state.capacity + 1))
            self._decode(np.minimum(goal_B, self._state.capacity))
        self.decode_seconds += time.perf_counter() - begun
