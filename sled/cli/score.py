"""`sled score`."""

from __future__ import annotations

import dataclasses
import json

import tyro

from sled.cli.options import ChatOptions, FusionOptions, ModelOptions, unescape


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of continuations of one prompt, most likely first.

    sled score "Question: What is 2 times 3?\\nAnswer:" " 2*3=6" " 2*3=5" --fusion sled

    sled score -m HuggingFaceTB/SmolLM2-135M-Instruct --chat "What is the capital of Italy?" Rome Paris
    """

    prompt: tyro.conf.Positional[str]
    """The text before; a backslash and n stands for a line break."""
    continuations: tyro.conf.Positional[tuple[str, ...]]
    """Texts to score after it; mind the leading space, which --chat does not need."""
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    json: bool = False
    """Print one JSON object per continuation, in the order given, with each token's log-probability."""

    def run(self) -> None:
        strategy = self.fusion_options.strategy()
        [prompt] = self.chat_options.prompts([unescape(self.prompt)])
        lm = self.model_options.load()
        self.chat_options.hint(lm)
        texts = [unescape(c) for c in self.continuations]
        scores = lm.score(prompt, texts, fusion=strategy)
        if self.json:
            for text, tokens, logprobs, total, greedy in zip(
                    texts, scores.tokens, scores.logprobs, scores.totals, scores.greedy, strict=True):
                print(json.dumps(dict(continuation=text, tokens=tokens, logprobs=logprobs, total=total, greedy=greedy),
                                 ensure_ascii=False))
            return
        print("  log-prob  tokens  greedy  continuation")
        for i in sorted(range(len(texts)), key=lambda i: -scores.totals[i]):
            print(f"{scores.totals[i]:10.3f}  {len(scores.tokens[i]):6d}  {'yes' if scores.greedy[i] else 'no':>6}  "
                  f"{texts[i]!r}")
