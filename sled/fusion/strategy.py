"""The interface of fusion strategies that the decoding loop knows, and the settings and helpers they share.

A strategy is a class of `sled.settings.decorator.settings`. Numbers that users tune are traced, so that changing them
never recompiles. What decides shapes or the computation itself is static.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from sled.errors import SettingError
from sled.settings.decorator import setting
from sled.settings.rules import WIDE, Flag, Layers, Number


@runtime_checkable
class Strategy(Protocol):
    """Makes one distribution over the next token of the candidate layers.

    One that leaves tokens out, all but the top ones as `SLED` does, calls the logit that they get `lower_bound`.

    One may have `certain(final_BV)` besides: given the final layer's logits, rows [B] in which the largest logit of
    `logits` is at the same token, whatever the early layers are; False where that is not known. Greedy decoding then
    spares the early layers of such rows their projection (`sled.decoding.need`).

    One with `certain` may have `certain_by_layer(final_BV, h_BCD, head, asked_B)` too, for rows that `certain` leaves
    open in a large vocabulary. `h_BCD` and `head` are those that `logits` would get, and it says the same, rows [B],
    of just these early layers: it pays where it projects much less than `logits`. `asked_B` [B], bool, are the rows
    whose answer is used; what it gives for the others is ignored.

    Rounding must not break these promises: `sled.fusion.certain` has a margin.
    """

    norm_early: bool
    """True where the caller must apply the final norm to early hidden states too, as to the final one."""

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        """Ascending hidden states wanted besides the final one: 0 = embeddings, n = after layer n."""
        ...

    def logits(self, h_BCD, head):
        """Logits (B, V), float32, of hidden states in the order early_layers + (final,), already normed."""
        ...


def layers_setting(*words: str | None, help: str) -> Any:
    """The early layers to use: one of `words`, of which the first is the default and `help` tells, or indices."""
    return setting(Layers(words), default=words[0], help=f"early layers to use, by index or {help}")


def norm_setting(default: bool, *, hint: str) -> Any:
    return setting(Flag(hint=hint), default=default, help="whether early hidden states go through the final norm")


def left_out_setting(default: float) -> Any:
    return setting(Number(high=WIDE, hint="-inf or a large negative number, as -1000, leaves a token out"),
                   default=default, rows="B", help="logit of the tokens that are left out")


def at_lower_bound(fusion, logits_P):
    """Which of the logits [P], each of some token, the fusion gave to a token that it leaves out, [P]."""
    bound = getattr(fusion, "lower_bound", None)
    return jnp.zeros(logits_P.shape, bool) if bound is None else logits_P == per_row(bound, logits_P)


def explicit_layers(self, num_layers: int) -> tuple[int, ...]:
    """The indices in the field `layers`, which must lie below the final layer of this model."""
    if self.layers[-1] >= num_layers:
        raise SettingError(
            f"{type(self).__name__}.layers is {self.layers}, but {self.layers[-1]} is no early layer of a model of "
            f"{num_layers} layers, whose last early one is {num_layers - 1}; leave it out"
        )
    return self.layers


def per_row(value, array_Bx):
    """A number, or one per row (B,), shaped to combine with an array (B, ...)."""
    return jnp.asarray(value, array_Bx.dtype).reshape((-1,) + (1,) * (array_Bx.ndim - 1))
