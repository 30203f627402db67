"""A batch of prompts being continued: drives the jitted loop from the host, chunk by chunk."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from sled.decoding import loop
from sled.decoding.buckets import bucket
from sled.decoding.network import Build
from sled.decoding.sampling import Sampling

HEADROOM = 256  # new positions allocated at first: attention costs by the slot, growing costs a compilation


class Generation:
    """One batch in flight.

    prompts: token ids [T_b] of each row; limits: new tokens each row may get, 0 for a row that only
    fills the batch; seeds: one per row; stop_ids: token ids that end a row.

    After `__init__` the prompts are in the caches; every `advance` makes tokens for all active rows.
    """

    def __init__(self, build: Build, params: Any, prompts: list[np.ndarray], *, limits: list[int],
                 seeds: list[int], fusion, sampling: Sampling, stop_ids: tuple[int, ...]):
        self._fixed = dict(build=build, params=params, fusion=fusion, sampling=sampling,
                           stop_ids=np.array(stop_ids or (-1,), np.int32))
        self.prompt_lengths = np.array([len(p) for p in prompts])
        ends = self.prompt_lengths + limits
        self._furthest = int(ends.max())
        begun = time.perf_counter()
        capacity = bucket(min(self._furthest, int(self.prompt_lengths.max()) + HEADROOM))
        self._state = loop.start(build, params, prompts, list(ends), seeds, capacity=capacity)
        self._fetch()
        self.prefill_seconds = time.perf_counter() - begun
        self.decode_seconds = 0.0

    def advance(self, steps: int | None = None) -> None:
        """Up to `steps` more tokens per active row, or all that are left."""
        begun = time.perf_counter()
        left = self._furthest if steps is None else steps
        while left > 0 and self.active.any():
            room = self._state.capacity - int(self.lengths[self.active].max())
            if room == 0:
                self._state = loop.grow(self._state, capacity=bucket(self._state.capacity + 1))
                continue
            taking = min(left, room)
            self._state = loop.decode(state=self._state, steps=np.int32(taking), **self._fixed)
            self._fetch()
            left -= taking
        self.decode_seconds += time.perf_counter() - begun

    def stop(self, rows: list[int]) -> None:
        """End these rows where they are; the others do not notice."""
        self.active[rows] = False
        self._state = loop.set_active(self._state, self.active)

    def new_tokens(self, row: int) -> list[int]:
        """Tokens made so far for a row, an ending token included."""
        return self._tokens[row, self.prompt_lengths[row]:self.lengths[row]].tolist()

    def _fetch(self) -> None:
        self._tokens = np.asarray(self._state.tokens_BS)
        self.lengths = np.asarray(self._state.length_B)
        self.active = np.array(self._state.active_B)  # a copy: `stop` writes to it
