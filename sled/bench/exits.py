"""Early exit and self-speculation, by default on the bundled model, beside plain decoding, which no ratio leaves out.

Batch 1 and 8: self-speculation against plain decoding, with and without SLED (at batch 1 against transformers' on the
same weights too); early exit by threshold, treatment of K/V and, at batch 8, schedule, against no early exit. Held-out
problems of 2 to 5 steps, as many of each in every batch; float32; greedy. Seconds are of whole `generate` calls, over
all problems; the drafts of one batch size are timed together, and so are its early exits.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

import sled
from sled.bench.report import BenchReport, column
from sled.bench.rival import NOT_INSTALLED, transformers_twin
from sled.bench.solving import MAX_NEW_TOKENS, Way, frequent_tokens, measure, mixed_questions, our_way, their_way
from sled.demo.problems import problems as train_problems
from sled.demo.problems import prompt
from sled.eval.numbers import final_answer
from sled.eval.sweep.measure import same_tokens
from sled.plots import writable_picture
from sled.settings.rules import Whole

BATCH = 8
DRAFTS = (4, 8, 16)
FEW_TOKENS = 64  # of the reduced draft vocabulary
THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SCHEDULES = {"immediate": sled.Immediate(), "lockstep": sled.Lockstep(),
             **{f"gather {rows}": sled.Gather(rows) for rows in (2, 4, 8)}}
GREEDY, SLED, TRANSFORMERS, ASSISTED = "greedy", "SLED", "transformers greedy", "transformers assisted by {}, draft {}"
NO_EXIT = ("-", "no early exit", None)
ASIDE = 16  # problems by which the exits are chosen
KEPT = 0.97  # of the full model's answers, by what is called the best early exit


@dataclasses.dataclass
class SpeculationRow:
    """One way to decode all layers' text. A ratio above 1 says that this way is faster."""

    batch: int = column("batch")
    way: str = column("way")
    best: float = column("best s")
    median: float = column("median s")
    tokens_per_second: float = column("tokens/s")
    decode_tokens_per_second: float | None = column("tokens/s after prefill")
    depth: float | None = column("mean depth")
    acceptance: float | None = column("acceptance")
    mean_accepted: float | None = column("mean accepted")
    same_texts: float = column("texts as plain")
    plain_over_this: float = column("plain / this")
    transformers_over_this: float | None = column("transformers' / this")


@dataclasses.dataclass
class EarlyExitRow:
    """Early exit with one setting, in batches. A ratio above 1 says that this setting is faster.

    same_answers: share of the answers that can be read in the full model's texts; None where it gives none.
    """

    batch: int = column("batch")
    kv: str = column("K/V")
    schedule: str = column("schedule")
    threshold: float | None = column("threshold")
    best: float = column("best s")
    median: float = column("median s")
    tokens_per_second: float = column("tokens/s")
    decode_tokens_per_second: float = column("tokens/s after prefill")
    depth: float = column("mean depth")
    held: int = column("rounds held")
    same_tokens: float = column("tokens as full model")
    same_answers: float | None = column("answers as full model")
    no_exit_over_this: float = column("no exit / this")
    lockstep_over_this: float | None = column("lockstep / this")


class Entry(NamedTuple):
    """A way to decode, the name of its plain way, and that of transformers' like, if it has one."""

    way: Way
    plain: str
    like: str | None = None


