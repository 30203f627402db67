"""Sweeps: every setting of early exit, self-speculation or fusion is measured beside not using it.

A point's quality is measured against the questions' answers and against its baseline's texts; its time, against its
baseline timed beside it in the same rounds. The baseline of a method with exits is the same fusion without them; that
of a fusion is plain greedy decoding, the last layer alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from scipy.stats import binomtest
from tqdm import tqdm

from sled.calibration.fingerprint import digest_of_weights
from sled.calibration.learn_then_test import DELTA, EPSILON
from sled.decoding.options import NEW_TOKENS
from sled.errors import SettingError
from sled.eval.methods import A_MODEL, Method, checked_methods, deciding_versions
from sled.eval.questions import Questions
from sled.eval.sweep.grid import listed, no_exit
from sled.eval.sweep.plot import draw_sweep
from sled.eval.sweep.result import SweepFile, SweepRow, Swept
from sled.io import json_digest, replace_text, writable_folder, written_whole
from sled.lm import LM
from sled.results import Output
from sled.settings.describe import describe
from sled.settings.rules import Instance, Whole
from sled.text.prompts import prompt_ids
from sled.timing import Times, hardware, interleave, versions

FILES = ("sweep.csv", "sweep.md", "sweep.png")


@dataclasses.dataclass(frozen=True)
class Point:
    """A method in a sweep, its baseline, the layers after which a token may leave, and the digest of all that decides
    its row."""

    method: Method
    against: Method
    layers: tuple[int, ...]
    digest: str


def sweep(lm: LM, methods: Sequence[Method], questions: Questions, folder: str | os.PathLike, *, rounds: int = 3,
          batch_size: int = 8, max_new_tokens: int = NEW_TOKENS, delta: float = 0.05, epsilon: float = 0.05,
          progress: bool = True) -> Swept:
    """Measures every method and its baselines, and writes `sweep.csv`, `sweep.md` and `sweep.png` into `folder`.

    methods: those of `sled.eval.sweep.grid`, or of one's own with names of one line; the baselines are added. Methods
        that differ in traced numbers only, such as thresholds, are one compiled program, and a sequence of the
        certified choice in the order given: the safest first. Those with exits share one fusion.
    rounds: times that each program's methods and their baseline are timed, interleaved, after a run that compiles;
        the fastest counts.
    batch_size, max_new_tokens: as for `LM.generate`. Speed depends on the batch size, texts do not.
    delta, epsilon: the choice is the fastest method whose expected loss is at most delta, for further questions from
        the same source, with a confidence of 1 - epsilon: see `Swept.choice` and docs/sweeps.md.

    A row is written as soon as its program is timed. What `folder` holds of an interrupted sweep is not measured
    again, unless weights, questions or settings changed; its rows then stem from several runs, which is noted.

    Raises SettingError, PromptError, TokenizerError. Every answer must fit into the model's context at full length:
    where texts end at the context, max_new_tokens is not what bounded them.
    """
    A_MODEL("lm", lm)
    Instance(Questions, traced=False, hint="give what demo_questions or read_questions returns")("questions", questions)
    delta, epsilon = DELTA("delta", delta), EPSILON("epsilon", epsilon)
    given = dict(rounds=Whole(1, hint="every method is timed once a round")("rounds", rounds),
                 batch_size=Whole(1, hint="questions are answered in batches")("batch_size", batch_size),
                 max_new_tokens=Whole(1, hint="it counts the tokens of an answer")("max_new_tokens", max_new_tokens))
    points = _points(lm, methods, questions, given)
    _check_room(lm, questions, given["max_new_tokens"])
    rows = SweepFile(sweep_folder("folder", Path(folder)) / FILES[0])
    programs = _programs([point for point in points if point.digest not in rows.by_digest])
    if programs:
        solve = lambda point: lm.decode(  # noqa: E731
            list(questions.prompts), point.method.decoding.replace(max_new_tokens=max_new_tokens),
            batch_size=batch_size)
        for row in _measure(programs, {p.method.name: p for p in points}, questions, solve, given["rounds"], progress):
            rows.append(row)
    found = [dataclasses.replace(rows.by_digest[point.digest], method=point.method.name, against=point.against.name)
             for point in points]  # an earlier sweep may have had other names
    swept = Swept(rows=tuple(found),
                  sequences=tuple(tuple(p.method.name for p in program) for program in _programs(points)
                                  if program[0].method.leaves_early),
                  delta=delta, epsilon=epsilon, num_layers=lm.config.num_layers,
                  what=f"{lm.name}, {len(questions.prompts)} {questions.source}, at most {max_new_tokens} new tokens, "
                       f"batches of {batch_size}, fastest of {rounds} rounds")
    replace_text("the sweep's table", Path(folder) / FILES[1], swept.markdown() + "\n")
    with written_whole(Path(folder) / FILES[2]) as beside:
        draw_sweep(swept, beside)
    return swept


def sweep_folder(name: str, folder: Path) -> Path:
    """`folder`, for the files of a sweep. Raises SettingError where none can be written, or would replace others."""
    # `SweepFile` reads the first of them, and refuses another's.
    return writable_folder(name, folder, FILES, owns=lambda folder: (folder / FILES[0]).exists())


def _points(lm: LM, methods: Sequence[Method], questions: Questions, given: dict[str, int]) -> list[Point]:
    """The baselines that are needed, then the methods; each once. Raises SettingError for methods that do not fit."""
    methods = checked_methods(methods)
    common = {"weights": digest_of_weights(lm.params), "model": describe(lm.config), "tokenizer": lm.text.digest,
              "device": jax.devices()[0].device_kind, "versions": deciding_versions(), **given,
              "questions": json_digest([list(questions.prompts), list(map(str, questions.answers))])}
    points: dict[str, Point] = {}
    for method in [*itertools.chain(*map(_baselines, methods)), *methods]:
        layers = method.decoding.exits.exits(lm.config.num_layers)[:-1]
        point = Point(method, _baselines(method)[-1], layers, json_digest({**common, "method": method.settings()})[:20])
        same = points.setdefault(method.name, point)
        if same.digest != point.digest or len(method.name.splitlines()) != 1:
            raise SettingError(f"two methods are called {method.name!r}, or its name is no single line; "
                               "give each a name of its own")
        if other := next((p for p in points.values() if p.digest == point.digest and p is not same), None):
            raise SettingError(f"the method {method.name!r} is {other.method.name!r} under another name; leave one out")
    if len({p.against.name for p in points.values() if p.method.leaves_early}) > 1:
        raise SettingError("the methods with exits have several fusions or samplings, so the fastest of them is that "
                           "of no one baseline; sweep each fusion into a folder of its own")
    return list(points.values())


def _check_room(lm: LM, questions: Questions, max_new_tokens: int) -> None:
    """Raises SettingError where an answer could end at the model's context before it has `max_new_tokens`."""
    lengths = list(map(len, prompt_ids(list(questions.prompts), lm.text, lm.config)))
    longest, context = max(lengths), lm.config.max_positions
    if longest + max_new_tokens > context:
        raise SettingError(f"max_new_tokens is {max_new_tokens}, but the context of {lm.name} holds {context} tokens, "
                           f"and question {lengths.index(longest) + 1} of {questions.source} takes {longest} of them; "
                           f"ask for at most {context - longest} (--max-new-tokens), or leave long questions out")


