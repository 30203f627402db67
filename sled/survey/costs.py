"""The time that decoding takes with drafts and exits, from the times of its parts: a pure model, nothing runs here.

A step of the loop (`sled.decoding.loop`) is its layers, each over so many tokens of every row, the projection with the
choice of a token, and what the loop does besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import nnx

from sled.decoding import loop
from sled.lm import LM
from sled.survey.simulate import Left

DRAFTS = (1, 2, 3, 4, 6, 8, 12, 16)
PAYS = 1.05  # the speed relative to plain decoding from which a way is worth its trouble


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a step, of one model at one batch size on one machine.

    depth: L. layer_of, head_of: of one layer, and of the projection with the choice, over so many tokens of each row,
        by their number, ascending; between two of them, and beyond, on the line through the nearest.
    few: of the projection with the choice at one token of each row, where drafts are of the first ids alone; None
        where that was not asked for.
    The rest of a step, beyond layers and projections: plain, of one without exits; draft, of one that drafts; verify,
    what a verification adds; exit, of one with an early exit; deeper, what it adds that the layers above run.
    call: what a batch takes beyond its steps, to begin and to hand over what it emitted.
    own_head: of an exit head beside the projection, by its layer. Empty where the loop was timed: there it is part of
    draft and exit, and taken to be that of the layer at which they were timed.
    """

    depth: int
    layer_of: Mapping[int, float]
    head_of: Mapping[int, float]
    few: float | None = None
    plain: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    exit: float = 0.0
    deeper: float = 0.0
    call: float = 0.0
    own_head: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_weights(cls, lm: LM, first_ids: int | None = None) -> Costs:
        """Of a device bound by memory: a part takes the time of reading its weights once, whatever the tokens.

        In units of reading one layer. Speeds relative to plain decoding are the same for all such devices. first_ids:
        how many token ids drafts may be of, None for all.
        """
        sizes = {path: array.nbytes for path, array in nnx.to_flat_state(lm.params)}
        layer = sum(size for path, size in sizes.items() if path[0] == "layers") / lm.config.num_layers
        head = lm.build.outline.shared_head.w_VD.nbytes / layer
        own: dict[int, float] = {}
        for path, size in sizes.items():
            if path[0] == "exit_heads" and path[2] != "projection":  # which stands in the shared one's place
                exit_layer = lm.config.exit_heads.layers[path[1]]
                own[exit_layer] = own.get(exit_layer, 0) + size / layer
        few = first_ids and head * first_ids / lm.config.vocab_size
        return cls(lm.config.num_layers, {1: 1.0}, {1: head}, few, own_head=own)

    def layer(self, tokens: int) -> float:
        """One layer over `tokens` tokens of each row."""
        return _on_line(self.layer_of, tokens)

    def head(self, tokens: int) -> float:
        """The projection and the choice at `tokens` tokens of each row."""
        return _on_line(self.head_of, tokens)

    @property
    def step(self) -> float:
        """A step of plain greedy decoding."""
        return self.depth * self.layer(1) + self.head(1) + self.plain

    def drafting(self, layer: int, window: int, drafted, verifications, *, few: bool = False):
        """Self-speculation after `layer`, for so many drafts and verifications of a batch, which may be arrays.

        few: whether drafts are of the first ids alone.
        Each draft is a step through the first layers and the projection. A verification is one more pass through the
        first layers, and the others over a block of `window` tokens.
        """
        first = layer * self.layer(1) + self.own_head.get(layer, 0) + self.draft
        others = (self.depth - layer) * self.layer(window) + self.head(window) + self.verify
        return drafted * (first + (self.few if few else self.head(1))) + verifications * (first + others)

    def leaving(self, layer: int, left: Left, window: int):
        """Early exit after `layer`, for the steps that were counted with this window, at every threshold [Q]."""
        steps, deeper_Q, single_Q, short_Q, asked_Q = left.of(layer)
        first = layer * self.layer(1) + self.own_head.get(layer, 0) + self.head(1) + self.exit
        above = (single_Q * self.layer(1) + short_Q * self.layer(loop.SHORT)
                 + (deeper_Q - single_Q - short_Q) * self.layer(window))
        return (steps * first + (self.depth - layer) * above + asked_Q * self.head(1) + deeper_Q * self.deeper)

    def pays_from(self, layer: int, windows: Mapping[int, int]) -> float | None:
        """The least acceptance from which drafts after `layer` make decoding `PAYS` times as fast, for the best draft
        length; None where not even drafts that are always right do.

        With acceptance a, a draft of d tokens gives 1 + a + ... + a^d tokens per verification. windows: by d.
        """
        for acceptance in np.arange(101) / 100:
            speeds = [np.sum(acceptance ** np.arange(d + 1)) * self.step
                      / self.drafting(layer, window, d, 1, few=self.few is not None) for d, window in windows.items()]
            if max(speeds) >= PAYS:
                return float(acceptance)
        return None


def _on_line(seconds: Mapping[int, float], tokens: int) -> float:
    known = list(seconds)
    if len(known) == 1:
        return seconds[known[0]]
    at = int(np.clip(np.searchsorted(known, tokens), 1, len(known) - 1))
    (left, right), share = known[at - 1:at + 1], (tokens - known[at - 1]) / (known[at] - known[at - 1])
    return seconds[left] + share * (seconds[right] - seconds[left])
