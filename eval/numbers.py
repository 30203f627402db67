"""The final answer of a worked solution, and whether it is the right one.

Solutions end as GSM8K's do: `#### 54`. What stands after the last `####` is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from sled.errors import SettingError

# As it stands alone in data: commas before groups of three only, and an exponent, which JSON's small floats have; of
# three digits at most, as a longer one would fill the memory.
_ALONE = re.compile(r"\s*\$?\s*(-?)\s*\$?\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?)"
                    r"([eE][-+]?[0-9]{1,3})?\s*")
_NUMBER = re.compile(r"\s*\$?\s*(-?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?)([eE][-+]?\d{1,3}(?!\d))?")


def final_answer(text: str) -> Fraction | None:
    """The number after the last `####`, or None where there is none: an earlier `####` does not count then.

    Spaces, a dollar sign, thousands separators and trailing text do not matter; a decimal is exact, and an exponent
    counts: what `right_answer` takes is read alike here.
    """
    _, mark, rest = text.rpartition("####")
    found = _NUMBER.match(rest)
    if not mark or not found:
        return None
    return Fraction("".join(found.groups("")).replace(",", ""))


def right_answer(text: str) -> Fraction | None:
    """The number that data give as right: all of the text, or all that stands after its last `####`; else None.

    Stricter than `final_answer`, which reads what a model wrote: a number misread here would judge every method
    wrongly. No fractions such as 3/4, of which `final_answer` would read the 3.
    """
    found = _ALONE.fullmatch(text.rpartition("####")[2])
    return found and Fraction("".join(found.groups("")).replace(",", ""))


def exact_match(texts: Sequence[str], answers: Sequence[int]) -> float:
    """Share of texts whose final answer equals the right one.

    Raises SettingError unless there are as many texts as answers, and some.
    """
    if len(texts) != len(answers) or not answers:
        raise SettingError(f"{len(texts)} texts and {len(answers)} answers given; "
                           "give as many of one as of the other, at least one")
    right = [final_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
    return sum(right) / len(right)
