"""Questions with one right number each, for sweeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from sled.decoding.options import stop_strings
from sled.demo.problems import problems, prompt
from sled.errors import DataError, SettingError
from sled.eval.extraction import RULES, demonstration
from sled.eval.numbers import right_answer
from sled.settings.brief import brief
from sled.settings.rules import OneOf, Whole
from sled.text.chat import Chat
from sled.text.prompts import Prompt
from sled.train.data.sources import Example, Source, template_parts

EXTRACT = OneOf(tuple(RULES), hint="it says where a text's answer stands")
STRICT = next(iter(RULES))


@brief
@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts, the right answer to each, and where they are from, in words.

    extract: the rule of `sled.eval.extraction` by which a text's answer is found. stop: strings that end an answer,
    such as what a next question would begin with. first_row: the number of the first question in its data, from 1; the
    others follow it. template: what the prompts were made by. Raises SettingError for no questions, or unequal numbers
    of them.
    """

    prompts: tuple[Prompt, ...]
    answers: tuple[int | Fraction, ...]
    source: str
    extract: str = STRICT
    stop: tuple[str, ...] = ()
    first_row: int = 1
    template: str | None = None

    def __post_init__(self):
        if len(self.prompts) != len(self.answers) or not self.prompts:
            raise SettingError(f"{len(self.prompts)} prompts and {len(self.answers)} answers were given; give as many "
                               "of one as of the other, at least one")
        EXTRACT("extract", self.extract)
        object.__setattr__(self, "stop", tuple(stop_strings(self.stop)))

    @property
    def form(self) -> str:
        """How the questions are put, in words: the template, and of chats the system message and the variables."""
        said = [f"put as {self.template!r}"] * (self.template is not None)
        if isinstance(chat := self.prompts[0], Chat):
            said.append("in the model's chat template")
            said += [f"behind the system message {chat.messages[0]['content']!r}"] * (
                chat.messages[0]["role"] == "system")
            said += [f"with {name} = {value!r}" for name, value in chat.variables.items()]
        return ", ".join(said)

    def found(self, texts: Sequence[str]) -> list[Fraction | None]:
        """The answer of each text, read before the first stop string, or None where none can be read."""
        ends = [min((at for at in map(text.find, self.stop) if at >= 0), default=None) for text in texts]
        return [RULES[self.extract].find(text[:end]) for text, end in zip(texts, ends, strict=True)]

    def right(self, texts: Sequence[str]) -> list[bool]:
        """True for each text whose answer is the right one."""
        return [found == answer for found, answer in zip(self.found(texts), self.answers, strict=True)]


def demo_questions(count: int) -> Questions:
    """The first `count` held-out problems that come with the bundled model. Raises SettingError."""
    asked = problems("heldout", Whole(1, hint="it counts the problems to ask")("count", count))
    return Questions(tuple(prompt(p.question) for p in asked), tuple(p.answer for p in asked), "held-out word problems",
                     stop=("Question:",), template=prompt("{question}"))


def read_questions(data: str | Path, *, prompt: str, answer: str, limit: int | None = None, extract: str = STRICT,
                   num_fewshot: int = 0, fewshot: str | Path | None = None) -> Questions:
    """Questions from a file (.jsonl, .json, .parquet, ...), as `sled.train.data.sources.Source` reads it.

    prompt: a column, or a template such as "Question: {question}\\nAnswer:"; what stands before its first column also
    ends answers, for there a model that goes on invents the next question. answer: the column with the right
    answer: a number (54, -1,234, $0.75, 3/4), or a solution that ends with `#### number`, as GSM8K's do; one with other
    numbers beside it is refused rather than misread. limit: the first so many.
    extract: the rule by which a text's answer is found: `sled.eval.extraction` has them.
    num_fewshot: so many solved questions stand before each, with blank lines between: the first rows of `fewshot`, a
    file with the same columns, or without it of `data`, where they are not asked then. Their answers end as `extract`
    finds them.
    Raises DataError for a file or row that cannot be used, naming it, and SettingError.
    """
    EXTRACT("extract", extract)
    num_fewshot = Whole(0, hint="it counts the solved questions that are shown")("num_fewshot", num_fewshot)
    if fewshot is not None and not num_fewshot:
        raise SettingError(f"fewshot is {str(fewshot)!r}, but num_fewshot is 0, so nothing of it is shown; give a "
                           "number, or leave it out")
    if limit is not None:
        limit = Whole(1, hint="it counts the questions to ask")("limit", limit)
    rows = iter(Source(data, prompt=prompt, completion=answer).open())
    shown = rows if fewshot is None else iter(Source(fewshot, prompt=prompt, completion=answer).open())
    shots = [_shot(example, extract) for example in itertools.islice(shown, num_fewshot)]
    if len(shots) < num_fewshot:
        raise DataError(f"{data if fewshot is None else fewshot} holds {len(shots)} rows, but num_fewshot is "
                        f"{num_fewshot}; show fewer, or give more rows")
    asked = [(example.prompt, _right(example)) for example in itertools.islice(rows, limit)]
    if not asked:
        beside = f" beside the {num_fewshot} that are shown" if shots and fewshot is None else ""
        raise DataError(f"{data} holds no questions{beside}; give one per line")
    prompts, answers = zip(*asked, strict=True)
    source = f"questions of {Path(data).name}"
    source += f" behind {num_fewshot} solved ones" * bool(shots) + f" of {Path(fewshot or data).name}" * bool(fewshot)
    return Questions(tuple("".join(shots) + each for each in prompts), answers, source, extract, next_question(prompt),
                     1 if fewshot else 1 + num_fewshot, prompt)


def next_question(template: str) -> tuple[str, ...]:
    """What a text that goes on behind its answer would begin the next question with: the last words in `template`
    before its first column, in one line; none where it begins with that column."""
    head = ""
    for literal, column in template_parts("prompt", template):
        head += literal
        if column is not None:
            break
    lines = [line.strip() for line in head.splitlines() if any(map(str.isalpha, line))]
    return tuple(lines[-1:])


def _right(example: Example) -> Fraction:
    right = right_answer(example.body)
    if right is None:
        written = example.body.rpartition("####")[2].strip()
        raise DataError(f"{example.place} has the answer {written[:60]!r}, in which no number stands alone; give "
                        "one such as 54, -1,234, $0.75 or 3/4, by itself or behind the #### that ends a solution")
    return right


def _shot(example: Example, extract: str) -> str:
    """A solved question, and a blank line."""
    gap = "" if example.prompt[-1:].isspace() else " "
    return f"{example.prompt}{gap}{demonstration(extract, example.body.strip(), _right(example))}\n\n"
