"""GSM8K: word problems answered after a chain of thought.

Cobbe et al. 2021, arXiv 2110.14168; data MIT. The reference is read by this library's grammar (`sled.eval.numbers`).
Models' answers are read as in DoLa's and SLED's evaluation, so that figures compare, and beside it by math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sled.errors import DataError
from sled.eval.numbers import decimal, letters, right_answer
from sled.eval.protocols.rows import column

SOURCE = "GSM8K (the hub's openai/gsm8k, subset main)"
CALCULATION = re.compile(r"<<.*?>>")
TRIGGER = re.compile("the answer is", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+\.?\d*")


def row(raw: Mapping, place: str) -> dict:
    """The question, the answer's number, and the solution to show in a prompt. Raises DataError.

    The solution is the row's own, in one line, without its calculator marks, ending as the authors' demonstrations do.
    """
    question, answer = (column(raw, name, str, place, SOURCE) for name in ("question", "answer"))
    steps, mark, _ = answer.rpartition("####")
    value = right_answer(answer) if mark else None
    if value is None:
        raise DataError(f"{place} has an answer without one clear number behind ####: ...{answer[-40:]!r}; give data "
                        f"with the columns of {SOURCE}")
    number, steps = decimal(value), " ".join(CALCULATION.sub("", steps).split())
    return dict(question=question, number=number, solution=f"{steps} The answer is {number}.")


def answer_part(text: str) -> tuple[str, bool]:
    """The text between the first "the answer is" and a second one, and True; without any, the whole text and False."""
    _, *after = TRIGGER.split(text)
    return (after[0], True) if after else (text, False)


def stated_number(text: str) -> str | None:
    """The number that the authors read: the first after "the answer is", without it the text's last; None if none.

    Thousands separators and a full stop behind it are left out; "18.0" stays what it is.
    """
    part, triggered = answer_part(text)
    numbers = NUMBER.findall(part.replace(",", ""))
    return numbers[0 if triggered else -1].removesuffix(".") if numbers else None


def same_value(number: str, text: str) -> bool:
    """True if math-verify finds `number` in the text's answer; another spelling of it is right too.

    Digits and signs of other scripts, and the dollars and commas that LaTeX escapes, it does not know itself.
    """
    from math_verify import parse, verify  # not needed for the rest

    part = letters(answer_part(text)[0]).replace("{,}", ",").replace(r"\$", "$")
    return verify(parse(number), parse(part))


def results(doc: Mapping, texts: Sequence[str]) -> dict[str, float]:
    """acc: the number read equals the reference as a string, as the authors compare. acc_math_verify: as a value."""
    return {"acc": float(stated_number(texts[0]) == doc["number"]),
            "acc_math_verify": float(same_value(doc["number"], texts[0]))}
