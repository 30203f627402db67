"""`Engine`: continuous batching for whoever serves a model to many."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
from tqdm import tqdm

from sled.decoding.batch import Entry, Slots
from sled.decoding.groups import groups_of
from sled.decoding.options import FINAL_LAYER, FULL_DEPTH, GREEDY, NEW_TOKENS, Decoding, decoding_arguments
from sled.decoding.sampling import Sampling
from sled.errors import PromptError, RequestError, SettingError
from sled.exits import Policy, Schedule
from sled.fusion import Strategy
from sled.lm import LM
from sled.serving.request import Limits, Request
from sled.settings.rules import Instance, Whole
from sled.text.prompts import Prompt, prompt_ids
from sled.text.stop_strings import StopStrings

LIMITS = Limits()
STEPS = 8  # of the loop, between two looks at what is new


class Engine:
    """Serves requests of any length through a fixed number of slots.

    A request takes a slot when one is free and gives it back when it ends. What a request gets is what `lm.generate`
    gives for it alone with the same settings, whatever the others do, in float32 (`sled.Decoding`); they wait for it
    while its prompt is read. One program serves all slots; the first prompt of a new length, rounded up to 16, 24, 32,
    48, ... and 512 at most, compiles one more.

        engine = sled.Engine(lm, slots=8, exits=sled.SelfSpeculation(2))
        requests = [engine.submit(prompt, max_new_tokens=64) for prompt in prompts]
        for piece in requests[0].stream(): ...
        requests[1].cancel()
        texts = [request.result().text for request in requests[2:]]

    Whoever reads a request drives the engine, by `step`; any thread may submit, read or cancel.

    lm: the model, whose tokenizer and weights the engine uses.
    slots: requests served at a time.
    capacity: tokens a request may have, prompt included; memory and the cost of attention grow with it.
        None: the model's context, 1024 at most.
    fusion, exits, sampling: as for `LM.generate`, for requests that do not give their own. A request's own must be
        of the same class and may differ in its numbers, of one row each.
    schedule: when deeper layers run. Changes the time, not a text. None: the exits' own.
    limits: what the operator allows.

    Raises SettingError for a value out of range, and where the engine's own settings are beyond its limits.
    """

    @decoding_arguments
    def __init__(self, lm: LM, *, slots: int = 8, capacity: int | None = None,
                 fusion: Strategy = FINAL_LAYER, exits: Policy = FULL_DEPTH,
                 schedule: Schedule | None = None, sampling: Sampling | Literal["checkpoint"] = GREEDY,
                 limits: Limits = LIMITS):
        Instance(LM, traced=False, hint="give what sled.load returns")("lm", lm)
        slots = Whole(1, hint="it counts the requests served at a time")("slots", slots)
        if slots % (groups := groups_of(lm.mesh)):
            raise SettingError(f"slots is {slots}, but the model lies on {groups} groups of devices, which serve as "
                               f"many each; give a multiple of {groups}")
        most = lm.config.context
        hint = "it counts a request's tokens, a new one included, within the model's context"
        hint += lm.config.beyond and f", and {lm.config.beyond}"
        capacity = Whole(2, most, hint=hint)("capacity", min(most, 1024) if capacity is None else capacity)
        self.limits = Instance(Limits, traced=False, hint="give sled.Limits(...)")("limits", limits)
        self._lm, self._waiting, self._lock = lm, deque(), threading.Lock()
        defaults = Decoding(fusion, exits, schedule, lm.sampling_of(sampling)).check_context(most)
        exits.exits(lm.config.num_layers)  # for its error, which constant depth would not raise
        self._defaults = self._allowed(defaults, defaults)
        self._slots = Slots(lm.build, lm.params, self._served(self._defaults), slots=slots, capacity=capacity,
                            stop_ids=lm.config.eos_ids)
        self._running: list[Request | None] = [None] * slots
        self._spoilt = False  # whether a failure has left the slots in no good state

    @decoding_arguments
    def submit(self, prompt: Prompt, *, fusion: Strategy | None = None, exits: Policy | None = None,
               sampling: Sampling | Literal["checkpoint"] | None = None, max_new_tokens: int = NEW_TOKENS,
               stop: str | Sequence[str] = (), seed: int = 0) -> Request:
        """A request that waits for a slot.

        prompt: a string, a list of token ids, or a `sled.Chat`. max_new_tokens, seed, stop: as for `LM.generate`.
        fusion, exits, sampling: this request's own numbers; None takes the engine's.

        Raises PromptError, SettingError, TokenizerError; RequestError where the budget has no room for one new token.
        """
        seed = Whole(0, 2**32 - 1, hint="it names one of 2**32 random streams")("seed", seed)
        own = dict(fusion=fusion, exits=exits, sampling=sampling and self._lm.sampling_of(sampling))
        served = self._served(self._allowed(self._defaults.replace(
            max_new_tokens=max_new_tokens, stop=stop,
            **{name: given for name, given in own.items() if given is not None}), self._defaults))
        self._slots.check(served)
        [ids, *more] = prompt_ids(prompt, self._lm.text, self._lm.config)
        if more:
            raise PromptError(f"a request has one prompt, but {1 + len(more)} were given; submit each by itself")
        if len(ids) >= self._slots.capacity:
            raise PromptError(f"the prompt is {len(ids)} tokens long, but a request may have {self._slots.capacity}, "
                              "the new ones included; shorten it, or make the engine with a larger capacity")
        affordable = self.limits.affordable(len(ids), served.exits, self._lm.config.num_layers)
        if affordable is not None and affordable < 1:
            raise RequestError(f"the prompt of {len(ids)} tokens leaves no room for a new one within the budget of "
                               f"{self.limits.budget:,} layer-tokens; shorten it, or ask the operator for more")
        limit = min(served.max_new_tokens, self._slots.capacity - len(ids))
        budgeted = affordable is not None and affordable < limit
        entry = Entry(ids, affordable if budgeted else limit, seed, served)
        row = StopStrings(self._lm.text, served.stop, self._lm.config.eos_ids)
        request = Request(entry, row, budgeted=budgeted, shown=self.limits.show_exits,
                          text=self._lm.text.available, step=self.step)
        self._waiting.append(request)
        return request

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return sum(not request.ended for request in tuple(self._waiting))

    @property
    def running(self) -> int:
        """Requests in slots."""
        return sum(request is not None and not request.ended for request in self._running)

    def step(self) -> None:
        """One round of work: free slots are filled, then every running request gets some tokens.

        Where the device fails, the running requests fail with it, the waiting ones stay, and the error is raised.
        """
        with self._lock:
            try:
                if self._spoilt:
                    self._slots.clear()
                    self._spoilt = False
                self._free()
                self._fill()
                if self.running:
                    self._slots.advance(STEPS, until_one_ends=bool(self._waiting))
                    self._deliver()
            except BaseException as reason:  # also an interrupt: the loop has given up its state
                failure = reason if isinstance(reason, Exception) else RuntimeError("interrupted")
                for request in filter(None, self._running):
                    request.fail(failure)
                self._running = [None] * len(self._running)
                self._spoilt = True
                raise

    def run(self, *, progress: bool = False) -> None:
        """Works until nothing waits and nothing runs. progress: shows a bar over the requests."""
        with tqdm(total=self.waiting + self.running, unit="request", disable=not progress) as bar:
            while left := self.waiting + self.running:
                self.step()
                bar.update(left - self.waiting - self.running)

    def _allowed(self, decoding: Decoding, defaults: Decoding) -> Decoding:
        """Settings of a request, in plain numbers. Raises SettingError for those that it cannot or may not have."""
        decoding.check_alike(defaults)
        decoding = decoding.one_row()
        self.limits.check(decoding.exits, self._lm.config.num_layers)
        asked, most = (getattr(settings.fusion, "steps", None) for settings in (decoding, defaults))
        if asked is not None and asked > np.min(most):  # all rows take as many steps as the one that asks for most
            raise SettingError(f"{type(decoding.fusion).__name__}.steps is {asked}, but this engine allows {most}; "
                               "give at most that many")
        return decoding

    def _served(self, decoding: Decoding) -> Decoding:
        """Settings as they are served: at constant depth every token goes through all layers."""
        return decoding.replace(exits=FULL_DEPTH) if self.limits.constant_depth else decoding

    def _free(self) -> None:
        """Takes requests that have ended out of their slots."""
        ended = [slot for slot, request in enumerate(self._running) if request is not None and request.ended]
        if ended:
            self._slots.stop(ended)
            for slot in ended:
                self._running[slot] = None

    def _fill(self) -> None:
        """Gives free slots to waiting requests, in their order."""
        free = [slot for slot, request in enumerate(self._running) if request is None]
        entering = {}
        while free and self._waiting:
            request = self._waiting[0]
            if not request.ended:
                slot = free.pop(0)
                # At every moment it is in one place or the other, so that no failure loses it.
                entering[slot] = self._running[slot] = request
            self._waiting.popleft()
        if not entering:
            return
        failed = self._slots.enter({slot: request.entry for slot, request in entering.items()})
        for slot, request in entering.items():
            if slot in failed:
                request.fail(failed[slot])
                self._running[slot] = None
            else:
                request.begin()

    def _deliver(self) -> None:
        """Hands every running request what is new, and ends those that are through."""
        for slot, request in enumerate(self._running):
            if request is None or request.ended:
                continue
            try:
                request.take(self._slots.emitted(slot))
            except Exception as reason:  # of its text: the others have theirs
                request.fail(reason)
            if request.status == "running" and (request.stopped or not self._slots.active[slot]):
                request.finish()
        self._free()
