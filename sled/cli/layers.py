"""`sled layers`."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Annotated

import tyro

import sled
from sled.cli.derived import arguments, left_out
from sled.cli.exit_options import exits_written
from sled.cli.options import ChatOptions, ModelOptions, PromptOptions, begin_prompts
from sled.cli.values import NewPath
from sled.io import writable
from sled.plots import writable_picture


@dataclasses.dataclass(frozen=True)
class Layers:
    """Show what every layer says on the model's own answers, and what drafting or leaving early there would give here.

    sled layers

    sled layers -m HuggingFaceTB/SmolLM2-135M-Instruct --file prompts.txt --chat --picture layers.png

    sled layers -m FOLDER --data questions.jsonl --prompt question --limit 32 --json layers.json

    The model answers the prompts, and every layer is read along its answers: how often it would have chosen the same
    token, how far its confidence can be believed, how many of its drafts would have been accepted. The parts of a step
    are timed on this machine, and from both follow the speeds to expect of every exit and draft length. It recommends
    what is expected to be faster than plain decoding; or none, since the early layers of most models do not speak
    until they are trained to, and says how.
    """

    problems: Annotated[int | None, left_out("16")] = None
    """Without prompts of yours: how many of the demo model's own training problems to take."""
    prompt_options: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 128
    """The most tokens to make for a prompt."""
    batch_size: int = 1
    """Prompts decoded together, in what is timed. The more, the less drafting gives."""
    profile: bool = True
    """Time the parts of a step on this machine. Without, speeds are those of a device bound by memory."""
    picture: NewPath | None = None
    """Also draw the layers into this file (.png, .svg or .pdf)."""
    json: NewPath | None = None
    """Also write all figures to this file: every draft length and threshold of every layer, and the times.
    sled export --survey takes it for the model card; in Python sled.survey.result.Survey.load reads it."""

    def run(self) -> None:
        from sled.survey.picture import picture
        from sled.survey.result import LEGEND

        if self.picture:
            writable_picture("--picture", self.picture)
        if self.json:
            writable("--json", self.json)
        lm, prompts = begin_prompts(self, 16)
        survey = sled.layers(lm, prompts, **arguments(self, sled.layers))
        print(f"{survey.table()}\n\n{textwrap.fill(LEGEND, 120)}\n")
        print(survey.verdict())
        for way in survey.recommended:
            print(f"as options of sled generate: {exits_written(way.policy())}")
        if self.picture:
            print(f"picture: {picture(survey, self.picture)}")
        if self.json:
            survey.save(self.json)
