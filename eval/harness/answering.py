"""Every question once: from the cache, or else computed, counted, and kept batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from sled.eval.harness.cache import Answers
from sled.io import json_digest

Found = Iterator[dict[int, Any]]  # answers by the request's index, batch by batch


@dataclasses.dataclass
class Counts:
    """What became of the requests so far.

    requests: all that were asked. computed: answers the model made; repeated: the same request once more; the rest
    was in the cache.
    truncated: requests whose beginning was cut off, because they were longer than the context; cut_tokens: how much.
    unfinished: generated texts that ended at the token limit. new_tokens: of all generated texts; layers: the sum over
    these of the layers that said them.
    """

    requests: int = 0
    computed: int = 0
    repeated: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    unfinished: int = 0
    new_tokens: int = 0
    layers: int = 0

    def cut(self, tokens: int) -> None:
        """A request lost so many tokens."""
        self.truncated += tokens > 0
        self.cut_tokens += tokens


def answer_all(described: list[dict[str, Any]], compute: Callable[[list[int]], Found], *, kept: Answers,
               counts: Counts, name: str, progress: bool) -> list[Any]:
    """The answer of each request. Those not kept yet are computed, equal ones once, under a bar over all.

    described: all that decides each answer, besides the settings of `kept`, as JSON has it.
    compute: takes the numbers of the requests to answer; what it yields is kept at once.
    """
    keys = [json_digest(request) for request in described]
    answers = kept.find(dict.fromkeys(keys))
    new = [i for i, key in enumerate(keys) if key not in answers]
    which = list({keys[i]: i for i in reversed(new)}.values())[::-1]
    counts.requests += len(keys)
    counts.repeated += len(new) - len(which)
    with tqdm(total=len(keys), initial=len(keys) - len(new), unit="request", desc=name, disable=not progress) as bar:
        for found in compute(which):
            made = {keys[i]: answer for i, answer in found.items()}
            kept.add(made)
            answers |= made
            counts.computed += len(made)
            bar.update(len(made))
        bar.update(len(new) - len(which))
    return [answers[key] for key in keys]
