"""Held-out problems for benchmarks, and ways to decode them, run and timed side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

from sled.bench.rival import greedy
from sled.demo import MAX_NEW_TOKENS
from sled.demo.problems import problems, prompt, stream
from sled.lm import LM
from sled.results import Stats
from sled.timing import Times, interleave

STEPS = (2, 3, 4, 5)
# Tokens of a question. Such questions make programs of one size, in batches too: twenty ways to decode are then as many
# programs, and not so many that some are forgotten and compiled again while they are timed.
LENGTHS = range(34, 49)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solved(Stats):
    """All problems, solved once in one way. Numbers that the way does not tell are None or 0."""

    tokens: list[list[int]]


Way = Callable[[], Solved]


@dataclasses.dataclass(frozen=True)
class Measured:
    """All runs of one way: what it returned in each, the first of them to compile, and the seconds of the others."""

    runs: list[Any]
    times: Times

    @property
    def first(self) -> Any:
        return self.runs[0]

    def speeds(self) -> dict[str, float | None]:
        """Columns of a row, where the runs are `Solved`: seconds, and tokens per second."""
        count, decode = self.first.new_tokens, [run.decode_seconds for run in self.runs[1:]]
        return dict(best=self.times.best, median=self.times.median, tokens_per_second=count / self.times.best,
                    decode_tokens_per_second=None if None in decode else count / min(decode))


def mixed_questions(lm: LM, count: int) -> list[list[int]]:
    """Token ids of held-out problems of `STEPS` steps and `LENGTHS` tokens; any len(STEPS) in a row have as many
    different numbers of steps.

    count: rounded up to a multiple of len(STEPS).
    """
    each = -(-count // len(STEPS))
    found: dict[int, list[list[int]]] = {steps: [] for steps in STEPS}
    for problem in stream("heldout"):
        of_steps = found.get(problem.solution.count("\n"))  # a line for each step, and the answer's
        if of_steps is not None and len(of_steps) < each:
            if len(ids := lm.text.encode(prompt(problem.question))) in LENGTHS:
                of_steps.append(ids)
        elif all(len(questions) == each for questions in found.values()):
            break
    return list(itertools.chain(*zip(*found.values(), strict=True)))


def frequent_tokens(lm: LM, count: int) -> np.ndarray:
    """The tokens most frequent in solutions of training problems, the ending one included, ascending."""
    seen = Counter()
    for problem in problems("train", 2000):
        seen.update([*lm.text.encode(" " + problem.solution), *lm.config.eos_ids])
    return np.array(sorted(token for token, _ in seen.most_common(count)))


def our_way(lm: LM, questions: list[list[int]], batch: int, **how) -> Way:
    """`lm.generate` over the questions, `batch` neighbours at a time."""
    batches = [questions[at:at + batch] for at in range(0, len(questions), batch)]

    def solve() -> Solved:
        outs = [lm.generate(ids, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch, **how) for ids in batches]
        total = {field.name: sum(getattr(out.stats, field.name) for out in outs) for field in dataclasses.fields(Stats)}
        total["mean_depth"] = fmean(layer for out in outs for row in out.exit_layers for layer in row)
        return Solved(**total, tokens=[row for out in outs for row in out.tokens])

    return solve


def their_way(twin, questions: list[list[int]], exit_layer: int | None = None, draft: int | None = None) -> Way:
    """transformers' greedy `generate`, one question at a time; its early-exit assistance where `exit_layer` is given.

    draft: tokens before verification; None keeps its own way, 20 or up to one less probable than 0.4.
    """
    passes = Counter()
    layers = twin.model.layers
    drafting = dict(num_assistant_tokens=draft, num_assistant_tokens_schedule=draft and "constant",
                    assistant_confidence_threshold=draft and 0.0)

    def solve() -> Solved:
        twin.generation_config.update(**drafting)  # it reads these nowhere else
        hooks = [layers[at].register_forward_hook(lambda *_, at=at: passes.update([at])) for at in (0, -1)]
        passes.clear()
        made = [greedy(twin, [question], MAX_NEW_TOKENS, assistant_early_exit=exit_layer)[0].tolist()
                for question in questions]
        for hook in hooks:
            hook.remove()
        # A draft is a pass of the first layer without the last; a verification adds a token to the accepted drafts.
        drafts = dict(drafted=passes[0] - passes[-1], accepted=sum(map(len, made)) - passes[-1],
                      verifications=passes[-1]) if exit_layer else {}
        return Solved(tokens=made, prompt_tokens=sum(map(len, questions)), new_tokens=sum(map(len, made)),
                      prefill_seconds=0, decode_seconds=None, mean_depth=None, **drafts)

    return solve


def measure(ways: Mapping[Hashable, Callable[[], Any]], rounds: int, bar: tqdm) -> dict[Any, Measured]:
    """Every way once to compile, in the order given, then all of them interleaved. `bar` moves by one a run."""
    runs: dict[Hashable, list[Any]] = {}
    for name, way in ways.items():
        runs[name] = [way()]
        bar.update()
    times = interleave({name: lambda name=name, way=way: runs[name].append(way()) for name, way in ways.items()},
                       rounds, bar)
    return {name: Measured(runs[name], times[name]) for name in ways}
