"""The rules by which a text's answer is found."""

from fractions import Fraction

import pytest

from sled.eval.extraction import RULES, demonstration

TEXT = "3 of 4. #### 12 apples\nThe answer is $1,5. \\boxed{7} and \\boxed{\\frac{1}{2}} in 9 steps. The answer is 8."


@pytest.mark.parametrize(("rule", "text", "value"), [
    ("strict-match", TEXT, 12), ("flexible-extract", TEXT, 8), ("answer-is", TEXT, Fraction("1.5")),
    ("boxed", TEXT, Fraction(1, 2)),
    ("strict-match", "The answer is 5", None), ("flexible-extract", "none", None), ("answer-is", "#### 5", None),
    ("boxed", "#### 5", None),
    ("flexible-extract", "18 - 3 = \u221215", -15), ("flexible-extract", "It is **9{,}500**.", 9500),
    ("flexible-extract", "\\$18 a day", 18), ("flexible-extract", "about 12-15", 15),
    ("answer-is", "The answer is that she pays \u20ac5 of 9.", 5), ("answer-is", "THE ANSWER IS: -3", -3),
    ("answer-is", "The answer is none. The answer is 5.", None),
    ("boxed", "\\boxed{\\text{18 dollars}}", 18), ("boxed", "\\fbox{18}", 18), ("boxed", "\\boxed{18", None),
    ("boxed", "\\boxed{12 or 13}", None), ("boxed", "\\boxed {x = 1{,}000}", 1000), ("boxed", "\\boxed{}", None),
])
def test_rules(rule, text, value):
    assert RULES[rule].find(text) == value


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("solution", "value"), [
    ("1+1=2\n#### 2", 2), ("2", 2), ("#### 1,234.5", Fraction("1234.5")), ("so 4\n#### 1/3", Fraction(1, 3)),
    ("-3", -3),
])
def test_a_demonstration_ends_as_its_rule_finds_answers(rule, solution, value):
    shown = demonstration(rule, solution, Fraction(value))
    assert RULES[rule].find(shown) == value and shown.count("####") <= 1
