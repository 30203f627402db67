"""What drafts and exits do to a text, counted from the layers' choices along it: no model runs.

Greedy drafts see the full model's text up to their first wrong token, which ends what is accepted of them. So choices
that were made along that text tell, draft by draft, what `sled.SelfSpeculation` accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sled.decoding import loop
from sled.survey.choices import Choices


class Drafted(NamedTuple):
    """Counts as in `sled.results.Stats`, [L - 1, N] each, of drafts after the layers 1 .. L - 1, N draft lengths."""

    drafted_EN: np.ndarray
    accepted_EN: np.ndarray
    verifications_EN: np.ndarray


def count_drafts(token_LT: np.ndarray, text_T: np.ndarray, drafts: Sequence[int], *, limit: int,
                 ends: Sequence[int]) -> Drafted:
    """What self-speculation with drafts of these lengths counts on one text, without fusion.

    token_LT: what the layers 1 .. L would draft (`Choices`). text_T: the full model's greedy answer, its ending token
    included. limit: the tokens that it could have had. ends: ids of ending tokens, after which no draft goes on.

    Accepted drafts and verifications are exact. So are the drafted tokens, but for one case: a draft that is wrong
    already may end the text before it is long enough, and is counted as if it did not.
    """
    token_ET, size = token_LT[:-1], len(text_T)
    at_T = np.arange(size)
    wrong_ET = np.where(token_ET == text_T, size, at_T)
    next_wrong_ET = np.minimum.accumulate(wrong_ET[:, ::-1], axis=1)[:, ::-1]  # from each place on; the end where none
    draft_N = np.asarray(drafts)
    known_EN = np.zeros((len(token_ET), len(draft_N)), int)  # tokens of the text so far
    drafted_EN, accepted_EN, verifications_EN = np.zeros((3, *known_EN.shape), int)
    while (going_EN := known_EN < size).any():
        wrong_at_EN = np.take_along_axis(next_wrong_ET, np.minimum(known_EN, size - 1), axis=1)
        right_EN = np.where(going_EN, np.minimum(wrong_at_EN - known_EN, draft_N), 0)
        refused_EN = going_EN & (right_EN < draft_N) & (known_EN + right_EN < size)
        ended_EN = np.isin(np.take_along_axis(token_ET, np.minimum(wrong_at_EN, size - 1), axis=1), ends)
        whole_EN = np.where(ended_EN, right_EN + 1, np.minimum(draft_N, limit - known_EN))
        drafted_EN += np.where(refused_EN, whole_EN, right_EN)
        accepted_EN += right_EN
        verifications_EN += going_EN
        known_EN += right_EN + (going_EN & (known_EN + right_EN < size))  # and the last layer's own token after them
    return Drafted(drafted_EN, accepted_EN, verifications_EN)


class Left(NamedTuple):
    """Of one batch, by exits after the layers 1 .. L - 1 and Q thresholds, [L - 1, Q] each.

    steps: of the whole batch, all exits and thresholds alike. deeper: steps in which the layers above the exit ran;
    single: those of them in which they ran on one token a row; short: on the loop's `SHORT` at most. In the others they
    ran on the whole window.
    asked: steps in which a token came to the last layer, and not only its K/V.
    """

    steps: int
    deeper_EQ: np.ndarray
    single_EQ: np.ndarray
    short_EQ: np.ndarray
    asked_EQ: np.ndarray

    def of(self, layer: int) -> tuple:
        """The steps, and the other counts [Q] for exits after `layer`."""
        return self.steps, *(count_EQ[layer - 1] for count_EQ in self[1:])


def count_exits(batch: Sequence[Choices], thresholds: Sequence[float], limits: Sequence[int], *,
                window: int) -> Left:
    """How often the layers above one exit run for a batch of texts under `sled.EarlyExit` with exact K/V.

    Tokens leave where the exit gives its choice a probability above the threshold, along the full model's texts. The
    layers above run in each step in which a token of any row does not leave, on all that wait; and where a row has
    `window` tokens that wait, and may go on: whether its newest token ends it is not known yet. limits: the most new
    tokens of each text.
    """
    lengths_B = np.array([choices.token_LT.shape[1] for choices in batch])
    steps, exits = int(lengths_B.max()), len(batch[0].token_LT) - 1
    sure_EBT = np.zeros((exits, len(batch), steps), np.float32)
    for b, choices in enumerate(batch):
        sure_EBT[:, b, :lengths_B[b]] = choices.probability_LT[:-1]
    threshold_Q1 = np.asarray(thresholds, np.float32)[:, None]
    waiting_EQB = np.zeros((exits, len(threshold_Q1), len(batch)), int)
    deeper_EQ, single_EQ, short_EQ, asked_EQ = np.zeros((4, exits, len(threshold_Q1)), int)
    for t in range(steps):
        active_B = t < lengths_B
        waiting_EQB = np.where(active_B, waiting_EQB + 1, 0)
        stays_EQB = active_B & (sure_EBT[:, None, :, t] <= threshold_Q1)
        full_EQB = (waiting_EQB >= window) & (t + 1 < np.asarray(limits)) & active_B
        due_EQ = (stays_EQB | full_EQB).any(-1)
        deeper_EQ += due_EQ
        most_EQ = waiting_EQB.max(-1)
        single_EQ += due_EQ & (most_EQ == 1)
        short_EQ += due_EQ & (most_EQ > 1) & (most_EQ <= loop.SHORT)
        asked_EQ += stays_EQB.any(-1)
        waiting_EQB[due_EQ] = 0
    return Left(steps, deeper_EQ, single_EQ, short_EQ, asked_EQ)
