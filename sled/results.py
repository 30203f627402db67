"""What `LM.generate`, `LM.stream` and `LM.score` return."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from sled.decoding.batch import Emitted, Generation
from sled.settings.brief import brief


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and times of one `generate`. Where a shape is new, its compilation is told apart, by `compile_seconds`.

    Counts are sums over the tokens returned, so that neither batch-mates, nor the schedule, nor how a stream is cut
    changes them; `held` and the seconds are of the batch.

    mean_depth: mean of `exit_layers` over the new tokens; L without early exits and drafts. It says where tokens
        were chosen, not how many layers ran: all of them ran over an accepted draft, to verify it.
    drafted: drafts verified by the last layer, in the blocks that the text consists of; accepted: those in the text.
    verifications: how many such blocks there are.
    deferred: tokens that left before the last layer, whose deeper K/V came later or were propagated.
    held: steps in which a row stood still for deeper layers, over all rows.
    compile_seconds: compilation for shapes that were new; the other seconds, and `tokens_per_second`, are without it.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    mean_depth: float
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    deferred: int = 0
    held: int = 0
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, runs: Collection[Generation], emitted: Collection[Emitted], *, prompt_tokens: int,
           num_layers: int) -> Stats:
        """From generations and what counts of the rows that they emitted."""
        layers = [layer for row in emitted for layer in row.exit_layers]
        blocks = [drafts for row in emitted for drafts in row.blocks]
        return cls(prompt_tokens=prompt_tokens, new_tokens=len(layers),
                   prefill_seconds=sum(run.prefill_seconds for run in runs),
                   decode_seconds=sum(run.decode_seconds for run in runs),
                   mean_depth=sum(layers) / max(len(layers), 1), drafted=sum(blocks),
                   accepted=sum(sum(row.accepted) for row in emitted), verifications=len(blocks),
                   deferred=sum(layer < num_layers for layer in layers), held=sum(run.held for run in runs),
                   compile_seconds=sum(run.compile_seconds for run in runs))

    @property
    def tokens_per_second(self) -> float:
        """New tokens over prefill and decoding time, compilation left out."""
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    def layers_over_plain(self, exit_layer: int, num_layers: int) -> float:
        """The layers that ran one after another for drafts made after `exit_layer` and their verifications, over those
        of plain decoding: above 1, drafting costs more than it saves, on whatever machine."""
        drafting = (self.drafted + self.verifications) * exit_layer
        verifying = self.verifications * (num_layers - exit_layer)
        return (drafting + verifying) / ((self.accepted + self.verifications) * num_layers)

    @property
    def acceptance(self) -> float | None:
        """Share of the verified drafts that were right; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted(self) -> float | None:
        """Right drafts per verification; None where nothing was verified."""
        return self.accepted / self.verifications if self.verifications else None


@brief
@dataclasses.dataclass(frozen=True)
class Output:
    """What `generate` returns, one entry per prompt.

    texts: the new text, without special tokens and cut before a stop string; None without a tokenizer.
    tokens: the new token ids; an ending token is included, and so is the token that completes a stop string.
    finish_reasons: "eos", "stop" (a stop string) or "length".
    exit_layers: the layer whose choice each new token is; of an accepted draft, the layer that drafted it.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    finish_reasons: list[str]
    exit_layers: list[list[int]]
    stats: Stats


@brief
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What `stream` yields: per prompt, what is new since the last chunk; and the counts and times so far.

    Text is held back while it may still be the beginning of a stop string or half a character.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    exit_layers: list[list[int]]
    stats: Stats


@brief
@dataclasses.dataclass(frozen=True)
class Scores:
    """What `score` returns: lists in the shape of the continuations given.

    tokens: the continuation's token ids; logprobs: natural-log probability of each of them, or what the fusion gives,
    where that is not normalised; totals: their sum; greedy: whether every token is the most likely one at its place;
    left_out: for each token, whether the fusion leaves it out, so that its score is but the fusion's lower bound.
    """

    tokens: list
    logprobs: list
    totals: list
    greedy: list
    left_out: list
