"""Numbers as people and models write them: the table of the grammar, and the rules by which answers are found."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sled.eval.numbers import decimal, every_number, final_answer, plain, read, right_answer

HALF = Fraction(1, 2)

# What stands alone, in data and behind ####: both are read alike.
ALONE = [
    ("72", 72), ("72.", 72), (" 72\n", 72), ("0", 0), ("007", 7), ("72.00", 72), ("72,", 72), ("72!", 72),
    # thousands
    ("1,234", 1234), ("9{,}500", 9500), (r"9\,500", 9500), (r"1{,}234{,}567.5", Fraction("1234567.5")),
    ("1\u2009234\u2009567", 1234567), ("1\u202f234", 1234), ("1\xa0234,5", Fraction("1234.5")), ("12 345", 12345),
    ("1'234'567", 1234567), ("1\u2019234", 1234), ("1_000", 1000), ("12,34,567", 1234567), ("1.234.567", 1234567),
    ("1.234,56", Fraction("1234.56")), ("1,234.56", Fraction("1234.56")), ("$9{,}500$", 9500), (r"10,\!000", 10000),
    # decimals
    ("0.5", HALF), (".5", HALF), ("-.5", -HALF), ("1.234", Fraction("1.234")), ("1,5", Fraction("1.5")), ("10,00", 10),
    ("0,125", Fraction(1, 8)), ("3,14159", Fraction("3.14159")), ("54.0", 54),
    # signs
    ("-3", -3), ("\u22123", -3), ("\u20133", -3), ("\uff0d3", -3), ("+3", 3), ("- 3", -3), ("-$3", -3), ("$-3", -3),
    ("(-3)", -3), ("\u2212\u20ac3", -3),
    # currencies and units
    ("$18", 18), (r"\$18", 18), ("$ 1,234.50", Fraction("1234.5")), ("18$", 18), ("\u20ac5", 5), ("5 \u20ac", 5),
    ("\u00a35", 5), ("\u00a5500", 500), ("\u20b91,23,456", 123456), ("Rs. 500", 500), ("Rs 500/-", 500),
    ("US$5", 5), ("USD 5", 5), ("5 EUR", 5), ("\uff045", 5), ("7%", 7), (r"7\%", 7), ("7 percent", 7),
    ("12.5 %", Fraction("12.5")), ("54 apples", 54), ("54cm", 54), ("54 cm^2", 54), ("54 m\u00b2", 54),
    ("90\u00b0", 90),
    (r"54\text{ dollars}", 54), ("$1.5 million", 1500000), ("2 thousand", 2000), ("5 dozen", 5), ("18-year-old", 18),
    # marks
    ("**42**", 42), ("*42*", 42), ("__42__", 42), ("`42`", 42), ('"42"', 42), ("[42]", 42), ("<b>42</b>", 42),
    (r"\boxed{42}", 42), (r"$\boxed{42}$", 42), (r"\(\boxed{\text{42}}\)", 42), (r"\[42\]", 42),
    (r"**\$1{,}000**", 1000), (r"\mathbf{42}.", 42), ("Answer: 42", 42), ("The answer is 42.", 42), ("x = 42", 42),
    ("\u2248 42", 42), ("<<6*7=42>>42", 42),
    # fractions and powers
    ("3/4", Fraction(3, 4)), ("-3/4", -Fraction(3, 4)), ("3 / 4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)),
    (r"-\dfrac{3}{4}", -Fraction(3, 4)), (r"\frac34", Fraction(3, 4)), ("1 1/2", 3 * HALF), ("-1 1/2", -3 * HALF),
    (r"1\frac{1}{2}", 3 * HALF), ("1 and 1/2", 3 * HALF), ("\u00bd", HALF), ("2\u00bd cups", 5 * HALF),
    ("3\u20444", Fraction(3, 4)), ("1e-5", Fraction(1, 100_000)), ("1.5e3", 1500), ("2E+22", 2 * 10**22),
    (r"1.5 \times 10^{3}", 1500), ("1.5*10^3", 1500), ("1.5 x 10^-3", Fraction("0.0015")), ("10^5", 100000),
    ("1.5\u00d710\u00b3", 1500), ("2\u00b710\u207b\u00b3", Fraction(1, 500)),
    # digits of other scripts
    ("\uff11\uff12", 12), ("\u0663", 3), ("\u0967\u0968", 12), ("\u0661\u066c\u0662\u0663\u0664", 1234),
    ("\U0001d7d2\U0001d7d0", 42),
]
# Of these nothing can be read, neither in data nor in a text.
NOTHING = [
    "", " ", ".", ",", "-", "$", "none", "nan", "inf", "no answer", "eighteen", "?", "####", r"\boxed{}", "Step one",
    "10-15", "10\u201315", "10 - 15", "10 to 15", "$10 to $15", "10%-15%", "12 or 13", "12 and 13", "12, 13", "12; 13",
    "12 & 13", "12 13", "9*2", "9 x 2", "9 + 2", "3/4/5", "2024-01-05", "3:30", "1.2.3", "1,23,4", "1,234,5", "1,2,3",
    "1/0", "2e12345", "1e9999", "9" * 401, "Step 1: 5", "5^2", r"\frac{1+2}{3}", "about", "m2",
]


@pytest.mark.parametrize(("text", "value"), ALONE, ids=[ascii(text) for text, _ in ALONE])
def test_what_stands_alone_is_read_alike_in_data_and_texts(text, value):
    assert final_answer(f"so\n#### {text}\nQuestion: 3?") == right_answer(f"so\n#### {text}") == value
    if "=" not in text:
        assert right_answer(text) == value


@pytest.mark.parametrize("text", NOTHING, ids=ascii)
def test_what_cannot_be_read_whole_is_nothing(text):
    assert final_answer(f"#### {text}") is right_answer(text) is right_answer(f"3\n#### {text}") is None


# Where a number stands beside: a text's is read, data's is refused.
@pytest.mark.parametrize(("text", "value"), [
    ("18 (2 each)", 18), ("9*2 = 18", 18), ("18 = 9*2", 18), ("9*2=18 dollars", 18), ("18, since 9*2=18.5", 18),
    ("54. 2 more", 54), ("54 apples, 2 pears", 54), ("100% of 20", 100), ("2+3=5=5.0 apples", 5), ("5 for 7 days", 5),
    ("Cost: 6*10=60", 60), ("$18 per day over 7 days", 18),
])
def test_more_numbers_behind_an_answer(text, value):
    assert final_answer(f"#### {text}") == value and right_answer(text) is None


@pytest.mark.parametrize(("text", "value"), [
    ("####54", 54), ("#### 54\nQuestion: ...\n#### 7", 54), ("#### 54\n####", 54), ("#### none\n#### 5", 5),
    ("#### Step 1: add\n3\n#### 72", 72), ("####\n\n18", 18), ("54", None), ("the answer is 54", None),
    ("##### 5", 5), ("### 5", None),
])
def test_the_first_mark_with_a_number_counts(text, value):
    assert final_answer(text) == value


@pytest.mark.parametrize(("text", "value"), [
    ("#### 1\n#### 2", None), ("#### 2\n#### 2.0", 2), ("54\n####", None), ("#### 54\nmore", 54), ("54\n55", None),
    ("6*10=60", None), ("#### 60 or so", 60), ("#### 5 of 7", None),
])
def test_data_give_one_number(text, value):
    assert right_answer(text) == value


@pytest.mark.parametrize(("text", "values"), [
    ("so 3 of 4 are 12.", [3, 4, 12]), ("It costs $1,234.50, not -$3", [Fraction("1234.5"), -3]),
    ("18 - 3 = 15", [18, 3, 15]), ("10-15", [10, 15]), ("5 -3", [5, -3]), ("1,2,3 then .5", [HALF]), ("none", []),
    (r"\boxed{7} or \frac{3}{4}", [7, Fraction(3, 4)]), ("1e9999 x", []), ("2 1/2 cups", [5 * HALF]), ("x-5", [5]),
])
def test_all_numbers_of_a_text(text, values):
    assert list(every_number(text)) == values


@pytest.mark.parametrize(("value", "text"), [
    (Fraction(72), "72"), (HALF, "0.5"), (Fraction(-1, 8), "-0.125"), (Fraction(1, 3), "1/3"), (Fraction(0), "0"),
    (Fraction("1234.5"), "1234.5"), (Fraction(1, 100_000), "0.00001"), (Fraction(-7, 20), "-0.35"),
    (Fraction(10), "10"),
])
def test_digits_of_a_value(value, text):
    assert decimal(value) == text and right_answer(text) == value


PIECES = [*"0123456789.,-+*/^=$% \n{}()\\#ex:", "\\frac", "\\boxed{", "####", "\u00bd", "\u00b2", "and", "10^"]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_text_is_read_or_not(text):
    found = read(text)
    assert found is None or isinstance(found.value, Fraction)
    right = right_answer(text)
    assert right is None or final_answer(f"#### {text}" if "####" not in text else text) == right
    list(every_number(text))


@given(st.fractions(max_denominator=1000), st.sampled_from(["{}", "${}$", r"\boxed{{{}}}", "**{}**", "so {}", "= {}"]))
def test_a_value_is_read_back_in_any_dress(value, dress):
    assert final_answer(f"#### {dress.format(decimal(value))}") == (None if dress == "so {}" else value)


def test_reading_takes_time_in_proportion():
    for text in (" " * 50_000, "*" * 50_000, "5" + " " * 50_000, "(" * 50_000, "\\a{" * 20_000, "1," * 20_000,
                 "a:" * 20_000, "=" * 20_000):
        assert read(text) is None or text[0] == "5"
        assert plain(text) is not None
