"""`sled score`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro

from sled.cli.derived import arguments, left_out
from sled.cli.line import Sets
from sled.cli.options import ChatOptions, FusionOptions, ModelOptions, unescape, whole_rows
from sled.errors import PromptError


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of continuations of a prompt, most likely first; or of every row of a file.

    sled score "Question: What is 2 times 3?\\nAnswer:" " 2*3=6" " 2*3=5" --fusion sled

    sled score -m HuggingFaceTB/SmolLM2-135M-Instruct --chat "What is the capital of Italy?" Rome Paris

    sled score --data rows.jsonl --prompt "Question: {question}\\nAnswer:" --continuation " {answer}" --json > out.jsonl

    What counts as likely: the sum over a continuation's tokens. A longer one is less likely by its length alone.
    """

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]],
                     left_out("the rows of --data", metavar="[PROMPT CONTINUATION ...]")] = ()
    """The text before, and the texts to score after it; mind their leading space, which --chat does not need.
    A backslash and n stands for a line break."""
    data: Annotated[str | None, left_out("none", metavar="PATH")] = None
    """A file with a prompt and a continuation in each row (.jsonl, .json, .parquet, ...), a folder or a hub data set.
    Rows of one prompt need not stand together: it is computed once."""
    prompt: str = "prompt"
    """--data: the column of prompts, or a template such as "Question: {question}\\nAnswer:"."""
    continuation: Annotated[str, Sets(("Source.completion",))] = "continuation"
    """--data: the column of continuations, or a template such as " {answer}"."""
    limit: Annotated[int | None, left_out("all")] = None
    """--data: read so many rows, the first."""
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    batch_size: int = 16
    """Continuations scored together."""
    json: bool = False
    """Print one JSON object per continuation, in the order given, with each token's log-probability."""

    def run(self) -> None:
        strategy = self.fusion_options.strategy()
        pairs = self._pairs()
        prompts = self.chat_options.prompts([prompt for prompt, _ in pairs])
        lm = self.model_options.load()
        self.chat_options.hint(lm)
        scores = lm.score(prompts, [text for _, text in pairs], fusion=strategy, batch_size=self.batch_size,
                          progress=self.data is not None)
        rows = list(zip(pairs, scores.tokens, scores.logprobs, scores.totals, scores.greedy, scores.left_out,
                        strict=True))
        if self.json:
            for (prompt, text), tokens, logprobs, total, greedy, left_out in rows:
                print(json.dumps(dict(prompt=prompt, continuation=text, tokens=tokens, logprobs=logprobs, total=total,
                                      greedy=greedy, left_out=left_out), ensure_ascii=False))
            return
        of_prompt: dict[str, list] = {}
        for row in rows:
            of_prompt.setdefault(row[0][0], []).append(row)
        for prompt, its_rows in of_prompt.items():
            if self.data is not None:
                print(repr(prompt))
            print("  log-prob   tokens  greedy  continuation")
            for (_, text), tokens, _, total, greedy, left_out in sorted(its_rows, key=lambda row: -row[3]):
                mark = "*" if any(left_out) else " "
                print(f"{total:10.3f}{mark}  {len(tokens):6d}  {'yes' if greedy else 'no':>6}  {text!r}")
        if any(map(any, scores.left_out)):
            print(f"* has tokens outside those that {self.fusion_options.fusion} keeps, each of which counts as its "
                  f"lower bound, a logit of {strategy.lower_bound:g}: no log-probability, but a sign of their number.")

    def _pairs(self) -> list[tuple[str, str]]:
        """(prompt, continuation) of each row."""
        if self.data is None:
            if len(self.texts) < 2:
                lacks = "continuation" if self.texts else "prompt"
                raise PromptError(f"no {lacks} was given; write a prompt and its continuations behind the command, or "
                                  "name a file by --data")
            prompt, *texts = map(unescape, self.texts)
            return [(prompt, text) for text in texts]
        if self.texts:
            raise PromptError("texts were given both as arguments and by --data; give one of the two")
        from sled.train.data.sources import Source

        columns = dict(prompt=unescape(self.prompt), completion=unescape(self.continuation))
        source = Source(**arguments(self, Source) | columns)
        return [(example.prompt, example.body) for example in whole_rows(source, "continuation")]
