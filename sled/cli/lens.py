"""`sled lens`."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import Annotated

import tyro

from sled.cli.derived import left_out
from sled.cli.options import ChatOptions, FusionOptions, ModelOptions, unescape
from sled.cli.values import NewPath
from sled.errors import SettingError
from sled.io import writable
from sled.plots import writable_picture
from sled.settings.rules import Whole


@dataclasses.dataclass(frozen=True)
class Lens:
    """Show every layer's next-token predictions after each token of a text: a table, a picture, a page to explore.

    sled lens "Question: Ash buys 6 toys at 10 dollars each. How much is it?\\nAnswer: 6*10=60"
    sled lens --fusion sled --picture lens.png --last 24 "The capital of France is Paris"
    sled lens --fusion sled --html lens.html "The capital of France is Paris"
    sled lens -m HuggingFaceTB/SmolLM2-135M-Instruct --chat "What is the capital of Italy?" --answer "It is Rome."
    """

    text: tyro.conf.Positional[str]
    """The text to read; a backslash and n stands for a line break."""
    answer: str | None = None
    """--chat: the assistant's answer to the text, to be read after it."""
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    picture: NewPath | None = None
    """Also draw it into this file (.png, .svg or .pdf)."""
    html: NewPath | None = None
    """Also write it into this file, as a page for a browser: details of every cell, early exits at any threshold."""
    last: Annotated[int | None, left_out("12; on the page all that it holds")] = None
    """Show the last so many positions of the text."""

    def run(self) -> None:
        from sled.lens import page, picture

        last = 12 if self.last is None else Whole(1, hint="it counts the positions to show")("--last", self.last)
        strategy = self.fusion_options.strategy()
        if self.picture:
            writable_picture("--picture", self.picture)
        if self.html:
            writable("--html", self.html)
        [text] = self.chat_options.prompts([unescape(self.text)])
        if self.answer is not None:
            if not self.chat_options.chat:
                raise SettingError("--answer has no meaning without --chat; leave it out, or give --chat too")
            text = text.answered(unescape(self.answer))
        lm = self.model_options.load()
        self.chat_options.hint(lm)
        lens = lm.lens(text, fusion=None if self.fusion_options.fusion == "final" else strategy)
        first = max(0, len(lens.tokens) - last)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None  # a file takes lines of any length
        print(lens.table(first=first, count=last, width=width))
        print("cells: a layer's most likely next token and its probability in percent; * = the last layer's choice")
        if self.picture:
            print(f"picture: {picture(lens, self.picture, first=first, count=last)}")
        if self.html:
            whole = self.last is None
            written = page(lens, self.html, title=f"What each layer of {lm.name} would say next",
                           first=0 if whole else first, count=None if whole else last)
            print(f"page: {written}")
