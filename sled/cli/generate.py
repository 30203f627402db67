"""`sled generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from sled.cli.options import FusionOptions, ModelOptions, SamplingOptions, read_prompts, unescape


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts, the next token decided by the layers together.

    sled generate "Question: Ash buys 6 toys at 10 dollars each. How much is it?\\nAnswer:"
    sled generate -m meta-llama/Llama-3.2-1B --fusion sled --rate 2 --scale 10 "The capital of France is"
    sled generate --file prompts.txt --json > out.jsonl

    One prompt is printed as it grows; several are decoded together, under a progress bar.
    """

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to continue; a backslash and n stands for a line break."""
    file: Path | None = None
    """Read one prompt per line from this file instead (-: standard input)."""
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    sampling_options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 128
    """The most tokens to make for a prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a text."""
    batch_size: int = 32
    """Prompts decoded together."""
    json: bool = False
    """Print a JSON object per prompt: prompt, text, tokens, finish_reason."""

    def run(self) -> None:
        prompts = read_prompts(self.prompts, self.file)
        settings = dict(max_new_tokens=self.max_new_tokens, fusion=self.fusion_options.strategy(),
                        sampling=self.sampling_options.sampling(), seed=self.sampling_options.seed,
                        stop=[unescape(s) for s in self.stop])
        lm = self.model_options.load()
        if len(prompts) == 1 and not self.json:
            self._stream(lm, prompts[0], settings)
            return
        out = lm.generate(prompts, batch_size=self.batch_size, progress=len(prompts) > 1, **settings)
        for prompt, text, tokens, reason in zip(prompts, out.texts, out.tokens, out.finish_reasons, strict=True):
            if self.json:
                print(json.dumps(dict(prompt=prompt, text=text, tokens=tokens, finish_reason=reason),
                                 ensure_ascii=False))
            else:
                print(f"{prompt}{text}\n")
        print(f"{out.stats.new_tokens} tokens, {out.stats.tokens_per_second:.1f} tokens/s, compilation included",
              file=sys.stderr)

    def _stream(self, lm, prompt: str, settings: dict) -> None:
        chunks = lm.stream(prompt, **settings)  # first, so that no prompt stands before an error
        print(prompt, end="", flush=True)
        for chunk in chunks:
            print(chunk.texts[0], end="", flush=True)
        print()
