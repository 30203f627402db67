"""The word problems of the demo, and the numbers that answers state."""

import itertools
import re
from fractions import Fraction
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sled.demo.problems import partial_products, problems, prompt, split_of, stream
from sled.demo.stories import STORIES
from sled.errors import SettingError
from sled.eval.numbers import exact_match

SPLITS = ("train", "heldout")
SIDE = re.compile(r"(?P<a>\d+)(?:(?P<sign>[-+*/])(?P<b>\d+)(?P<percent>%?))?")
QUANTITY = re.compile(r"\d+|\b(?:three|four|five|six|[Hh]alf|third|quarter|fifth)\b")


@pytest.fixture(scope="module")
def sample():
    return {split: problems(split, 5000) for split in SPLITS}


@pytest.fixture(scope="module")
def everything(sample):
    return sample["train"] + sample["heldout"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(files("sled.demo") / "model" / "tokenizer.json"))


def value(side: str) -> Fraction:
    """Of one side of an equation, a number or one operation."""
    parts = SIDE.fullmatch(side)
    a, b = Fraction(parts["a"]), Fraction(parts["b"] or 0)
    if parts["percent"]:
        b /= 100
    return {None: lambda: a, "+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[
        parts["sign"]]()


def test_questions_are_one_line_and_every_step_of_a_solution_is_true(everything):
    for p in everything:
        assert "#" not in p.question and "\n" not in p.question
        numbers = [int(n) for n in re.findall(r"\d+", p.question + p.solution)]
        assert 1 <= min(numbers) and max(numbers) <= 9_999, p
        *steps, last = p.solution.split("\n")
        assert 1 <= len(steps) <= 10 and last == f"#### {p.answer}"
        for step in steps:
            label, equation = step.split(": ")
            assert label.isalpha() and len({value(side) for side in equation.split("=")}) == 1, p
        assert int(equation.split("=")[-1]) == p.answer


@pytest.mark.parametrize("a, b, parts", [
    (7, 86, []), (12, 11, []), (40, 16, ["400+240"]), (37, 48, ["1440+336"]), (37, 20, []), (8, 345, ["2400+360"]),
    (3456, 8, ["27200+448"]), (400, 7, [])])
def test_products_are_written_out(a, b, parts):
    assert partial_products(a, b) == partial_products(b, a) == parts


def test_turns_follow_all_stories(everything):
    stories = {template: [p.solution.count("\n") for p in everything if p.template == template] for template in STORIES}
    assert all(max(steps) - min(steps) >= 3 for steps in stories.values())


def test_splits_have_all_stories_and_share_none_with_the_same_numbers(sample):
    def told(p):
        return p.template, tuple(QUANTITY.findall(p.question)), p.solution.count("\n"), p.answer

    assert len(STORIES) >= 25
    assert all({p.template for p in problems} == set(STORIES) for problems in sample.values())
    assert not {told(p) for p in sample["train"]} & {told(p) for p in sample["heldout"]}


def test_about_a_tenth_of_all_quantities_is_held_out():
    drawn = itertools.product(range(2, 40), range(2, 40))
    held = [split_of("cost", quantities) == "heldout" for quantities in drawn]
    assert 0.07 < sum(held) / len(held) < 0.13


@given(split=st.sampled_from(SPLITS), seed=st.integers(-5, 10**6), count=st.integers(1, 20))
def test_a_seed_gives_the_same_problems_however_many_are_taken(split, seed, count):
    first, other = (list(itertools.islice(stream(split, of), 25)) for of in (seed, seed + 1))
    assert problems(split, count, seed) == first[:count] and first != other


def test_the_toys_of_ash_are_held_out():
    """6 toys at 10 tokens, 10% off for four or more: the model may be asked, for it never saw the numbers."""
    assert split_of("discount_for_many", (6, 10, 10, 4)) == "heldout"


@pytest.mark.parametrize("split, count, says", [
    *((split, 1, "'train' and 'heldout'") for split in ("test", "", None)),
    *(("train", count, "at least 1") for count in (0, -1, 1.0, True, None))])
def test_an_unknown_split_and_a_count_below_one_are_refused(split, count, says):
    with pytest.raises(SettingError, match=says):
        problems(split, count)


def test_problems_are_short_in_the_bundled_tokens(everything, tokenizer):
    texts = [f"{prompt(p.question)} {p.solution}" for p in everything]
    assert max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) < 256
    assert tokenizer.encode("120*3=360").tokens == list("120*3=360")  # one a digit
    assert prompt("How many?") == "Question: How many?\nAnswer:"


@given(text=st.text())
def test_bundled_tokenizer_keeps_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# Numbers of answers

def test_exact_match_counts_right_answers():
    assert exact_match(["#### 1", "#### 2", "no", "#### 5"], [1, 3, 4, 5]) == 0.5
    batch = problems("heldout", 200)
    assert exact_match([p.solution for p in batch], [p.answer for p in batch]) == 1


@pytest.mark.parametrize("texts, answers", [([], []), (["#### 1"], [1, 2])])
def test_exact_match_needs_as_many_texts_as_answers(texts, answers):
    with pytest.raises(SettingError, match="answers given"):
        exact_match(texts, answers)
