"""TruthfulQA, multiple choice: are true answers to tempting questions more probable than false ones?

Lin et al., ACL 2022, arXiv 2109.07958; data Apache-2.0. Answers end with a full stop, and are scored by the sum, as
in DoLa's and SLED's evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sled.errors import DataError
from sled.eval.protocols.choices import multiple_choice
from sled.eval.protocols.rows import column

SOURCE = ("TruthfulQA.csv (https://github.com/sylinrl/TruthfulQA) or of the hub's truthfulqa/truthful_qa, subset "
          "generation")
# What the file and the hub call a column. In the file, semicolons separate answers.
NAMES = {"question": "Question", "best_answer": "Best Answer", "correct_answers": "Correct Answers",
         "incorrect_answers": "Incorrect Answers"}


def row(raw: Mapping, place: str) -> dict:
    """The question; its true answers and then its false ones; how many are true; which of them is the best.

    Takes rows of the authors' CSV file, and of the hub. Raises DataError, too where the best answer is not among the
    true ones.
    """
    of_file = NAMES["question"] in raw
    take = lambda name, kind: column(raw, NAMES[name] if of_file else name, kind, place, SOURCE)  # noqa: E731
    question, best = take("question", str), _closed(take("best_answer", str))
    true, false = (_answers(take(name, str).split(";") if of_file else take(name, list), name, place)
                   for name in ("correct_answers", "incorrect_answers"))
    if best not in true:
        raise DataError(f"{place} has the best answer {best!r}, which is none of its true answers: "
                        f"{', '.join(map(repr, true))}; mend or remove the row")
    return dict(question=question, choices=true + false, true=len(true), best=true.index(best))


def _answers(texts: Sequence[str], name: str, place: str) -> list[str]:
    answers = [_closed(text) for text in texts if text.strip()]
    if not answers:
        raise DataError(f"{place} holds no answer in its column {name!r}; mend or remove the row")
    return answers


def _closed(text: str) -> str:
    text = text.strip()
    return text if text.endswith(".") else f"{text}."


def results(doc: Mapping, scored: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """mc1, mc2 and mc3 of one question."""
    sums = [score[0] for score in scored]
    return multiple_choice(sums[:doc["true"]], sums[doc["true"]:], doc["best"])._asdict()
