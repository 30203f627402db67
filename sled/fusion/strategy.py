"""What all fusion strategies share: the small interface the decoding loop knows, and checked settings.

A strategy is a frozen dataclass and a jax pytree. Numbers that users tune are leaves: traced, so that
changing them never recompiles. What decides shapes or the computation itself is static.
"""

import math
import numbers
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError


@runtime_checkable
class Strategy(Protocol):
    """How the candidate layers become one distribution over the next token."""

    norm_early: bool
    """Whether the caller must apply the final norm to the early hidden states (the final one always is)."""

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        """Ascending hidden states wanted besides the final one: 0 = embeddings, n = after layer n."""
        ...

    def logits(self, h_BCD, head):
        """Logits (B, V), float32, of hidden states in the order early_layers + (final,), already normed."""
        ...


def check_number(self, name: str, fits, remedy: str, kind: type = float) -> None:
    """Check one numeric field and normalise it, so that 2 and 2.0 are the same trace; arrays pass.

    Raises `SettingError` where the number is NaN, not of `kind`, or `fits(value)` is false.
    """
    value = getattr(self, name)
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    where = f"{type(self).__name__}({name}={value!r})"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise SettingError(f"{where}: not a number; {remedy}.")
    if math.isnan(value) or (kind is int and value != int(value)) or not fits(value):
        raise SettingError(f"{where} is out of range; {remedy}.")
    object.__setattr__(self, name, kind(value))


def check_layers(self, named: tuple[str, ...]) -> None:
    """Check the field `layers`: a name out of `named`, None where allowed by the caller, or indices."""
    if self.layers is None or (isinstance(self.layers, str) and self.layers in named):
        return
    choices = " or ".join([*map(repr, named), "a tuple of layer indices such as (0, 8, 16)"])
    wrong = SettingError(f"{type(self).__name__}(layers={self.layers!r}) names no layers; give {choices}.")
    if isinstance(self.layers, str) or not hasattr(self.layers, "__iter__"):
        raise wrong
    layers = tuple(self.layers)
    if not layers or not all(isinstance(n, numbers.Integral) and n >= 0 for n in layers):
        raise wrong
    object.__setattr__(self, "layers", tuple(sorted({int(n) for n in layers})))


def explicit_layers(self, num_layers: int) -> tuple[int, ...]:
    """The indices in the field `layers`, which must lie below the final layer of this model."""
    if self.layers[-1] >= num_layers:
        raise SettingError(
            f"{type(self).__name__}(layers={self.layers}): {self.layers[-1]} is no early layer of a model of "
            f"{num_layers} layers, whose last one is {num_layers - 1}; leave it out."
        )
    return self.layers


def per_row(value, array_Bx):
    """A number, or one per row (B,), shaped to combine with an array (B, ...)."""
    return jnp.asarray(value, array_Bx.dtype).reshape((-1,) + (1,) * (array_Bx.ndim - 1))
