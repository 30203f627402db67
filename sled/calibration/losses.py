"""How far an early exit's output is from the full model's: the losses that a calibration bounds, in [0, 1].

Schuster et al. 2022 (CALM, arXiv 2207.07061) name two kinds: textual consistency, which compares the two outputs
and needs no labels, and risk consistency, which asks how much worse the early output answers a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sled.calibration.learn_then_test import in_unit
from sled.errors import SettingError
from sled.results import Output

Written = str | list[int]


class Consistency(NamedTuple):
    """A loss by name: `losses(early, full)` gives one number in [0, 1] per prompt [N]."""

    name: str
    losses: Callable[[Output, Output], np.ndarray]


def exact(early: Sequence[int], full: Sequence[int]) -> float:
    """0 where both outputs are the same token ids, the ending included; else 1."""
    return float(list(early) != list(full))


def rouge(early: Sequence[int], full: Sequence[int]) -> float:
    """1 - ROUGE-L: 1 - 2 LCS / (T + T') for outputs of T and T' token ids, LCS their longest common subsequence.

    Lin 2004, "ROUGE", equations 2 to 4 at beta = 1 (F1), on the model's tokens instead of words. 0 for two empty
    outputs.
    """
    both = len(early) + len(full)
    return 1 - 2 * common_subsequence(early, full) / both if both else 0.0


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    b = np.asarray(b, np.int64)
    best = np.zeros(len(b) + 1, np.int64)  # at [j]: of the part of `a` so far and the first j of `b`
    for token in a:
        # Row by row; what a cell takes from its left neighbour is a running maximum.
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], best[:-1] + (b == token)))
    return int(best[-1])


MEASURES = {"exact": exact, "rouge": rouge}


def consistency(loss: str | Callable[[Written, Written], float] | None, references: Sequence[Any] | None,
                risk: Callable[[Written, Any], float] | None) -> Consistency:
    """The loss that these arguments of `calibrate` mean. Raises SettingError for those that do not go together."""
    if (risk is None) != (references is None):
        have, lack = ("references", "risk") if risk is None else ("risk", "references")
        raise SettingError(f"{have} was given without {lack}; risk(text, reference) and one reference per prompt "
                           "go together")
    if risk is not None:
        if loss is not None or not callable(risk):
            raise SettingError(f"risk is {risk!r} and loss is {loss!r}, but risk must be a function and replaces the "
                               "loss; give one of the two")
        return Consistency(f"risk {_name(risk)}", _risk(risk, references))
    if loss is None:
        loss = "rouge"
    if callable(loss):
        return Consistency(_name(loss), lambda early, full: in_unit(
            [loss(*pair) for pair in zip(_written(early), _written(full), strict=True)], f"the loss {_name(loss)}"))
    if loss not in MEASURES:
        raise SettingError(f"loss is {loss!r}, but must be one of {', '.join(MEASURES)}, or a function of the early "
                           "and the full output")
    return Consistency(loss, lambda early, full: np.array(
        [MEASURES[loss](*pair) for pair in zip(early.tokens, full.tokens, strict=True)]))


def _risk(risk, references):
    def losses(early: Output, full: Output) -> np.ndarray:
        """max(0, risk of the early output - risk of the full one)."""
        of = lambda out, which: in_unit(  # noqa: E731
            [risk(*pair) for pair in zip(_written(out), references, strict=True)],
            f"the risk {_name(risk)} of the {which} output")
        return np.maximum(of(early, "early") - of(full, "full"), 0)

    return losses


def _written(out: Output) -> Sequence[Written]:
    """What a user's function sees of each output: its text, or its token ids where there is no tokenizer."""
    return out.tokens if out.texts is None else out.texts


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
