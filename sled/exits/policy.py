"""The seam between the decoding loop and exit policies: what a policy is shown at an exit, and what it answers.

The loop knows layers, K/V and tokens; it asks the policy who leaves, and never reads a policy's settings. A new policy
is a subclass of `Policy` in a file of its own.
"""

from __future__ import annotations

import abc
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sled.errors import SettingError
from sled.exits.schedule import Immediate, Schedule


class ExitView(NamedTuple):
    """What a policy sees at an early exit. Rows that are not in `here_B` hold nothing of meaning.

    index: the exit's number, 0 .. E - 2; layer: the layer it follows. Both are static.
    here_B: rows whose newest token has come to this exit.
    states: hidden states [B, D] by layer: `layer`, the layer below it, and the early layers of the fusion; by -n what
        a head that looks back made of hidden state n (`sled.decoding.readout`).
    fused_logits: computes the exit's logits [B, V] under the fusion in use, through the exit's own head if it has one.
        A policy that verifies drafts without fusion instead, by what it took from the network in `prepare`.
    emitted_B: new tokens so far; most_B: how many the row may get.
    unverified_B: drafts that follow the last verified token (of a policy that verifies).
    memory: the policy's own arrays, see `Policy.initial_memory`.
    prepared: what `Policy.prepare` returned.
    """

    index: int
    layer: int
    here_B: jax.Array
    states: Mapping[int, jax.Array]
    fused_logits: Callable[[], jax.Array]
    emitted_B: jax.Array
    most_B: jax.Array
    unverified_B: jax.Array
    memory: Any
    prepared: Any


class Decision(NamedTuple):
    """What a policy answers: rows that leave [B], the logits [B, V] of their next token, and its memory.

    Rows that are here and do not leave go on to the next exit. Logits of other rows are ignored. The memory replaces
    the one before, in the same shapes and types: a policy keeps the entries of rows that are not here.
    """

    leaves_B: jax.Array
    logits_BV: jax.Array
    memory: Any


class Verification(NamedTuple):
    """The outcome of one verification, for `Policy.observe`; T pending positions per row.

    drafted_BT: positions that a draft follows; accepted_B: how many drafts were right, from the left; chosen_BT: the
    last layer's token after each position; states: hidden states [B, T, D] by layer.
    """

    drafted_BT: jax.Array
    accepted_B: jax.Array
    chosen_BT: jax.Array
    states: Mapping[int, jax.Array]


class Policy(abc.ABC):
    """Where tokens may leave early, and who leaves. Subclasses are `sled.settings.decorator.settings` classes.

    Rows must be decided alone: no value of one row may depend on another, or a text would depend on its batch-mates.
    """

    schedule: Schedule = Immediate()
    """When deeper layers run, where the user names no schedule."""

    verifies: bool = False
    """A token that left early is a draft, kept only if the last layer would have chosen the same."""

    propagates: bool = False
    """The missing K/V of a token that left are made at once from its exit's hidden state (CALM), not exactly later."""

    window: int = 9
    """The number of tokens of a row that may wait for deeper layers, the newest included. Static."""

    positions_per_token: Any = 1
    """The number of positions that all layers run, at most, for one token of a row: its cost at worst."""

    lowest_threshold: float | None = None
    """The lowest confidence at which a token may be trusted, over all exits and the whole text. None: drafts are not
    trusted, or the policy knows no confidence."""

    @abc.abstractmethod
    def exits(self, num_layers: int) -> tuple[int, ...]:
        """The layers after which a token may leave, ascending, the last layer included.

        Raises SettingError for a layer that a model of `num_layers` layers does not have.
        """

    def check(self, network) -> None:  # noqa: B027
        """Raises SettingError where arrays of the policy do not fit the network. Asked before anything runs."""

    @abc.abstractmethod
    def at_exit(self, view: ExitView) -> Decision:
        """Decides who leaves at an early exit. Traced once per exit; the last layer is not asked."""

    def first_exit(self, num_layers: int) -> int:
        """The first layer after which a token can leave, as the policy's settings have it."""
        return self.exits(num_layers)[0]

    def prepare(self, readout) -> Any:
        """Takes what the policy needs from the network (`sled.decoding.readout.Readout`), once, outside the loop."""
        return None

    def initial_memory(self, batch: int) -> Any:
        """Arrays of the policy's own, rows first, that the loop carries for it: a pytree, empty by default."""
        return ()

    def observe(self, memory, verification: Verification, prepared):
        """The memory after a verification, where the policy verifies.

        Rows that had nothing to verify, or have ended, are among them with no position marked in `drafted_BT`.
        """
        return memory

    def with_threshold(self, threshold: float) -> Policy:
        """The same policy at another threshold, as calibration asks for.

        Raises SettingError where the policy trusts no confidence.
        """
        raise SettingError(f"exits is {type(self).__name__}, which has no threshold to calibrate; only a policy that "
                           "trusts tokens above a threshold has one, as sled.EarlyExit(...)")


class Exits(NamedTuple):
    """The rule for exits as a user gives them, one layer or several: an ascending tuple."""

    expects = "a layer to leave after, or a tuple of them"
    hint = "the first place to leave is after layer 1"

    def __call__(self, name: str, value) -> tuple[int, ...]:
        several = value if isinstance(value, (tuple, list)) else (value,)
        whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 1 for n in several)
        if not several or not whole:
            raise SettingError(f"{name} is {value!r}, but must be {self.expects}; {self.hint}")
        return tuple(sorted({int(n) for n in several}))


def with_last(name: str, layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """These exits and the last layer's. Raises SettingError where one is not below the last layer."""
    if layers[-1] >= num_layers:
        raise SettingError(f"{name} is {layers}, but {layers[-1]} is no early exit of a model of {num_layers} layers; "
                           f"give layers from 1 to {num_layers - 1}")
    return (*layers, num_layers)


def only_if(condition, f: Callable[[], Any]):
    """f() if the condition holds, else zeros of the same shapes."""
    shapes = jax.eval_shape(f)
    return jax.lax.cond(condition, f, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
