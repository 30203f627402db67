"""The stories behind the word problems of `problems.py`, which tells them: every function of these files is one.

A story gets a telling `t` and returns its question. `t.number` draws a quantity, which counts towards the
split; `t.step` writes a step of the solution down and computes it, the last one being the answer; `t.pick`,
`t.name`, `t.things` and the like draw what does not matter; `t.need` draws all anew unless something holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from sled.demo.stories import counting, measures, shopping, years

# Their order is part of the data: a problem's story is drawn by its place.
STORIES: dict[str, Callable[..., str]] = {
    name: tell for part in (shopping, counting, years, measures) for name, tell in vars(part).items()
    if inspect.isfunction(tell)}
