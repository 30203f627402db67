"""Grade-school word problems with worked solutions, for the bundled model: endless, exact, split.

A story (one of `stories/`) draws quantities, computes its steps from them and tells them in words; up to three
turns (`turns.py`) go on from its answer. It looks like GSM8K (steps with their equations, `#### 54` at the end), kept
small enough for a model of a few million parameters: positive whole numbers of at most four digits, one operation a
step, products with their partial products written out, as in "37*48=1440+336=1776".

Training and held-out problems are disjoint by construction: story and its drawn quantities together
decide the split, so held-out numbers are never met in training, whatever names are around them and turns follow.
`sled train --data demo` trains on "train"; the demo and the tests ask from "heldout".
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
import random
from collections.abc import Iterator
from fractions import Fraction

from sled.demo.stories import STORIES
from sled.demo.turns import TURNS, aside
from sled.errors import SettingError

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.1
MOST_TURNS = 3
ASIDES = 0.2  # of the problems have a number that does not matter
LARGEST = 9_999

NAMES = ("Ash Ben Cleo Dan Eva Finn Gita Hugo Ines Jack Kim Leo Mia Noah Omar Pia Quin Rosa Sam Tara "
         "Uma Vera Will Yara Zoe Ali Bea Carl Dora Emil").split()
THINGS = ("toys pens books apples cards stickers marbles shells cookies balls plums cups stones stamps "
          "kites beads lemons buttons candles pears").split()
CURRENCY = "dollars tokens euros coins".split()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction,
              "%": lambda whole, percent: Fraction(whole * percent, 100)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its solution (steps, then `#### answer`), and the story that it tells."""

    question: str
    solution: str
    answer: int
    template: str


def prompt(question: str) -> str:
    """The form in which the bundled model is asked; it goes on with a blank and the solution."""
    return f"Question: {question}\nAnswer:"


def stream(split: str, seed: int = 0) -> Iterator[Problem]:
    """Endless problems of one split, the same for the same seed on every machine.

    `split` is "train" or "heldout". Raises `SettingError` for any other.
    """
    if split not in SPLITS:
        raise SettingError(f"split is {split!r}, but there are only {' and '.join(map(repr, SPLITS))}")
    return _stream(split, random.Random(f"{split}-{seed}"))


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` problems of `stream`. Raises `SettingError` for a bad split or count."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise SettingError(f"count is {count!r}, but it must be a whole number of at least 1")
    return list(itertools.islice(stream(split, seed), count))


def split_of(template: str, quantities: tuple[int, ...]) -> str:
    """The split to which a story with these quantities belongs, names and wording aside."""
    digest = hashlib.blake2b(f"{template}/{quantities}".encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") >= (1 - HELDOUT_SHARE) * 2**32 else "train"


def partial_products(a: int, b: int) -> list[str]:
    """The sum that a product is written out as: the larger factor cut at the hundreds, or else the smaller at the tens.
    None where that leaves one part, and for factors of the times tables (one digit times two, or both at most 12)."""
    small, large = sorted((a, b))
    if large < 100 and (small < 10 or large <= 12):
        return []
    whole, cut, other = (large, 100, small) if large >= 100 else (small, 10, large)
    first, second = whole // cut * cut * other, whole % cut * other
    return [f"{first}+{second}"] if first and second else []


def _stream(split: str, rng: random.Random) -> Iterator[Problem]:
    names = list(STORIES)
    while True:
        template = rng.choice(names)
        telling = _Telling(rng)
        try:
            question = STORIES[template](telling)
            if split_of(template, tuple(telling.quantities)) != split:
                continue
            turns = rng.sample(TURNS, rng.randint(0, MOST_TURNS))
            question = " ".join([question, *(turn(telling) for turn in turns)])
            if rng.random() < ASIDES:
                question = f"{aside(telling)} {question}"
        except _Redraw:
            continue
        solution = "\n".join([*telling.steps, f"#### {telling.answer}"])
        yield Problem(question, solution, telling.answer, template)


class _Redraw(Exception):
    """These quantities make no good problem; draw others."""


class _Telling:
    """One telling of a story: what was drawn (`quantities`) and computed (`steps`, `answer`)."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.quantities: list[int] = []
        self.steps: list[str] = []
        self.answer = 0

    def number(self, low: int, high: int, by: int = 1) -> int:
        """Draw a quantity of low, low + by, .. high. It counts towards the split."""
        value = self.rng.randrange(low, high + 1, by)
        self.quantities.append(value)
        return value

    def pick(self, *options: str) -> str:
        """Draw decoration: a name, a thing, a wording. It does not count towards the split."""
        return self.rng.choice(options)

    @property
    def name(self) -> str:
        return self.pick(*NAMES)

    @property
    def two_names(self) -> list[str]:
        return self.rng.sample(NAMES, 2)

    @property
    def things(self) -> str:
        return self.pick(*THINGS)

    @property
    def two_things(self) -> list[str]:
        return self.rng.sample(THINGS, 2)

    @property
    def currency(self) -> str:
        return self.pick(*CURRENCY)

    def need(self, fits: bool) -> None:
        """Redraw all of the story's quantities unless they fit."""
        if not fits:
            raise _Redraw

    def step(self, label: str, a: int, sign: str, b: int) -> int:
        """Write `label: a sign b = result` down and return the result, so far the answer.

        `sign` is + - * / or %, the last for b percent of a. A product of large factors has two partial products in
        between. Redraws unless the result is a whole number of 1..`LARGEST`.
        """
        result = OPERATIONS[sign](a, b)
        self.need(result.denominator == 1 and 1 <= result <= LARGEST)
        result = int(result)
        operation = f"{a}*{b}%" if sign == "%" else f"{a}{sign}{b}"
        parts = partial_products(a, b) if sign == "*" else []
        self.steps.append("=".join([f"{label}: {operation}", *parts, str(result)]))
        self.answer = result
        return result
