"""One row of a generation as its reader sees it: tokens so far, text, stop strings, why it ended."""

from __future__ import annotations

from collections.abc import Sequence

from sled.text.tokenizer import Tokenizer


class StopStrings:
    """Follows a row's new tokens and looks for stop strings. `stopped` turns true when one has appeared."""

    def __init__(self, text: Tokenizer, stop: Sequence[str], eos_ids: Sequence[int]):
        self._text, self._stop, self._eos_ids = text, stop, eos_ids
        self.tokens: list[int] = []
        self.stopped = False

    def update(self, tokens: list[int]) -> None:
        """The row's new tokens, all of them from the first; cut where a stop string is complete."""
        if self.stopped:
            return
        known, self.tokens = len(self.tokens), tokens
        if self._stop and self._stop_at(self._text.decode(tokens)) is not None:
            self.stopped = True
            self.tokens = next(tokens[:n] for n in range(known + 1, len(tokens) + 1)
                               if self._stop_at(self._text.decode(tokens[:n])) is not None)

    def text(self) -> str:
        """The whole text so far, cut before a stop string."""
        text = self._text.decode(self.tokens)
        return text[:self._stop_at(text)]

    def final_text(self) -> str:
        """The part of `text()` that no further token can change."""
        text = self.text().rstrip("\ufffd")  # a character whose last bytes are still to come
        pending = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[:len(text) - pending]

    def finish_reason(self) -> str:
        if self.stopped:
            return "stop"
        return "eos" if self.tokens and self.tokens[-1] in self._eos_ids else "length"

    def _stop_at(self, text: str) -> int | None:
        return min((at for at in (text.find(s) for s in self._stop) if at >= 0), default=None)
