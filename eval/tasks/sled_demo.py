"""The data and the reading of answers of the task `sled_demo`."""

import datasets

from sled.demo import problems as demo
from sled.eval.numbers import final_answer
from sled.settings.rules import Whole

NONE = "[invalid]"  # what the harness's own filters give where a text holds no answer


def dataset(problems: int, seed: int, **_) -> datasets.DatasetDict:
    """The first `problems` held-out problems of random stream `seed`, as the split "test". Raises SettingError."""
    problems = Whole(1, hint="it counts the problems to ask (--metadata problems=200)")("problems", problems)
    rows = [{"question": p.question, "solution": p.solution, "answer": str(p.answer)}
            for p in demo.problems("heldout", problems, seed=seed)]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))


def answers(texts: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The final answer of every text, as the harness's filters have it: a list of texts per document."""
    found = [[final_answer(text) for text in of_one] for of_one in texts]
    return [[NONE if answer is None else str(answer) for answer in of_one] for of_one in found]
