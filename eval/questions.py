"""Questions with one right number each, for sweeps."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

from sled.demo.problems import problems, prompt
from sled.errors import DataError, SettingError
from sled.eval.numbers import final_answer, right_answer
from sled.settings.brief import brief
from sled.settings.rules import Whole
from sled.train.data.sources import Source


@brief
@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts, the right answer to each, and where they are from, in words. Raises SettingError for none, or unequal
    numbers of them."""

    prompts: tuple[str, ...]
    answers: tuple[int | Fraction, ...]
    source: str

    def __post_init__(self):
        if len(self.prompts) != len(self.answers) or not self.prompts:
            raise SettingError(f"{len(self.prompts)} prompts and {len(self.answers)} answers were given; give as many "
                               "of one as of the other, at least one")

    def right(self, texts: list[str]) -> list[bool]:
        """True for each text that ends with the right answer, behind its first `####`."""
        return [final_answer(text) == answer for text, answer in zip(texts, self.answers, strict=True)]


def demo_questions(count: int) -> Questions:
    """The first `count` held-out problems that come with the bundled model. Raises SettingError."""
    asked = problems("heldout", Whole(1, hint="it counts the problems to ask")("count", count))
    return Questions(tuple(prompt(p.question) for p in asked), tuple(p.answer for p in asked), "held-out word problems")


def read_questions(data: str | Path, *, prompt: str, answer: str, limit: int | None = None) -> Questions:
    """Questions from a file (.jsonl, .json, .parquet, ...), as `sled.train.data.sources.Source` reads it.

    prompt: a column, or a template such as "Question: {question}\\nAnswer:". answer: the column with the right
    answer: a number (54, -1,234, $0.75, 3/4), or a solution that ends with `#### number`, as GSM8K's do; one with other
    numbers beside it is refused rather than misread. limit: the first so many.
    Raises DataError for a file or row that cannot be used, naming it, and SettingError.
    """
    prompts, answers = [], []
    for example in Source(data, prompt=prompt, completion=answer, limit=limit).open():
        right = right_answer(example.body)
        if right is None:
            written = example.body.rpartition("####")[2].strip()
            raise DataError(f"{example.place} has the answer {written[:60]!r}, in which no number stands alone; give "
                            "one such as 54, -1,234, $0.75 or 3/4, by itself or behind the #### that ends a solution")
        prompts.append(example.prompt)
        answers.append(right)
    if not prompts:
        raise DataError(f"{data} holds no questions; give one per line")
    return Questions(tuple(prompts), tuple(answers), f"questions of {Path(data).name}")