def run_exits_bench(*, model: str = "demo", problems: int = 48, rounds: int = 5,
                    picture: Path | None = None) -> BenchReport:
    """Measures `problems` at batch 8, and a third of them at batch 1; draws early exit at batch 8 into `picture`, if
    given.

    model: as for `sled.load`; exits and drafts are after the two layers that promise most by `sled.layers`, on problems
    that are not asked here.
    Without torch and transformers, only this library's ways are measured.
    """
    problems = Whole(1, hint="it counts the problems to solve")("problems", problems)
    rounds = Whole(1, hint="every way is timed once a round")("rounds", rounds)
    if picture:
        writable_picture("--picture", picture)
    lm = sled.load(model, dtype="float32")
    questions = mixed_questions(lm, problems)
    few = questions[:max(1, len(questions) // 3)]
    aside = [prompt(problem.question) for problem in train_problems("train", ASIDE)]
    exits = sled.layers(lm, aside, max_new_tokens=MAX_NEW_TOKENS, profile=False, progress=False).speaking_layers(2)
    notes = ["With early exit, immediate and lockstep are the same timing by definition: what lies between them here "
             "is the noise of the measurement.",
             "The fastest of several settings was chosen in the rounds that timed it, so as much of its lead as that "
             "noise may be chance."]
    drafting = {1: speculation_entries(lm, few, exits, 1), BATCH: speculation_entries(lm, questions, exits, BATCH)}
    try:
        drafting[1] |= transformers_entries(lm, few, exits)
        notes.append("transformers' acceptance is counted from passes through the first and the last layer, and as it "
                     "counts itself: a draft that ends a text is the verification's.")
    except ImportError as missing:
        notes.append(NOT_INSTALLED.format(missing.name))
    leaving = {1: early_exit_ways(lm, few, exits, 1), BATCH: early_exit_ways(lm, questions, exits, BATCH)}
    runs = (rounds + 1) * sum(map(len, [*drafting.values(), *leaving.values()]))
    with tqdm(total=runs, desc="sled bench exits", unit="run") as bar:
        first = {batch: speculation_rows(entries, batch, rounds, bar) for batch, entries in drafting.items()}
        second = {batch: early_exit_rows(lm, ways, batch, rounds, bar) for batch, ways in leaving.items()}
    for batch in drafting:
        notes += best_of(first[batch], second[batch])
    if picture:
        from sled.bench.pictures import draw_exits  # imported here: matplotlib is slow

        draw_exits(second[BATCH], picture)
    title = (f"Exits on {lm.name} ({lm.config.num_layers} layers of width {lm.config.width}, float32); "
             f"{len(few)} and {len(questions)} held-out problems of 2 to 5 steps; exits after layers {exits}")
    settings = {"problems": len(questions), "problems_alone": len(few), "rounds": rounds, "exits": exits,
                "draft_vocabulary": FEW_TOKENS}
    return BenchReport(title, settings, list(itertools.chain(*first.values(), *second.values())), notes)


def speculation_entries(lm, questions, layers, batch: int) -> dict[str, Entry]:
    """Plain and speculating ways, those of one compiled program together."""
    way = lambda **how: our_way(lm, questions, batch, **how)  # noqa: E731
    most, few = max(DRAFTS), frequent_tokens(lm, FEW_TOKENS)
    entries = {GREEDY: Entry(way(), GREEDY, TRANSFORMERS)}
    for layer, draft in itertools.product(layers, DRAFTS):
        entries[f"speculation after {layer}, draft {draft}"] = Entry(
            way(exits=sled.SelfSpeculation(layer, draft)), GREEDY, ASSISTED.format(layer, most))
    entries[f"speculation after {layers[0]}, draft {most}, of {FEW_TOKENS} tokens"] = Entry(
        way(exits=sled.SelfSpeculation(layers[0], most, vocabulary=few)), GREEDY, ASSISTED.format(layers[0], most))
    entries[f"speculation after {' or '.join(map(str, layers))}, draft to {most}, adaptive"] = Entry(
        way(exits=sled.SelfSpeculation(layers, most, adaptive=True)), GREEDY)
    entries[SLED] = Entry(way(fusion=sled.SLED()), SLED)
    for layer, draft in itertools.product(layers, DRAFTS):
        entries[f"SLED, speculation after {layer}, draft {draft}"] = Entry(
            way(fusion=sled.SLED(), exits=sled.SelfSpeculation(layer, draft)), SLED)
    return entries


def transformers_entries(lm, questions, layers) -> dict[str, Entry]:
    """transformers on the same weights: greedy, and assisted by the same exits. Raises ImportError without it."""
    twin = transformers_twin(lm.build(lm.params))
    most = max(DRAFTS)
    entries = {TRANSFORMERS: Entry(their_way(twin, questions), GREEDY, TRANSFORMERS)}
    for layer in layers:
        name = ASSISTED.format(layer, most)
        entries[name] = Entry(their_way(twin, questions, layer, most), GREEDY, name)
    name = ASSISTED.format(layers[0], "its own")
    return entries | {name: Entry(their_way(twin, questions, layers[0]), GREEDY, name)}


def speculation_rows(entries: dict[str, Entry], batch: int, rounds: int, bar: tqdm) -> list[SpeculationRow]:
    measured = measure({name: entry.way for name, entry in entries.items()}, rounds, bar)
    rows = []
    for name, (_, plain, like) in entries.items():
        this, best = measured[name].first, measured[name].times.best
        rows.append(SpeculationRow(
            batch=batch, way=name, **measured[name].speeds(), depth=this.mean_depth, acceptance=this.acceptance,
            mean_accepted=this.mean_accepted,
            same_texts=fmean(map(list.__eq__, this.tokens, measured[plain].first.tokens)),
            plain_over_this=measured[plain].times.best / best,
            transformers_over_this=measured[like].times.best / best if like in measured else None))
    return rows


def early_exit_ways(lm, questions, layers, batch: int) -> dict[tuple, Way]:
    """Ways by K/V (one compiled program each), schedule (of one row there is one) and threshold; first no early exit.

    The schedules of one threshold follow each other, so that what is compared is timed within a second or two.
    """
    way = lambda **how: our_way(lm, questions, batch, **how)  # noqa: E731
    schedules = dict(itertools.islice(SCHEDULES.items(), 1 if batch == 1 else None))
    return {NO_EXIT: way()} | {
        (kv, name, threshold): way(exits=sled.EarlyExit(layers, threshold, kv=kv), schedule=schedule)
        for kv in ("exact", "propagate") for threshold in THRESHOLDS for name, schedule in schedules.items()}


def early_exit_rows(lm, ways: dict[tuple, Way], batch: int, rounds: int, bar: tqdm) -> list[EarlyExitRow]:
    measured = measure(ways, rounds, bar)
    full = measured[NO_EXIT]
    answers = lambda measured: [final_answer(lm.text.decode(row)) for row in measured.first.tokens]  # noqa: E731
    rows, known = [], answers(full)
    for (kv, schedule, threshold), this in measured.items():
        lockstep = measured.get((kv, "lockstep", threshold))
        same = [a == b for a, b in zip(answers(this), known, strict=True) if b is not None]
        rows.append(EarlyExitRow(
            batch=batch, kv=kv, schedule=schedule, threshold=threshold, **this.speeds(), depth=this.first.mean_depth,
            held=this.first.held, same_tokens=same_tokens(this.first.tokens, full.first.tokens),
            same_answers=fmean(same) if same else None,
            no_exit_over_this=full.times.best / this.times.best,
            lockstep_over_this=lockstep and lockstep.times.best / this.times.best))
    return rows


def best_of(drafting: list[SpeculationRow], leaving: list[EarlyExitRow]) -> list[str]:
    """Of one batch size, a line for each way to be faster than its plain way: the fastest setting of those measured."""
    batch, said = leaving[0].batch, []
    for plain, lossless in ((GREEDY, "speculation"), (SLED, "SLED, speculation")):
        rows = [row for row in drafting if row.way.startswith(lossless)]
        if rows:
            best = max(rows, key=lambda row: row.plain_over_this)
            said.append(f"batch {batch}, drafts: the fastest of {len(rows)} settings, {best.way}, is "
                        f"{best.plain_over_this:.2f} times as fast as {plain}, with {best.same_texts:.0%} of its texts")
    for kv in ("exact", "propagate"):
        rows = [row for row in leaving if row.kv == kv]
        kept = [row for row in rows if (row.same_answers or 0) >= KEPT]
        if kept:
            best = max(kept, key=lambda row: row.no_exit_over_this)
            said.append(
                f"batch {batch}, early exit, {kv} K/V: the fastest of {len(kept)} settings that keep {KEPT:.0%} of the "
                f"answers, threshold {best.threshold:g} ({best.schedule}, mean depth {best.depth:.1f}), is "
                f"{best.no_exit_over_this:.2f} times as fast as no exit, with {best.same_answers:.0%} of its answers")
        unused = max((row for row in rows if row.threshold == 1), key=lambda row: row.no_exit_over_this)
        said.append(f"batch {batch}, threshold 1, at which no token leaves, {kv} K/V: "
                    f"{unused.no_exit_over_this:.2f} times as fast as no exit")
    return said
