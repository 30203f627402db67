"""Where a text's answer stands: the rules by which it is found. What stands there is read by `sled.eval.numbers`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from sled.eval.numbers import decimal, every_number, final_answer, read

STATED = re.compile("the answer is", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Extraction(NamedTuple):
    """A rule. find: the answer of a text, or None; where: the place in words; form: an answer as the rule finds it."""

    find: Callable[[str], Fraction | None]
    where: str
    form: str


def stated(text: str) -> Fraction | None:
    """The first number behind the first "the answer is", before a second one."""
    _, *behind = STATED.split(text)
    return next(every_number(behind[0]), None) if behind else None


def boxed(text: str) -> Fraction | None:
    """What the text's last \\boxed{} holds."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    depth, held = 1, text[boxes[-1].end():]
    for at, letter in enumerate(held):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            found = read(held[:at])
            return found and found.value
    return None


def last(text: str) -> Fraction | None:
    """The text's last number."""
    return next(reversed(list(every_number(text))), None)


# The first two are named as the harness names its filters for GSM8K.
RULES = {
    "strict-match": Extraction(final_answer, "the number behind the first ####", "#### {}"),
    "flexible-extract": Extraction(last, "the last number", "{}"),
    "answer-is": Extraction(stated, 'the first number behind "the answer is"', "The answer is {}."),
    "boxed": Extraction(boxed, r"the number in the last \boxed{}", r"\boxed{{{}}}"),
}


def demonstration(rule: str, solution: str, answer: Fraction) -> str:
    """The solution as an example to show a model, ending as the rule finds answers."""
    return solution if RULES[rule].find(solution) == answer else "\n".join(filter(None, [
        solution.rpartition("####")[0].rstrip(), RULES[rule].form.format(decimal(answer))]))
