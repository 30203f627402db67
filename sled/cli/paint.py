"""Text in which one sees which layer emitted each token: by colours on a terminal, by marks elsewhere."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

# Background and text colour (of xterm's 256) from the earliest exit to the last layer. Both are set, so it reads on
# dark and on light terminals. From pale yellow to dark blue, after the cividis map (Nunez, Anderton, Renslow 2018):
# lightness falls from step to step, so the order does not depend on telling hues apart.
SCALE = ((230, 16), (222, 16), (179, 16), (144, 16), (102, 16), (60, 231), (17, 231))


def has_colours(out: TextIO) -> bool:
    """True where colours belong into this output: it is a terminal, and NO_COLOR (no-color.org) is not set."""
    return out.isatty() and not os.environ.get("NO_COLOR")


class Paint:
    """The way layers are shown. exits: those that may emit a token, ascending; colours: or else marks.

    A mark, such as [4], stands behind all the text since the mark before it.
    """

    def __init__(self, exits: Sequence[int], *, colours: bool):
        self.colours = colours
        steps = max(len(exits) - 1, 1)
        self._scale = {layer: SCALE[i * (len(SCALE) - 1) // steps] for i, layer in enumerate(exits)}

    def text(self, text: str, layer: int) -> str:
        """A piece of text that one layer emitted."""
        if self.colours:
            back, front = self._scale[layer]
            # Line by line: many terminals would fill the rest of a line with the background at its end.
            return "\n".join(line and f"\x1b[48;5;{back};38;5;{front}m{line}\x1b[0m" for line in text.split("\n"))
        body = text.rstrip("\n")
        return f"{body}[{layer}]{text[len(body):]}"

    def legend(self, layers: Iterable[int]) -> str:
        """One line that explains the colours or marks, with the number of tokens that each layer emitted."""
        counts = Counter(layers)
        if self.colours:
            return "emitted by " + " ".join(self.text(f" layer {n}: {counts[n]} ", n) for n in self._scale)
        return "[n] behind a piece of text: layer n emitted it; tokens by layer: " + ", ".join(
            f"[{n}] {counts[n]}" for n in self._scale)


class PaintedRow:
    """One row's text, painted as it comes."""

    def __init__(self, decode: Callable[[Sequence[int]], str], paint: Paint):
        self._decode, self._paint = decode, paint
        self._tokens: list[int] = []
        self._context = self._known = 0  # tokens before `known` have their text; those from `context` are its context
        self._layers: list[int] = []  # of characters that the tokens so far have, but the text does not yet
        self._last = 0

    def more(self, text: str, tokens: Sequence[int], layers: Sequence[int]) -> str:
        """The next piece of the row's text, painted, with the tokens that are new since the last piece.

        The text may lag behind the tokens (held back for a stop string), or leave some of them out.
        """
        for token, layer in zip(tokens, layers, strict=True):
            self._layers += [layer] * self._characters(token)
            self._last = layer
        layers_of_text = [*self._layers[:len(text)], *[self._last] * (len(text) - len(self._layers))]
        self._layers = self._layers[len(text):]
        runs = itertools.groupby(zip(text, layers_of_text, strict=True), key=lambda pair: pair[1])
        return "".join(self._paint.text("".join(character for character, _ in run), layer) for layer, run in runs)

    def _characters(self, token: int) -> int:
        """Characters that the row's text gets by this token; a character of many tokens comes with its last."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context:self._known])
        now = self._decode(self._tokens[self._context:])
        if now.endswith("\ufffd"):
            return 0
        # One settled token stays as context: some decoders drop the blank before a text's first token.
        self._context, self._known = self._known, len(self._tokens)
        return len(now) - len(before)
