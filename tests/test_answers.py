from fractions import Fraction

import pytest

from sled.demo.problems import problems
from sled.errors import SettingError
from sled.eval.numbers import exact_match, final_answer, right_answer


@pytest.mark.parametrize("text, answer", [
    ("Cost: 6*10=60\n#### 54", 54),
    ("####54", 54),
    ("####   $1,234 dollars", 1234),
    ("#### -3", -3),
    ("#### 54.", 54),
    ("#### 54.00", 54),
    ("#### 5\nQuestion: ...\n#### 7", 7),
    ("#### 54\n#### none", None),
    ("#### 54\n####", None),
    ("#### 1.5e3 apples", 1500),
    ("#### 2e12345", 2),
    ("54", None),
    ("the answer is 54", None),
    ("####", None),
    ("#### none", None),
    ("", None),
])
def test_the_number_after_the_last_mark(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("54", 54), (" $1,234.50 ", Fraction("1234.5")), ("-$3", -3), ("54.", 54), ("1e-05", Fraction(1, 100_000)),
    ("1.5e3", 1500), ("2E+22", 2 * 10**22), ("6*10=60\n#### 1,234,567\n", 1_234_567), ("#### 1\n#### 2", 2),
    ("3/4", None), ("1 000", None), ("12 or 13", None), ("\u22123", None), ("7%", None), ("1,5", None), ("10,00", None),
    ("1,234e5e6", None), ("1e9999", None), ("nan", None), ("\u0663", None), ("", None), ("#### 54 apples", None),
    ("54\n####", None),
])
def test_a_right_answer_is_a_number_alone(text, answer):
    assert right_answer(text) == answer
    if answer is not None:
        assert final_answer(text if "####" in text else f"#### {text}") == answer


def test_every_generated_solution_gives_its_answer():
    batch = problems("heldout", 200)
    assert exact_match([p.solution for p in batch], [p.answer for p in batch]) == 1


def test_exact_match_counts_right_answers():
    assert exact_match(["#### 1", "#### 2", "no", "#### 5"], [1, 3, 4, 5]) == 0.5


@pytest.mark.parametrize("texts, answers", [([], []), (["#### 1"], [1, 2])])
def test_exact_match_needs_as_many_texts_as_answers(texts, answers):
    with pytest.raises(SettingError, match="answers given"):
        exact_match(texts, answers)
