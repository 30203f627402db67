"""The documents that stand together in a row: several, packed, or one, padded; the same in every process."""

from __future__ import annotations

import bisect
import dataclasses
from typing import NamedTuple

import numpy as np

from sled.errors import DataError
from sled.settings.decorator import setting, settings
from sled.settings.rules import Number, OneOf, Whole

SHAPES = ("packed", "padded")
TOO_LONG = ("skip", "truncate", "error")
OPEN_ROWS = 1024  # rows that are being filled at a time, at most
STEP = 16  # padded rows are multiples of it long


@settings
class Layout:
    """The way in which documents become rows.

    "packed" puts several documents into each row, a segment each; "padded" one, into rows of a few lengths, each of
    which compiles. A document longer than the context is left out, truncated (its end is lost), or an error.
    """

    context: int = setting(Whole(2, hint="a row holds a token and its target at least"),
                           help="the most tokens of a row, at most the model's context")
    _: dataclasses.KW_ONLY
    shape: str = setting(OneOf(SHAPES), default="packed", help=(
        "packed: several examples share a row, each seeing only itself; padded: one example a row"))
    too_long: str = setting(OneOf(TOO_LONG), default="skip", help="the fate of examples longer than the context")
    prompt_weight: float = setting(Number(0, hint="0 trains on completions alone, 1 on prompts as much"), default=0.0,
                                   help="weight of a prompt's token in the loss, where a completion's counts 1")
    buckets: int = setting(Whole(1, hint="it counts the lengths of padded rows"), default=4)


class Arrangement(NamedTuple):
    """K documents in R rows."""

    order_K: np.ndarray  # int64: numbers of the documents, row after row
    starts_R: np.ndarray  # int64 [R + 1]: where each row begins in `order_K`, and the end of the last
    too_long: int  # documents that were left out
    no_target: int  # documents of which no token would count: too short, or cut within the prompt
    truncated: int


def arrange(lengths_N, prompts_N, layout: Layout) -> Arrangement:
    """Rows for documents of these lengths, of which so many tokens are prompt.

    Raises DataError where one is longer than the context and the layout calls that an error.
    """
    long_N = lengths_N > layout.context
    if layout.too_long == "error" and long_N.any():
        first = int(np.argmax(long_N))
        raise DataError(f"{long_N.sum()} examples are longer than the context of {layout.context} tokens, first "
                        f"number {first + 1} of those with text: its {lengths_N[first]} tokens, end of text included; "
                        'give a larger context, or too_long="skip" or "truncate"')
    dropped_N = long_N if layout.too_long == "skip" else np.zeros_like(long_N)
    cut_N = np.minimum(lengths_N, layout.context)
    aimless_N = ~dropped_N & (cut_N <= np.maximum(prompts_N, 1))
    kept_K = np.flatnonzero(~dropped_N & ~aimless_N)
    row_K = best_fit(cut_N[kept_K], layout.context) if layout.shape == "packed" else np.arange(len(kept_K))
    starts_R = np.concatenate([[0], np.cumsum(np.bincount(row_K))]) if len(kept_K) else np.zeros(1, np.int64)
    return Arrangement(kept_K[np.argsort(row_K, kind="stable")], starts_R, int(dropped_N.sum()), int(aimless_N.sum()),
                       int(long_N[kept_K].sum()))


def best_fit(lengths_K, context: int) -> np.ndarray:
    """The row of each document, int64: in order, each joins the fullest open row with room for it, or opens one.

    When too many rows are open, the fullest is closed. (Best fit: Johnson et al., SIAM J. Comput. 3(4), 1974.)
    """
    rows, opened = np.empty(len(lengths_K), np.int64), 0
    room: list[tuple[int, int]] = []  # tokens left and number of each open row, the fullest first
    for i, length in enumerate(lengths_K.tolist()):
        at = bisect.bisect_left(room, (length, 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row, opened = context, opened, opened + 1
        rows[i] = row
        if left > length:
            bisect.insort(room, (left - length, row))
            if len(room) > OPEN_ROWS:
                room.pop(0)
    return rows


def bucket_lengths(lengths_R, context: int, count: int) -> tuple[int, ...]:
    """At most `count` lengths, ascending, into which rows of these lengths are padded with the least padding.

    Multiples of 16, but for the context. Exact, by dynamic programming over the lengths that occur.
    """
    rounded = np.minimum(-(-np.asarray(lengths_R) // STEP) * STEP, context)
    ends_U, rows_U = np.unique(rounded, return_counts=True)
    below_U = np.concatenate([[0], np.cumsum(rows_U)])
    cost_U = np.concatenate([[0], ends_U * below_U[1:]]).astype(float)  # of the rows below, in one bucket
    cuts = []
    for _ in range(min(count, len(ends_U)) - 1):
        # Entry [j, i]: the rows below j, those from i on in a bucket of their own, and one bucket more than before.
        costs = [cost_U[:j] + ends_U[j - 1] * (below_U[j] - below_U[:j]) for j in range(1, len(below_U))]
        cuts.append([0, *(int(np.argmin(c)) for c in costs)])
        cost_U = np.array([0.0, *(c.min() for c in costs)])
    end, lengths = len(ends_U), []
    for cut in [*reversed(cuts), None]:
        if end:
            lengths.append(int(ends_U[end - 1]))
            end = 0 if cut is None else cut[end]
    return tuple(reversed(lengths))
