"""Continuous batching: rows that requests come into and leave, while the others go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sled.decoding import state
from sled.decoding.generation import Batch
from sled.decoding.network import Build
from sled.settings.per_row import stack_rows


class Entry(NamedTuple):
    """What comes into a slot.

    prompt: token ids [T]; limit: new tokens it may get, such that all fit into the capacity; settings: of this row,
    by the names "policy", "fusion" and "sampling", alike with the slots' own (see `sled.settings.per_row.check_alike`)
    and made of plain numbers (`one_row`).
    """

    prompt: np.ndarray
    limit: int
    seed: int
    settings: Mapping[str, Any]


class Slots(Batch):
    """A fixed number of rows of fixed capacity (positions, prompt included); all programs are compiled for these.

    settings: as for `Batch`, for one row. What they say by row is replaced by every entry's own.
    """

    def __init__(self, build: Build, params: Any, *, slots: int, capacity: int, **settings):
        super().__init__(build, params, **settings)
        self._like = dict(self._settings)
        self._of_slot = [self._like] * slots  # an empty slot has the default, so that nobody pays for a past entry
        self._sizes = {"E": len(self.plan.exits) - 1}
        self._place = dict(capacity=capacity, plan=self.plan)
        self.clear()

    @property
    def capacity(self) -> int:
        return self._place["capacity"]

    def clear(self) -> None:
        """Empty slots, whatever was in them."""
        nothing, slots = np.zeros(1, np.int32), len(self._of_slot)
        self._state = state.start(self._fixed["build"], self._fixed["params"], [nothing] * slots, [0] * slots,
                                  [0] * slots, **self._place)
        self._of_slot = [self._like] * slots
        self._fetch()

    def stop(self, rows: list[int]) -> None:
        super().stop(rows)
        for row in rows:
            self._of_slot[row] = self._like

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises SettingError where numbers of one row's settings have another shape than the other rows' have."""
        for name, like in self._like.items():
            stack_rows([settings[name]], like, self._sizes)

    def enter(self, entries: Mapping[int, Entry]) -> dict[int, Exception]:
        """Puts entries into slots, in which nothing of their past is left. Returns what went wrong, by slot."""
        failed = {}
        for slot, entry in entries.items():
            try:
                row = state.start(self._fixed["build"], self._fixed["params"], [entry.prompt],
                                  [len(entry.prompt) + entry.limit], [entry.seed], **self._place)
            except Exception as reason:  # of this entry alone: the state of the others is not touched yet
                failed[slot] = reason
                continue
            self._state = state.put_row(self._state, row, np.int32(slot))
            self._of_slot[slot] = dict(entry.settings)
        if len(entries) > len(failed):
            self._fetch()
        return failed

    def advance(self, ticks: int, *, rows: int = 1) -> None:
        """All rows go on, for `ticks` ticks of the loop or until fewer than `rows` of them are left."""
        self._settings = {name: stack_rows([of_row[name] for of_row in self._of_slot], like, self._sizes)
                          for name, like in self._like.items()}
        self._decode(np.full(len(self._of_slot), self.capacity), ticks=ticks, rows=rows)
