"""Rows in flight, as the host sees them: drives the jitted loop, and reads what it emitted.

    Generation    one batch of prompts from beginning to end, chunk by chunk
    Slots         continuous batching: requests come into rows and leave them, while the others go on
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sled.decoding import loop, state
from sled.decoding.groups import fetched
from sled.decoding.memory import naming_shortage, refuse_too_large
from sled.decoding.network import Build
from sled.decoding.options import Decoding
from sled.decoding.programs import begin_service, forget_programs, serving
from sled.decoding.state import bucket
from sled.exits.schedule import Timing
from sled.settings.per_row import stack_rows
from sled.timing import Stopwatch

HEADROOM = 256  # new positions allocated at first: attention costs by the slot, growing costs a compilation
NO_LIMIT = np.int32(2**31 - 1)


class Emitted(NamedTuple):
    """What a row has emitted: its new tokens, an ending one included, and how each came about.

    exit_layers: the layer whose choice each token is; of an accepted draft, the layer that drafted it.
    accepted: whether it is an accepted draft.
    drafts: how many drafts were verified as the block that begins with this token; -1 where none begins.
    """

    tokens: list[int]
    exit_layers: list[int]
    accepted: list[bool]
    drafts: list[int]

    @property
    def blocks(self) -> list[int]:
        """How many drafts were verified in each block."""
        return [drafts for drafts in self.drafts if drafts >= 0]

    def first(self, count: int) -> Emitted:
        """Of the first `count` tokens alone."""
        return Emitted(*(of_each[:count] for of_each in self))


class Batch:
    """Rows in flight. A subclass fills `_state`, and calls `_fetch` when it changed.

    decoding: a `Decoding` whose settings fit the rows; stop_ids: token ids that end a row.
    """

    _state: state.DecodeState

    def __init__(self, build: Build, params: Any, decoding: Decoding, *, stop_ids: tuple[int, ...]):
        self._build, self._params, self._decoding = build, params, decoding
        self._timing = Timing(*map(np.int32, decoding.chosen_schedule.timing(decoding.exits.verifies)))
        self._stop_ids = np.array(stop_ids or (-1,), np.int32)
        self._plan = state.Plan.of(decoding.exits, decoding.fusion, build.outline)

    def stop(self, rows: list[int]) -> None:
        """End these rows where they are; the others do not notice."""
        self.active[rows] = False
        self._state = state.set_active(self._build, self._state, self.active)

    def emitted(self, row: int) -> Emitted:
        """What a row has emitted so far."""
        new = slice(self._text.prompt_B[row], self.lengths[row])
        tokens, exits, drafts = (of_row[row, new].tolist() for of_row in (
            self._text.tokens_BS, self._text.exit_BS, self._text.drafts_BS))
        verifies, last = self._decoding.exits.verifies, self._plan.last_exit
        return Emitted(tokens, [self._plan.exits[e] for e in exits], [verifies and e < last for e in exits], drafts)

    @property
    def held(self) -> int:
        """Steps in which a row stood still, over all rows."""
        return int(np.sum(fetched(self._state.progress.held_B)))

    def arguments(self, pause_len_B, *, max_steps=NO_LIMIT, until_one_ends: bool = False) -> dict[str, Any]:
        """The arguments of `loop.decode`, by name."""
        now = self._decoding
        return dict(build=self._build, params=self._params, state=self._state, policy=now.exits, timing=self._timing,
                    fusion=now.fusion, sampling=now.sampling, stop_ids=self._stop_ids,
                    pause_len_B=pause_len_B.astype(np.int32), max_steps=np.int32(max_steps),
                    until_one_ends=np.bool_(until_one_ends))

    @naming_shortage("the prompts of a batch")
    def _start(self, prompts, limits, seeds, capacity: int) -> state.DecodeState:
        return state.start(self._build, self._params, prompts, limits, seeds, capacity=capacity, plan=self._plan,
                           memory=self._decoding.exits.initial_memory(len(prompts)))

    @naming_shortage("decoding a batch")
    def _decode(self, pause_len_B, **named) -> None:
        self._state = loop.decode(**self.arguments(pause_len_B, **named))
        self._fetch()

    def _fetch(self) -> None:
        self._text, kv_len_BE = fetched((self._state.text.replace(keys_B=None), self._state.progress.kv_len_BE))
        self.lengths = kv_len_BE[:, -1] + 1 if self._decoding.exits.verifies else self._text.length_B
        self.active = self._text.active_B.copy()  # `stop` writes to it


class Generation(Batch):
    """One batch of prompts, from beginning to end.

    prompts: token ids [T_b] of each row; limits: new tokens each row may get, 0 for a row that only
    fills the batch; seeds: one per row; the rest is as for `Batch`.

    After `__init__` the prompts are in the caches; every `advance` makes tokens for all active rows.
    """

    def __init__(self, build: Build, params: Any, prompts: list[np.ndarray], decoding: Decoding, *, limits: list[int],
                 seeds: list[int], stop_ids: tuple[int, ...]):
        super().__init__(build, params, decoding, stop_ids=stop_ids)
        forget_programs()
        self._ends = np.array([len(p) for p in prompts]) + limits
        watch = Stopwatch()
        self._state = self._begun(prompts, seeds)
        self._fetch()
        self.prefill_seconds, self.compile_seconds = watch.read()
        self.decode_seconds = 0.0

    def _begun(self, prompts: list[np.ndarray], seeds: list[int]):
        capacity = bucket(min(int(self._ends.max()), max(map(len, prompts)) + HEADROOM))
        return self._start(prompts, list(self._ends), seeds, capacity)

    def advance(self, count: int | None = None) -> None:
        """`count` more tokens per active row, as far as so many are left, or all that are.

        Where drafts are verified, a row may get some more: no block of drafts is cut.
        """
        watch = Stopwatch()
        most = int(self._ends.max())  # `count` may be more than an int32 holds
        goal_B = self._ends if count is None else np.minimum(self._ends, self.lengths + min(count, most))
        while (self.active & (self.lengths < goal_B)).any():
            self._go_on(goal_B)
        seconds, compiled = watch.read()
        self.decode_seconds += seconds
        self.compile_seconds += compiled

    def _go_on(self, goal_B: np.ndarray) -> None:
        """Towards so many known tokens of every row, as far as there is room."""
        capacity = self._state.capacity
        while (self.active & (self.lengths >= self._room_B(capacity))).any():
            capacity = bucket(capacity + 1)
        if capacity > self._state.capacity:
            self._state = state.grow(self._build, self._state, plan=self._plan, capacity=capacity)
        self._decode(np.minimum(goal_B, self._room_B(capacity)))

    def _room_B(self, capacity: int) -> np.ndarray:
        """The known tokens up to which rows can go in so many positions, with room for drafts that follow them."""
        drafts = self._plan.window - 1 if self._decoding.exits.verifies else 0
        return np.where(self._ends <= capacity, self._ends, capacity - drafts)


class Entry(NamedTuple):
    """A request on its way into a slot.

    prompt: token ids [T]; limit: new tokens it may get, such that all fit into the capacity; decoding: its own
    settings, of one row, in plain numbers, and alike with those of the slots (`Decoding.check_alike`).
    """

    prompt: np.ndarray
    limit: int
    seed: int
    decoding: Decoding


class Slots(Batch):
    """A fixed number of rows of fixed capacity (positions, prompt included); all programs are compiled for these.

    decoding: for one row; what it has by row is replaced by every entry's own.
    """

    def __init__(self, build: Build, params: Any, decoding: Decoding, *, slots: int, capacity: int,
                 stop_ids: tuple[int, ...]):
        super().__init__(build, params, decoding, stop_ids=stop_ids)
        refuse_too_large(build, self._plan.window, len(self._plan.buffered_layers), self._plan.block_heads, rows=slots,
                         capacity=capacity)
        self._like, self.capacity = decoding, capacity
        self._of_slot = [decoding] * slots  # an empty slot has the default, so that nobody pays for a past entry
        self._sizes = {"E": len(self._plan.exits) - 1}
        begin_service(self)
        self.clear()

    @serving()
    def clear(self) -> None:
        """Empty slots, whatever was in them."""
        nothing, slots = np.zeros(1, np.int32), len(self._of_slot)
        self._state = self._start([nothing] * slots, [0] * slots, [0] * slots, self.capacity)
        self._of_slot = [self._like] * slots
        self._fetch()

    @serving()
    def stop(self, rows: list[int]) -> None:
        super().stop(rows)
        for row in rows:
            self._of_slot[row] = self._like

    def check(self, decoding: Decoding) -> None:
        """Raises SettingError where numbers of one row's settings have another shape than the other rows' have."""
        self._stacked([decoding])

    @serving()
    def enter(self, entries: Mapping[int, Entry]) -> dict[int, Exception]:
        """Puts entries into slots, in which nothing of their past is left. Returns what went wrong, by slot."""
        failed = {}
        for slot, entry in entries.items():
            try:
                row = self._start([entry.prompt], [len(entry.prompt) + entry.limit], [entry.seed], self.capacity)
            except Exception as reason:  # of this entry alone: the state of the others is not touched yet
                failed[slot] = reason
                continue
            self._state = state.put_row(self._build, self._state, row, np.arange(len(self._of_slot)) == slot)
            self._of_slot[slot] = entry.decoding
        if len(entries) > len(failed):
            self._fetch()
        return failed

    @serving()
    def advance(self, steps: int, *, until_one_ends: bool = False) -> None:
        """All rows go on, for so many steps of the loop or until one ends, by itself of each group of devices."""
        self._decoding = self._stacked(self._of_slot)
        self._decode(np.full(len(self._of_slot), self.capacity), max_steps=steps, until_one_ends=until_one_ends)

    def _stacked(self, rows: list[Decoding]) -> Decoding:
        return self._like.by_row(lambda name, like: stack_rows([getattr(row, name) for row in rows], like,
                                                               self._sizes))