def _baselines(method: Method) -> list[Method]:
    """Plain greedy decoding and, of a method with exits, its fusion without them; the last is what it is timed by."""
    plain = no_exit()
    if not method.leaves_early:
        return [plain]
    mine = no_exit(method.decoding.fusion)
    if method.samples:
        mine = Method(f"{mine.name}, sampled", fusion=method.decoding.fusion, sampling=method.decoding.sampling)
    return [plain, mine]


def _programs(points: Sequence[Point]) -> list[list[Point]]:
    """The points by compiled program, in the order of their first, and by baseline."""
    found: dict[Any, list[Point]] = {}
    for point in points:
        decoding = point.method.decoding
        traced = decoding.fusion, decoding.exits, decoding.sampling
        found.setdefault((jax.tree.structure(traced), point.against.name), []).append(point)
    return list(found.values())


def _measure(programs: list[list[Point]], known: dict[str, Point], questions: Questions,
             solve: Callable[[Point], Output], rounds: int, progress: bool) -> Iterator[SweepRow]:
    """The rows of each program, as soon as it is timed."""
    run = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(2)}"
    where = dict(run=run, machine=hardware(), versions=", ".join(f"{k} {v}" for k, v in versions().items()))
    outs: dict[str, Output] = {}

    def once(point: Point) -> None:
        if point.method.name not in outs:
            bar.set_description(point.method.name)
            outs[point.method.name] = solve(point)
            bar.update()

    together = [dict.fromkeys([program[0].against.name, *(p.method.name for p in program)]) for program in programs]
    total = len({name for names in together for name in names}) + rounds * sum(map(len, together))
    with tqdm(total=total, unit="run", disable=not progress) as bar:
        for program, names in zip(programs, together, strict=True):
            for name in names:  # compiles
                once(known[name])
            bar.set_description(f"timing {len(program)} of one program")
            times = interleave({name: lambda name=name: solve(known[name]) for name in names}, rounds, bar)
            for point in program:
                yield _row(point, outs, times, questions, where)


def _row(point: Point, outs: dict[str, Output], times: dict[str, Times], questions: Questions,
         where: dict[str, str]) -> SweepRow:
    method, n = point.method, len(questions.prompts)
    out, full = outs[method.name], outs[point.against.name]
    right, right_full = questions.right(out.texts), questions.right(full.texts)
    low, high = binomtest(sum(right), n).proportion_ci(method="wilson")
    mine, base = times[method.name], times[point.against.name]
    return SweepRow(
        digest=point.digest, **where, method=method.name, against=point.against.name,
        layers=listed(point.layers), verifies=method.verifies,
        policy=json.dumps(method.settings()["exits"]), n=n,
        accuracy=sum(right) / n, low=float(low), high=float(high),
        lost=sum(b and not a for a, b in zip(right, right_full, strict=True)) / n,
        same_texts=sum(map(list.__eq__, out.tokens, full.tokens)) / n, same_tokens=same_tokens(out.tokens, full.tokens),
        mean_depth=out.stats.mean_depth, acceptance=out.stats.acceptance, tokens=out.stats.new_tokens,
        seconds=mine.best, median_seconds=mine.median, against_seconds=base.best,
        against_median_seconds=base.median, tokens_per_second=out.stats.new_tokens / mine.best,
        relative_speed=base.best / mine.best,
        right="".join("01"[hit] for hit in right))


def same_tokens(texts: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of `full` that stand at the same place in `texts`; each text goes on from its own tokens."""
    hits = sum(a == b for pair in zip(texts, full, strict=True) for a, b in zip(*pair, strict=False))
    return hits / max(sum(map(len, full)), 1)


