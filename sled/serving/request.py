"""A request to the engine: what is asked, how far it is, and what the operator allows."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

import numpy as np

from sled.decoding.batch import Emitted, Entry
from sled.errors import RequestError, SettingError
from sled.exits import Policy
from sled.settings.brief import brief
from sled.settings.decorator import setting, settings
from sled.settings.rules import LARGEST, Flag, Number, OrNone, Whole
from sled.text.stop_strings import StopStrings


@settings
class Limits:
    """The operator's bounds on every request, whatever it asks for."""

    threshold_floor: float = setting(Number(0, 1, hint="0 is no bound"), default=0.0, help=(
        "no token may leave early at a lower threshold, decay included"))
    min_layer: int = setting(Whole(0, LARGEST, hint="0 is no bound"), default=0, help=(
        "no token may leave before this layer"))
    budget: int | None = setting(OrNone(Whole(1, hint="it counts layer-tokens"), "no bound"), default=None, help=(
        "layer-tokens (one token through one layer) that a request may cost at worst, its prompt included. Every token "
        "is charged for all layers, so that no text costs more by leaving late; with self-speculation every token is "
        'charged for a whole draft of wrong tokens. What is cut off ends for the reason "budget"'))
    constant_depth: bool = setting(Flag(hint="True sends every token through all layers"), default=False, help=(
        "every token goes through all layers, whatever exits are asked for, so that the time it takes tells nothing; "
        "with self-speculation the text stays the same (in bfloat16 but for near ties), with early exit it is the full "
        "model's"))
    show_exits: bool = setting(Flag(hint="True shows requesters the layers their tokens left at"), default=False, help=(
        "give requesters the layers their tokens left at and counts of drafts, which tell how hard a text is; time and "
        "the sizes of streamed pieces still tell something, and only constant_depth hides that too"))

    def check(self, exits: Policy, num_layers: int) -> None:
        """Raises SettingError for a policy whose trusted tokens may leave earlier than is allowed."""
        if exits.verifies or exits.exits(num_layers) == (num_layers,):
            return
        name, lowest = type(exits).__name__, exits.lowest_threshold
        if lowest is None and self.threshold_floor > 0:
            raise SettingError(f"{name} has no threshold, but the operator allows {self.threshold_floor:g} at the "
                               "lowest; give a policy that has one, as sled.EarlyExit(...)")
        if lowest is not None and np.float32(lowest) < np.float32(self.threshold_floor):  # as precise as thresholds are
            raise SettingError(f"{name}.threshold comes down to {lowest:g}, but the operator allows "
                               f"{self.threshold_floor:g} at the lowest; give a higher one")
        if (first := exits.first_exit(num_layers)) < min(self.min_layer, num_layers):
            raise SettingError(f"{name} leaves after layer {first}, but the operator allows {self.min_layer} at the "
                               "earliest; give later exits, or a larger min_layer")

    def affordable(self, prompt: int, exits: Policy, num_layers: int) -> int | None:
        """New tokens that the budget has room for after a prompt of so many tokens; None: no bound."""
        if self.budget is None:
            return None
        return (self.budget // num_layers - prompt) // int(np.max(exits.positions_per_token))


@brief
@dataclasses.dataclass(frozen=True)
class Piece:
    """What `Request.stream` yields: what is new of a request.

    text: held back while it may still be the beginning of a stop string or half a character; None without a tokenizer.
    exit_layers: as in `sled.Output`; None unless the operator shows it.
    """

    text: str | None
    tokens: list[int]
    exit_layers: list[int] | None


@brief
@dataclasses.dataclass(frozen=True)
class Completion:
    """A request's result, as `sled.Output` has it for each prompt.

    finish_reason: "eos", "stop" (a stop string), "length", "budget" or "cancelled".
    exit_layers, drafted, accepted: as in `sled.Output` and its `Stats`; None unless the operator shows them.
    """

    text: str | None
    tokens: list[int]
    finish_reason: str
    exit_layers: list[int] | None
    drafted: int | None
    accepted: int | None


class Request:
    """One request, made by `Engine.submit`. Reading it drives the engine, for all its requests.

    status: "waiting", "running", "done", "cancelled" or "failed".
    """

    def __init__(self, entry: Entry, row: StopStrings, *, budgeted: bool, shown: bool, text: bool,
                 step: Callable[[], object]):
        self.status = "waiting"
        self.entry = entry
        self.failure: Exception | None = None
        self._row, self._budgeted, self._shown, self._text, self._step = row, budgeted, shown, text, step
        self._emitted = Emitted([], [], [], [])
        self._lock = threading.Lock()  # so that a reader sees tokens and layers of the same moment, none after the end

    @property
    def ended(self) -> bool:
        return self.status in ("done", "cancelled", "failed")

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._row.stopped

    def cancel(self) -> None:
        """Ends the request where it is; its slot is free at the engine's next step. Nothing, if it has ended."""
        self._become("cancelled")

    def begin(self) -> None:
        """It has a slot."""
        self._become("running")

    def finish(self) -> None:
        """It has all it asked for."""
        self._become("done")

    def fail(self, reason: Exception) -> None:
        """Ends the request with an error, which `stream` and `result` raise as a RequestError."""
        self._become("failed", reason)

    def take(self, emitted: Emitted) -> None:
        """All that its row has emitted so far."""
        with self._lock:
            if not self.ended:
                self._row.update(emitted.tokens)
                self._emitted = emitted.first(len(self._row.tokens))

    def stream(self) -> Iterator[Piece]:
        """What is new, as it is made, from the first token on.

        Raises RequestError where the request failed; while it waits, what the device fails with for others.
        """
        tokens, text = 0, ""
        while True:
            with self._lock:
                ended, layers, now = self.ended, self._emitted.exit_layers, self._row.tokens
                whole = None
                if self._text:
                    whole = self._row.text() if ended else self._row.final_text()
            if len(now) > tokens or (whole and whole != text):
                yield Piece(text=None if whole is None else whole[len(text):], tokens=now[tokens:],
                            exit_layers=layers[tokens:len(now)] if self._shown else None)
                tokens, text = len(now), whole or ""
            if ended:
                self._raise()
                return
            self._drive()

    def result(self) -> Completion:
        """The whole result, when it is there; of a cancelled request, what there was until then.

        Raises RequestError where the request failed.
        """
        while not self.ended:
            self._drive()
        self._raise()
        made, shown = self._emitted, self._shown
        return Completion(
            text=self._row.text() if self._text else None, tokens=self._row.tokens, finish_reason=self._reason(),
            exit_layers=made.exit_layers if shown else None, drafted=sum(made.blocks) if shown else None,
            accepted=sum(made.accepted) if shown else None)

    def _drive(self) -> None:
        """A step of the engine. Where it fails, and this request with it, `_raise` raises."""
        try:
            self._step()
        except Exception:
            if not self.ended:
                raise

    def _become(self, status: str, failure: Exception | None = None) -> None:
        """Takes the status, unless the request has ended: whoever ends it first decides."""
        with self._lock:
            if not self.ended:
                self.failure, self.status = failure, status

    def _reason(self) -> str:
        if self.status == "cancelled":
            return "cancelled"
        reason = self._row.finish_reason()
        return "budget" if reason == "length" and self._budgeted else reason

    def _raise(self) -> None:
        if self.failure is not None:
            raise RequestError("the request failed while it was served, for the reason that this error carries as its "
                               "cause; the others go on; submit it again") from self.failure
