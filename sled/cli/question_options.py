"""Options for questions with right answers, which measurements ask."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from sled.cli.line import Sets, dashed
from sled.cli.options import unescape
from sled.errors import PromptError
from sled.eval.extraction import RULES

EXTRACT_HELP = "What counts as a text's answer.\n" + "\n".join(f"{word}: {rule.where}." for word, rule in RULES.items())


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """Questions with their right answers."""

    data: str | None = None
    """Questions of your own: a file of JSON lines, or what else sled train reads."""
    prompt: str | None = None
    """--data: the prompt, a column or a template such as "Question: {question}\\nAnswer:"."""
    answer: Annotated[str | None, Sets(("Source.completion",))] = None
    """--data: the column with the right answer, a number such as 54, -1,234 or $0.75, or a solution that ends with ####
    and a number."""
    num_fewshot: int = 0
    """--data: how many solved questions to show before each; they are the first of --fewshot, or of --data, where they
    are not asked then. A model that was not trained to end with #### and a number needs some to see it."""
    fewshot: str | None = None
    """--num-fewshot: the file of the solved questions, with the columns of --data."""
    extract: Annotated[Literal[tuple(RULES)], tyro.conf.arg(help=EXTRACT_HELP)] = next(iter(RULES))

    def read(self, model: str, count: int | None, usual: int):
        """`count` questions: the first of the file, or all; without a file, problems of the demo model, `usual` where
        count is None. Raises PromptError where neither can be had, and what reading a file raises."""
        from sled.eval.questions import demo_questions, read_questions

        if self.data is None:
            for option in ("prompt", "answer", "num_fewshot", "fewshot"):
                if getattr(self, option):
                    raise PromptError(f"{dashed(option)} is for --data, which was not given; name a file by --data")
            if model != "demo":
                raise PromptError(f"no questions were given for {model}: only the demo model comes with some of its "
                                  "own; name a file by --data, with --prompt and --answer")
            return dataclasses.replace(demo_questions(usual if count is None else count), extract=self.extract)
        if self.prompt is None or self.answer is None:
            raise PromptError("--data was given without --prompt or --answer; say which columns hold the question and "
                              "the right answer")
        return read_questions(self.data, prompt=unescape(self.prompt), answer=self.answer, limit=count,
                              extract=self.extract, num_fewshot=self.num_fewshot, fewshot=self.fewshot)
