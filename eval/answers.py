"""The final answer of a worked solution, and whether it is the right one.

Solutions end as GSM8K's do: `#### 54`. What stands after the last `####` is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from sled.errors import SettingError

_NUMBER = re.compile(r"\s*\$?\s*(-?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?)")


def final_answer(text: str) -> Fraction | None:
    """The number after the last `####`, or None where there is none: an earlier `####` does not count then.

    Spaces, a dollar sign, thousands separators and trailing text do not matter; a decimal is exact.
    """
    _, mark, rest = text.rpartition("####")
    found = _NUMBER.match(rest)
    if not mark or not found:
        return None
    sign, digits = found.groups()
    return Fraction(sign + digits.replace(",", ""))


def exact_match(texts: Sequence[str], answers: Sequence[int]) -> float:
    """Share of texts whose final answer equals the right one.

    Raises SettingError unless there are as many texts as answers, and some.
    """
    if len(texts) != len(answers) or not answers:
        raise SettingError(f"{len(texts)} texts and {len(answers)} answers given; "
                           "give as many of one as of the other, at least one")
    right = [final_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
    return sum(right) / len(right)
