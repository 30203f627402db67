"""`sled tune`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated

import tyro

import sled
from sled.cli.derived import arguments, left_out, sets, written
from sled.cli.exit_options import SCHEDULE_OFFERS, exits_written
from sled.cli.options import (
    ChatOptions,
    FusionOptions,
    ModelOptions,
    PromptOptions,
    SamplingOptions,
    Stop,
    begin,
    layers_to_try,
)
from sled.cli.values import Layer, LayerSet
from sled.decoding.options import FULL_DEPTH
from sled.errors import SettingError
from sled.exits import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Tune:
    """Find the fastest way to leave early here, if any: all are timed beside no early exit, on prompts of yours.

    sled tune

    sled tune -m facebook/layerskip-llama3.2-1B --file prompts.txt --exit-layers 4 8 --thresholds 0.8 0.9 --drafts 4 6

    sled tune --file prompts.txt --drafts --batch-size 1

    Every way is timed with every schedule that differs at this batch size, all of them in turn, round by round. What is
    fastest holds for this model, machine and batch size, and for prompts like these. Early exit changes texts: how
    many stay the same is told here, and sled calibrate finds a threshold with a guarantee. A model that was not
    trained for early exits gains nothing by either.
    """

    problems: Annotated[int | None, left_out("16")] = None
    """Without prompts of yours: how many of the demo model's own training problems to take."""
    exit_layers: Annotated[tuple[LayerSet, ...] | None, sets(sled.EarlyExit, "layers"),
                           left_out("the two that promise most, by sled layers")] = None
    """Early exit: after which layers, each a setting; with commas, several at once: 2 4 2,4."""
    thresholds: Annotated[tuple[float, ...], sets(sled.EarlyExit, "threshold")] = (0.9,)
    """Early exit: how sure an exit must be. Nothing behind the option: no early exit is tried."""
    draft_layers: Annotated[tuple[Layer, ...] | None, sets(sled.SelfSpeculation, "layer"),
                            left_out("the two that promise most, by sled layers")] = None
    """Self-speculation: after which layer to draft, each a setting."""
    drafts: Annotated[tuple[int, ...], sets(sled.SelfSpeculation, "draft")] = (6,)
    """Self-speculation: how many tokens to draft. Nothing behind the option: none is tried."""
    draft_first_ids: Annotated[tuple[int, ...], sets(sled.SelfSpeculation, "first_ids")] = ()
    """Self-speculation: to draft from so many of the first token ids, each a setting beside all of them."""
    rounds: int = 5
    """Rounds of timing; the fastest counts."""
    prompt_options: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    sampling_options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 128
    """The most tokens to make for a prompt."""
    stop: Stop = ()
    batch_size: int = 32
    """Prompts decoded together."""

    def run(self) -> None:
        if not self.thresholds and not self.drafts:
            raise SettingError("nothing is left to try: give --thresholds or --drafts")
        for threshold in self.thresholds:  # for their errors, before any work
            sled.EarlyExit(1, threshold)
        for draft, ids in itertools.product(self.drafts, (None, *self.draft_first_ids)):
            sled.SelfSpeculation(1, draft, first_ids=ids)
        lm, prompts, settings = begin(self, 16)
        near = ()
        if None in (self.exit_layers if self.thresholds else (), self.draft_layers if self.drafts else ()):
            near = layers_to_try(lm, prompts, 2, self.max_new_tokens)
        exits = [*(sled.EarlyExit(layers, threshold) for layers in self.exit_layers or near
                   for threshold in self.thresholds),
                 *(sled.SelfSpeculation(layer, draft, first_ids=ids) for layer, draft, ids in itertools.product(
                     self.draft_layers or near, self.drafts, (None, *self.draft_first_ids)))]
        tuned = sled.tune(lm, prompts, exits=exits, **settings, **arguments(self, sled.tune))
        print(tuned.table())
        print(f"\nfastest here: {fastest(tuned)}\n{tuned.verdict()}")


def fastest(tuned) -> str:
    """The way as options of sled generate."""
    if tuned.exits == FULL_DEPTH:
        return "no early exit"
    [schedule] = [word for word, kind in SCHEDULES.items() if type(tuned.schedule) is kind]
    return " ".join([exits_written(tuned.exits), "--schedule", schedule,
                     *written(tuned.schedule, SCHEDULE_OFFERS[schedule])])
