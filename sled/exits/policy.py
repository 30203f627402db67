"""What the decoding loop asks of a policy: where a token may leave, and what becomes of it then."""

from __future__ import annotations

import numbers
from typing import NamedTuple, Protocol, runtime_checkable

from sled.errors import SettingError
from sled.exits.schedule import Schedule


@runtime_checkable
class Policy(Protocol):
    """A frozen dataclass and jax pytree: `FullDepth`, `EarlyExit` or `SelfSpeculation`.

    The layers are cut after every exit; the last exit is the last layer. What is listed here is static.
    """

    verifies: bool
    """Whether a token that left early is a guess, kept only if the last layer would have said the same."""

    propagates: bool
    """Whether the missing K/V of a token that left are made from its exit's hidden state at once."""

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """Layers after which a token may leave, ascending, the last layer included."""
        ...

    @property
    def window(self) -> int:
        """How many tokens of a row may wait for their deeper layers, the newest included."""
        ...

    schedule: Schedule
    """The one to use where none is named."""

    @property
    def positions_per_token(self):
        """How many positions all layers run, at most, for a token of a row to become known: what it may cost."""
        ...

    def prepare(self, network):
        """What the policy wants of a network, taken from it once, outside the loop."""
        ...


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
