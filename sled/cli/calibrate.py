"""`sled calibrate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import sled
from sled.cli.derived import arguments, derive, left_out, offer, settings_of
from sled.cli.exit_options import ExitOptions, schedule_options
from sled.cli.options import ChatOptions, FusionOptions, PromptOptions, SamplingOptions, Stop, TextModelOptions, begin
from sled.cli.values import NewPath
from sled.io import writable
from sled.settings.decorator import declared

EXITS = (*settings_of(offer(sled.EarlyExit, *(declared(sled.EarlyExit).keys() - {"threshold"}))),  # what is sought
         *schedule_options("immediate"))


@dataclasses.dataclass(frozen=True)
class Calibrate(derive("Exits", *EXITS)):
    """Find how early tokens may leave, with a guarantee.

    sled calibrate --exit-layers 2 4

    sled calibrate -m facebook/layerskip-llama3.2-1B --file prompts.txt --exit-layers 4 8 --delta 0.05

    Thresholds are tried from the safest down, on prompts of yours: like those that you will serve, and that nothing was
    tuned or trained on. Each is compared with the full model; the first
    that cannot be shown to be safe ends the search, and the one before it is chosen. The promise: for further prompts
    like these, the mean loss is at most DELTA. It is wrong with a probability of at most EPSILON, which is the bad
    luck of having drawn misleading prompts.

    The promise holds for this model, these exits, this fusion, schedule and sampling, and for prompts from the same
    source. So calibrate with the settings you will serve with. The file keeps them; in Python,
    sled.Calibration.load("calibration.json").policy(lm, ...) gives the exits to serve with, and refuses others.
    """

    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"])] = Path("calibration.json")
    """Write the record to this file."""
    problems: Annotated[int | None, left_out("200")] = None
    """Without prompts of yours: how many of the demo model's own training problems to calibrate on."""
    delta: float = 0.1
    """The mean loss to tolerate, between 0 and 1. Smaller is stricter, and leaves later."""
    epsilon: float = 0.05
    """The probability that the tolerated loss is exceeded after all, between 0 and 1.
    It takes ln(epsilon) / ln(1 - delta) prompts or more: 29 at delta 0.1, epsilon 0.05.
    With a few hundred the choice is not held back by chance."""
    loss: Literal["rouge", "exact"] = "rouge"
    """The distance of a text from the full model's, 0 to 1.
    rouge: 1 - ROUGE-L, the share of tokens that differ or moved. exact: 1 where anything differs, else 0."""
    grid: Annotated[tuple[float, ...] | None, left_out("18 of them, from 0.999 to 0.1")] = None
    """Thresholds to try, 0 to 1, in any order."""
    prompt_options: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    model_options: TextModelOptions = dataclasses.field(default_factory=TextModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    sampling_options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 128
    """The most tokens to make for a prompt."""
    stop: Stop = ()
    batch_size: int = 32
    """Prompts decoded together."""

    def run(self) -> None:
        exits = ExitOptions(exits="early", **{name: getattr(self, name) for name, *_ in EXITS}).settings()
        output = writable("--out", self.out)
        lm, prompts, settings = begin(self, 200)
        record = sled.calibrate(lm, prompts, **exits, **settings, **arguments(self, sled.calibrate))
        record.save(output)
        print(f"{record.table()}\n\n{record.verdict()}")
        print(f"written to {output}", file=sys.stderr)
