"""`sled generate`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

import sled
from sled.cli.derived import dashed, given, left_out
from sled.cli.devices import ProcessOptions, check_alike, first_process
from sled.cli.exit_options import ExitOptions
from sled.cli.options import (
    ChatOptions,
    FusionOptions,
    PromptOptions,
    SamplingOptions,
    Stop,
    TextModelOptions,
    unescape,
)
from sled.cli.paint import Paint, PaintedRow, has_colours
from sled.errors import PromptError, SettingError
from sled.settings.rules import Whole
from sled.text.prompts import Prompt

if TYPE_CHECKING:
    from sled.results import Stats


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts, the next token decided by the layers together.

    sled generate "Question: Ash buys 6 toys at 10 dollars each. How much is it?\\nAnswer:"

    sled generate -m meta-llama/Llama-3.2-1B --fusion sled --rate 2 --scale 10 "The capital of France is"

    sled generate "Question: A lamp costs 40 euros. Now it is 20% off. What is the price?\\nAnswer:"
    --exits early --exit-layers 2 4 --show-exits

    sled generate -m HuggingFaceTB/SmolLM2-135M-Instruct "What is the capital of Italy?" --chat
    --system "Answer in one word."

    sled generate --calibration calibration.json --file prompts.txt --json > out.jsonl

    One prompt is printed as it grows; several are decoded together, under a progress bar.
    """

    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]],
                       left_out("those of --file or --data", metavar="[PROMPT ...]")] = ()
    """Texts to continue, first or last; a backslash and n stands for a line break.
    One that begins with a dash, or is a number, stands behind --."""
    prompt_options: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    model_options: TextModelOptions = dataclasses.field(default_factory=TextModelOptions)
    process_options: ProcessOptions = dataclasses.field(default_factory=ProcessOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    exit_options: ExitOptions = dataclasses.field(default_factory=ExitOptions)
    sampling_options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 128
    """The most tokens to make for a prompt."""
    stop: Stop = ()
    batch_size: int = 32
    """Prompts decoded together."""
    json: bool = False
    """Print a JSON object per prompt: prompt, text, tokens, exit_layers, finish_reason."""
    show_exits: bool = False
    """Show the layer that emitted each token: colours on a terminal (NO_COLOR turns them off), or else marks."""
    calibration: Path | None = None
    """Leave early as this record of `sled calibrate` says, instead of --exits and --schedule.
    It is refused where model, fusion, sampling, --max-new-tokens or --stop are not those it was made for."""

    def run(self) -> None:
        self.process_options.join()
        texts = self.prompt_options.read(self.prompts)
        if not texts:
            raise PromptError("no prompt was given; write it behind the command, or name a file by --file or --data")
        prompts = self.chat_options.prompts(texts)
        Whole(1, hint="prompts are decoded in batches")("--batch-size", self.batch_size)
        if self.calibration and (chosen := list(map(dashed, given(self.exit_options)))):
            raise SettingError(f"{', '.join(chosen)} and --calibration were both given, but the record says how tokens "
                               "leave, and when; give one of the two")
        exits = self.exit_options.settings()
        record = sled.Calibration.load(self.calibration) if self.calibration else None
        if self.show_exits and (self.json or not (exits or record)):
            raise SettingError("--show-exits shows where tokens left in the text, so it needs --exits early or "
                               "speculate, or --calibration, and goes without --json, whose exit_layers say the same")
        settings = dict(max_new_tokens=self.max_new_tokens, fusion=self.fusion_options.strategy(),
                        stop=[unescape(s) for s in self.stop])
        self.sampling_options.check()
        check_alike(self, prompts=texts)
        lm = self.model_options.load()
        self.chat_options.hint(lm)
        settings["sampling"] = self.sampling_options.chosen(lm)
        if record:
            exits = dict(schedule=record.schedule)
            exits["exits"] = record.policy(lm, **settings, **exits)
        settings |= dict(exits, seed=self.sampling_options.seed)
        paint = None
        if self.show_exits:
            paint = Paint(exits["exits"].exits(lm.config.num_layers), colours=has_colours(sys.stdout))
        marks = paint is not None and not paint.colours  # stand behind whole runs of tokens, which chunks would cut
        if len(prompts) == 1 and not self.json and not marks:
            stats, layers = self._stream(lm, texts[0], prompts[0], settings, paint)
        else:
            stats, layers = self._together(lm, texts, prompts, settings, paint)
        if paint:
            print(paint.legend(layers))
        if first_process():
            print(end_line(stats, lm.config.num_layers, exits=bool(exits)), file=sys.stderr)

    def _stream(self, lm, text: str, prompt: Prompt, settings: dict, paint: Paint | None):
        row = PaintedRow(lm.text.decode, paint) if paint else None
        emitted = []
        chunks = lm.stream(prompt, **settings)  # first, so that no prompt stands before an error
        if not self.chat_options.chat:
            print(text, end="", flush=True)
        for chunk in chunks:
            text, layers = chunk.texts[0], chunk.exit_layers[0]
            print(row.more(text, chunk.tokens[0], layers) if row else text, end="", flush=True)
            emitted += layers
        print()
        return chunk.stats, emitted

    def _together(self, lm, texts: list[str], prompts: list[Prompt], settings: dict, paint: Paint | None):
        out = lm.generate(prompts, batch_size=self.batch_size, progress=len(prompts) > 1 and first_process(),
                          **settings)
        between = "\n" if self.chat_options.chat else ""
        for prompt, text, tokens, layers, reason in zip(texts, out.texts, out.tokens, out.exit_layers,
                                                        out.finish_reasons, strict=True):
            if self.json:
                print(json.dumps(dict(prompt=prompt, text=text, tokens=tokens, exit_layers=layers,
                                      finish_reason=reason), ensure_ascii=False))
            else:
                shown = PaintedRow(lm.text.decode, paint).more(text, tokens, layers) if paint else text
                print(f"{prompt}{between}{shown}\n")
        return out.stats, itertools.chain(*out.exit_layers)


def end_line(stats: Stats, num_layers: int, *, exits: bool) -> str:
    """One line on a generation: its speed, and what exits did where they were used."""
    parts = [f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"]
    if stats.compile_seconds >= 0.1:
        parts[0] += f", besides {stats.compile_seconds:.1f} s of compilation"
    if exits:
        if stats.acceptance is not None:
            parts.append(f"{stats.accepted} of {stats.drafted} drafts accepted ({stats.acceptance:.0%}), "
                         f"{stats.mean_accepted:.2f} per verification")
        else:
            parts.append(f"mean depth {stats.mean_depth:.2f} of {num_layers} layers, {stats.deferred} tokens left "
                         "before the last")
        if stats.held:
            parts.append(f"{stats.held} steps spent waiting for deeper layers")
    return "; ".join(parts)
