"""One row of a generation as its reader sees it: tokens so far, text, stop strings, why it ended."""

from __future__ import annotations

from collections.abc import Sequence

from sled.text.tokenizer import Tokenizer


class StopStrings:
    """Follows a row's new tokens and looks for stop strings. `stopped` turns true when one has appeared.

    Special tokens are not part of a text, but a stop string may name one, as "<|im_end|>" does: strings with such a
    token in them are looked for where special tokens are written out.
    """

    def __init__(self, text: Tokenizer, stop: Sequence[str], eos_ids: Sequence[int]):
        self._text, self._stop, self._eos_ids = text, stop, eos_ids
        self._marked = [s for s in stop if text.holds_special(s)]
        self.tokens: list[int] = []
        self.stopped = False

    def update(self, tokens: list[int]) -> None:
        """The row's new tokens, all of them from the first; cut where a stop string is complete."""
        if self.stopped:
            return
        known, self.tokens = len(self.tokens), tokens
        if self._stop and self._complete(tokens):
            self.stopped = True
            self.tokens = next(tokens[:n] for n in range(known + 1, len(tokens) + 1) if self._complete(tokens[:n]))

    def text(self) -> str:
        """The whole text so far, cut before a stop string."""
        tokens = self.tokens
        if self.stopped and (at := self._marked_at(tokens)) is not None:
            while len(self._text.decode(tokens, special=True)) > at:
                tokens = tokens[:-1]
        text = self._text.decode(tokens)
        return text[:_first(text, self._stop)]

    def final_text(self) -> str:
        """The part of `text()` that no further token can change."""
        text = self.text().rstrip("\ufffd")  # a character whose last bytes are still to come
        pending = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[:len(text) - pending]

    def finish_reason(self) -> str:
        if self.stopped:
            return "stop"
        return "eos" if self.tokens and self.tokens[-1] in self._eos_ids else "length"

    def _complete(self, tokens: list[int]) -> bool:
        return _first(self._text.decode(tokens), self._stop) is not None or self._marked_at(tokens) is not None

    def _marked_at(self, tokens: list[int]) -> int | None:
        return _first(self._text.decode(tokens, special=True), self._marked) if self._marked else None


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins."""
    return min((at for at in (text.find(s) for s in stop) if at >= 0), default=None)
