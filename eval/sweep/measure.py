"""Measuring the methods of a sweep: every one answers all questions, and is timed beside its baseline."""

from __future__ import annotations

import dataclasses
import datetime
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from scipy.stats import binomtest
from tqdm import tqdm

from sled.eval.methods import Method
from sled.eval.numbers import decimal
from sled.eval.questions import Questions
from sled.eval.sweep.grid import listed
from sled.eval.sweep.result import SweepRow
from sled.results import Output
from sled.timing import Times, hardware, interleave, versions


@dataclasses.dataclass(frozen=True)
class Point:
    """A method in a sweep, its baseline, the layers after which a token may leave, and the digest of all that decides
    its row."""

    method: Method
    against: Method
    layers: tuple[int, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class Answered:
    """All questions, answered by a method: what it generated, the answers read in it, and whether they are right."""

    out: Output
    found: list[Fraction | None]
    right: list[bool]

    @property
    def unanswered(self) -> int:
        """The number of texts in which no answer could be read."""
        return self.found.count(None)

    @property
    def unfinished(self) -> int:
        """The number of texts that ended at the token limit."""
        return self.out.finish_reasons.count("length")

    def samples(self, method: str, prompts: Sequence[str], questions: Questions) -> Iterator[dict[str, Any]]:
        """Each question with its text, as `EvaluationReport` has samples. prompts: as the model was given them."""
        for at, prompt in enumerate(prompts):
            found = self.found[at]
            yield {"method": method, "doc_id": at, "row": questions.first_row + at, "filter": questions.extract,
                   "prompt": prompt, "target": decimal(Fraction(questions.answers[at])),
                   "responses": [[self.out.texts[at]]], "answers": [None if found is None else decimal(found)],
                   "scores": {"accuracy": float(self.right[at])}, "finish_reasons": [self.out.finish_reasons[at]]}


def measure(programs: list[list[Point]], known: dict[str, Point], questions: Questions, prompts: Sequence[str],
             solve: Callable[[Point], Output], rounds: int, enough: Callable[[str, Answered], None],
             progress: bool) -> Iterator[tuple[SweepRow, Iterator[dict[str, Any]]]]:
    """The rows of each program with their samples, as soon as it is timed.

    prompts: as the model is given them, for the samples. enough: is given the answers of the exits' baseline.
    """
    run = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(2)}"
    where = dict(run=run, machine=hardware(), versions=", ".join(f"{k} {v}" for k, v in versions().items()))
    answered: dict[str, Answered] = {}
    judges = {point.against.name for point in known.values() if point.method.leaves_early}

    def once(point: Point) -> None:
        name = point.method.name
        if name not in answered:
            bar.set_description(name)
            out = solve(point)
            found = questions.found(out.texts)
            answered[name] = Answered(out, found, [a == b for a, b in zip(found, questions.answers, strict=True)])
            bar.update()
            if name in judges:
                bar.clear()
                enough(name, answered[name])

    together = [dict.fromkeys([program[0].against.name, *(p.method.name for p in program)]) for program in programs]
    total = len({name for names in together for name in names}) + rounds * sum(map(len, together))
    with tqdm(total=total, unit="run", disable=not progress) as bar:
        for program, names in zip(programs, together, strict=True):
            for name in names:  # compiles
                once(known[name])
            bar.set_description(f"timing {len(program)} of one program")
            times = interleave({name: lambda name=name: solve(known[name]) for name in names}, rounds, bar)
            for point in program:
                name = point.method.name
                yield _row(point, answered, times, where), answered[name].samples(name, prompts, questions)


def _row(point: Point, answered: dict[str, Answered], times: dict[str, Times], where: dict[str, str]) -> SweepRow:
    method = point.method
    mine, base = answered[method.name], answered[point.against.name]
    out, n, right = mine.out, len(mine.right), sum(mine.right)
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    took, against = times[method.name], times[point.against.name]
    return SweepRow(
        digest=point.digest, **where, method=method.name, against=point.against.name,
        layers=listed(point.layers), verifies=method.verifies,
        policy=json.dumps(method.settings()["exits"]), n=n,
        accuracy=right / n, low=float(low), high=float(high),
        unanswered=mine.unanswered, unfinished=mine.unfinished,
        lost=sum(b and not a for a, b in zip(mine.right, base.right, strict=True)) / n,
        same_texts=sum(map(list.__eq__, out.tokens, base.out.tokens)) / n,
        same_tokens=same_tokens(out.tokens, base.out.tokens),
        mean_depth=out.stats.mean_depth, acceptance=out.stats.acceptance, tokens=out.stats.new_tokens,
        seconds=took.best, median_seconds=took.median, against_seconds=against.best,
        against_median_seconds=against.median, relative_speed=against.best / took.best,
        right="".join("01"[hit] for hit in mine.right))


def same_tokens(texts: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of `full` that stand at the same place in `texts`; each text goes on from its own tokens."""
    hits = sum(a == b for pair in zip(texts, full, strict=True) for a, b in zip(*pair, strict=False))
    return hits / max(sum(map(len, full)), 1)
