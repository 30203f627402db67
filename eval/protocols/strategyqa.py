"""StrategyQA: yes-or-no questions answered after a chain of thought.

Geva et al., TACL 2021, arXiv 2101.02235; data MIT. All 2,290 rows of the published training set are asked, and
answers are read, as in DoLa's and SLED's evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sled.eval.protocols.rows import column

SOURCE = "strategyqa_train.json (in https://storage.googleapis.com/ai2i/strategyqa/data/strategyqa_dataset.zip)"


def row(raw: Mapping, place: str) -> dict:
    """The question, and whether the answer is yes. Raises DataError."""
    return dict(question=column(raw, "question", str, place, SOURCE), answer=column(raw, "answer", bool, place, SOURCE))


def row_with_facts(raw: Mapping, place: str) -> dict:
    """Besides, a solution to show: the row's facts as the chain of thought. Raises DataError."""
    found = row(raw, place)
    facts = " ".join(column(raw, "facts", list, place, SOURCE))
    return dict(found, solution=f"{facts} So the answer is {'yes' if found['answer'] else 'no'}.")


def stated(text: str) -> str | None:
    """The text between the first "answer is" and the next full stop, in lower case; None without "answer is"."""
    _, *after = text.lower().split("answer is")
    return after[0].partition(".")[0].strip() if after else None


def is_yes(text: str) -> bool:
    """The answer that the authors read: yes where "yes" is what is stated; no where anything else is.

    A text that states nothing is taken for no where it contains the letters "no" (as in "know"), and else for yes: an
    empty text is a yes.
    """
    answer = stated(text)
    return "no" not in text.lower() if answer is None else answer == "yes"


def results(doc: Mapping, texts: Sequence[str]) -> dict[str, float]:
    """acc, the authors' accuracy; stated, the share of texts that state yes or no: the rest of acc is chance."""
    return {"acc": float(is_yes(texts[0]) == doc["answer"]), "stated": float(stated(texts[0]) in ("yes", "no"))}
