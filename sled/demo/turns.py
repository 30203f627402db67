"""What may happen after a story: each turn goes on from its answer, and asks again.

A turn gets the telling `t` of a story (`sled.demo.stories`) that was told, with its `t.answer`, and returns the
sentences that are added to the question.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable


def rise(t):
    more = t.number(2, 199)
    t.step("Then", t.answer, "+", more)
    return t.pick(f"Later it is {more} more. How much is it then?", f"Then {more} are added. What is the new number?")


def fall(t):
    t.need(t.answer > 10)
    less = t.number(2, min(t.answer - 1, 199))
    t.step("Left", t.answer, "-", less)
    return t.pick(f"Later it is {less} less. How much is it then?", f"Then {less} are taken away. What is left?")


def multiple(t):
    factor = t.number(2, 9)
    t.step("Times", t.answer, "*", factor)
    return t.pick(f"The next one is {factor} times as large. How large is it?",
                  f"{t.name} has {factor} times as much. How much is that?")


def many_days(t):
    days = t.number(2, 12 if t.answer < 100 else 9)
    t.step("Days", t.answer, "*", days)
    return f"It is the same on each of {days} days. How much is that in all?"


def share(t):
    fitting = [count for count in range(2, 13) if t.answer % count == 0 and t.answer > count]
    t.need(bool(fitting))
    count = fitting[t.number(0, len(fitting) - 1)]
    t.step("Share", t.answer, "/", count)
    return f"It is divided into {count} equal parts. How large is one?"


def kept(t):
    t.need(t.answer % 10 == 0)
    percent = t.number(10, 90, 10)
    whole = t.answer
    part = t.step("Kept", whole, "%", percent)
    t.step("Rest", whole, "-", part)
    return f"{t.name} keeps {percent}% of it. How large is the rest?"


def together(t):
    more, first = t.number(2, 99), t.answer
    second = t.step("Next", first, "+", more)
    t.step("Both", first, "+", second)
    return f"The next time it is {more} more. How much is it both times together?"


def goal(t):
    missing = t.number(2, 199)
    aim, reached = t.answer + missing, t.answer
    t.step("Missing", aim, "-", reached)
    return f"The goal is {aim}. How much is missing?"


def half(t):
    t.need(t.answer % 2 == 0)
    more = t.number(2, 99)
    first = t.step("Half", t.answer, "/", 2)
    t.step("Then", first, "+", more)
    return f"Half of it is used up, and then {more} are added. How much is there now?"


def aside(t):
    """A sentence with a number that does not matter."""
    number = t.rng.randrange(2, 100)
    return t.pick(f"{t.name} is {number} years old.", f"It is day {number}.", f"{t.name} lives at number {number}.",
                  f"It took {number} minutes.", f"Here are {number} people.")


# Their order is part of the data: a turn is drawn by its place.
TURNS: list[Callable[..., str]] = [turn for name, turn in list(globals().items())
                                   if inspect.isfunction(turn) and turn is not aside]
