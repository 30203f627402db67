"""Continuous batching against batches that wait for their slowest row, on the bundled model's held-out problems."""

from __future__ import annotations

import dataclasses
import statistics
import time

from tqdm import tqdm

import sled
from sled.bench import solving
from sled.bench.report import BenchReport, column
from sled.lm import LM
from sled.settings.rules import Whole

POLICIES = {"no early exit": None, "speculation after layer 2": sled.SelfSpeculation(2)}


@dataclasses.dataclass
class ServingRow:
    """One way to serve all requests, which are there from the start. A ratio above 1 says that this way is faster."""

    exits: str = column("exits")
    way: str = column("way")
    best: float = column("best s")
    median: float = column("median s")
    tokens_per_second: float = column("tokens/s")
    mean_wait: float = column("mean s to a whole answer")
    same_texts: float = column("texts as in batches")
    batches_over_this: float = column("batches / this")


@dataclasses.dataclass
class Served:
    """Tokens and seconds to the whole answer of each request."""

    tokens: list[list[int]]
    waits: list[float]


def run_engine_bench(*, requests: int = 64, slots: int = 8, rounds: int = 5) -> BenchReport:
    """Serves `requests` problems of 2 to 5 steps: by the engine, and `slots` at a time in the order they came."""
    requests = Whole(1, hint="it counts the problems to solve")("requests", requests)
    slots = Whole(1, hint="it counts the rows decoded together")("slots", slots)
    rounds = Whole(1, hint="every way is timed once a round")("rounds", rounds)
    lm = sled.load("demo", dtype="float32")
    questions = solving.mixed_questions(lm, requests)
    ways = {}
    for name, policy in POLICIES.items():
        how = {} if policy is None else dict(exits=policy)
        ways[name, "batches"] = in_batches(lm, questions, slots, how)
        ways[name, "engine"] = by_engine(lm, questions, slots, how)
    with tqdm(total=len(ways) * (rounds + 1), unit="run", desc="sled bench engine") as bar:
        measured = solving.measure(ways, rounds, bar)
    rows = []
    for (name, way), this in measured.items():
        batches = measured[name, "batches"]
        rows.append(ServingRow(
            exits=name, way=way, best=this.times.best, median=this.times.median,
            tokens_per_second=sum(map(len, this.first.tokens)) / this.times.best,
            mean_wait=min(statistics.mean(run.waits) for run in this.runs[1:]),
            same_texts=statistics.mean(map(list.__eq__, this.first.tokens, batches.first.tokens)),
            batches_over_this=batches.times.best / this.times.best))
    title = (f"{len(questions)} held-out problems of 2 to 5 steps through {slots} slots on the demo model "
             f"({lm.config.num_layers} layers of width {lm.config.width}, float32)")
    return BenchReport(title, {"requests": len(questions), "slots": slots, "rounds": rounds}, rows)


def in_batches(lm: LM, questions: list[list[int]], size: int, how: dict):
    """`lm.generate`, `size` at a time: all rows of a batch are answered when its slowest is."""

    def serve() -> Served:
        begun, tokens, waits = time.perf_counter(), [], []
        for at in range(0, len(questions), size):
            some = questions[at:at + size]
            tokens += lm.generate(some, max_new_tokens=solving.MAX_NEW_TOKENS, batch_size=size, **how).tokens
            waits += [time.perf_counter() - begun] * len(some)
        return Served(tokens, waits)

    return serve


def by_engine(lm: LM, questions: list[list[int]], slots: int, how: dict):
    """One engine, whose slots are refilled as requests end."""
    capacity = min(max(map(len, questions)) + solving.MAX_NEW_TOKENS, lm.config.context)
    engine = sled.Engine(lm, slots=slots, capacity=capacity, **how)

    def serve() -> Served:
        begun = time.perf_counter()
        asked = [engine.submit(question, max_new_tokens=solving.MAX_NEW_TOKENS) for question in questions]
        ended: dict[int, float] = {}
        while len(ended) < len(asked):
            engine.step()
            ended |= {i: time.perf_counter() - begun for i, request in enumerate(asked)
                      if request.ended and i not in ended}
        return Served([request.result().tokens for request in asked], list(ended.values()))

    return serve
