"""What `LM.generate`, `LM.stream` and `LM.score` return."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and times of one `generate`. Seconds include compilation where a shape is new."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens over prefill and decoding time."""
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class Output:
    """What `generate` returns, one entry per prompt.

    texts: the new text, without special tokens and cut before a stop string; None without a tokenizer.
    tokens: the new token ids; an ending token is included, and so is the token that completes a stop string.
    finish_reasons: "eos", "stop" (a stop string) or "length".
    """

    texts: list[str] | None
    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: Stats


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What `stream` yields: per prompt, what is new since the last chunk.

    Text is held back while it may still be the beginning of a stop string or half a character.
    """

    texts: list[str] | None
    tokens: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `score` returns: lists in the shape of the continuations given.

    tokens: the continuation's token ids; logprobs: natural-log probability of each of them;
    totals: their sum; greedy: whether every token is the most likely one at its place.
    """

    tokens: list
    logprobs: list
    totals: list
    greedy: list
