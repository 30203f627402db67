"""Sweeps: every setting of early exit, self-speculation or fusion is measured beside not using it.

A point's quality is measured against the questions' answers and against its baseline's texts; its time, against its
baseline timed beside it in the same rounds. The baseline of a method with exits is the same fusion without them; that
of a fusion is plain greedy decoding, the last layer alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sled.calibration.learn_then_test import DELTA, EPSILON, can_lose, fewest_losses
from sled.decoding.options import NEW_TOKENS
from sled.errors import EvaluationWarning, SettingError
from sled.eval.extraction import RULES
from sled.eval.methods import A_MODEL, Method, checked_methods, deciding_versions
from sled.eval.questions import Questions
from sled.eval.sweep.grid import no_exit
from sled.eval.sweep.measure import Answered, Point, measure
from sled.eval.sweep.plot import draw_sweep
from sled.eval.sweep.result import MORE_TOKENS, SAMPLES, SweepFile, Swept, counted, cut_off, too_few
from sled.io import json_digest, naming_full_disk, replace_text, shorten, writable_folder, written_whole
from sled.lm import LM
from sled.settings.describe import describe
from sled.settings.rules import Instance, Whole
from sled.text.prompts import prompt_ids

FILES = ("sweep.csv", SAMPLES, "sweep.md", "sweep.png")
MANY = 0.1  # of the baseline's texts, to warn of the token limit


def sweep(lm: LM, methods: Sequence[Method], questions: Questions, folder: str | os.PathLike, *, rounds: int = 3,
          batch_size: int = 8, max_new_tokens: int = NEW_TOKENS, stop: str | Sequence[str] | None = None,
          delta: float = 0.05, epsilon: float = 0.05, progress: bool = True) -> Swept:
    """Measures every method and its baselines, and writes `sweep.csv`, `samples.jsonl` (every prompt and text),
    `sweep.md` and `sweep.png` into `folder`.

    methods: those of `sled.eval.sweep.grid`, or of one's own with names of one line; the baselines are added. Methods
        that differ in traced numbers only, such as thresholds, are one compiled program, and a sequence of the
        certified choice in the order given: the safest first. Those with exits share one fusion.
    rounds: times that each program's methods and their baseline are timed, interleaved, after a run that compiles;
        the fastest counts.
    batch_size, max_new_tokens, stop: as for `LM.generate`. Speed depends on the batch size, texts (in float32) do not.
        Without stop strings, the questions' own end an answer.
    delta, epsilon: the choice is the fastest method whose expected loss is at most delta, for further questions from
        the same source, with a confidence of 1 - epsilon: see `Swept.choice` and docs/sweeps.md.

    A row is written as soon as its program is timed. What `folder` holds of an interrupted sweep is not measured
    again, unless weights, questions or settings changed; its rows then stem from several runs, which is noted.

    Warns (EvaluationWarning) of too few questions before any work, and of a baseline that solves too few as soon as it
    has answered them.

    Raises SettingError, PromptError, TokenizerError. Every answer must fit into the model's context at full length:
    where texts end at the context, max_new_tokens is not what bounded them.
    """
    A_MODEL("lm", lm)
    Instance(Questions, traced=False, hint="give what demo_questions or read_questions returns")("questions", questions)
    delta, epsilon = DELTA("delta", delta), EPSILON("epsilon", epsilon)
    questions = dataclasses.replace(questions, stop=questions.stop if stop is None else stop)
    given = dict(rounds=Whole(1, hint="every method is timed once a round")("rounds", rounds),
                 batch_size=Whole(1, hint="questions are answered in batches")("batch_size", batch_size),
                 max_new_tokens=Whole(1, hint="it counts the tokens of an answer")("max_new_tokens", max_new_tokens),
                 stop=questions.stop)
    asked = [ids.tolist() for ids in prompt_ids(list(questions.prompts), lm.text, lm.config)]
    points = _points(lm, methods, given | {
        "questions": json_digest([asked, list(map(str, questions.answers)), questions.extract])})
    _check_room(lm, asked, questions.source, given["max_new_tokens"])
    rows = SweepFile(sweep_folder("folder", Path(folder)) / FILES[0])
    programs = _programs([point for point in points if point.digest not in rows.by_digest])
    sequences = tuple(tuple(p.method.name for p in program) for program in _programs(points)
                      if program[0].method.leaves_early)
    if programs:
        if sequences and (few := fewest_losses(delta, epsilon / len(sequences))) > len(questions.prompts):
            warnings.warn(f"{len(questions.prompts)} questions certify nothing: even without any loss it takes "
                          f"{few:.0f} at delta {delta:g} and epsilon {epsilon:g}, with {counted(sequences)} of "
                          "methods; the sweep measures, and chooses nothing", EvaluationWarning, stacklevel=2)
        solve = lambda point: lm.decode(  # noqa: E731
            asked, point.method.decoding.replace(max_new_tokens=max_new_tokens, stop=given["stop"]),
            batch_size=batch_size)

        def enough(name: str, base: Answered) -> None:
            n, right, texts = len(base.right), sum(base.right), base.out.texts
            many = base.unfinished > MANY * n
            if can_lose(right / n, n, delta, epsilon):
                if many:
                    warnings.warn(cut_off(name, base.unfinished, n), EvaluationWarning, stacklevel=2)
                return
            read = {rule: sum(dataclasses.replace(questions, extract=rule).right(texts)) for rule in RULES}
            better = max(read, key=read.get)
            hint = f"By {better} (--extract) it solves {read[better]}. " * (read[better] > right)
            hint += f"{MORE_TOKENS}. " * many
            why = too_few(name, right, n, base.unanswered, base.unfinished, delta)
            warnings.warn(f"{why}; so nothing will be certified or chosen. {hint}Its first text: "
                          f"{shorten(texts[0].strip(), 200)!r}", EvaluationWarning, stacklevel=2)

        prompts = [prompt if isinstance(prompt, str) else lm.text.decode(ids, special=True)
                   for prompt, ids in zip(questions.prompts, asked, strict=True)]
        for row, samples in measure(programs, {p.method.name: p for p in points}, questions, prompts, solve,
                                    given["rounds"], enough, progress):
            rows.append(row, samples)
    found = [dataclasses.replace(rows.by_digest[point.digest], method=point.method.name, against=point.against.name)
             for point in points]  # an earlier sweep may have had other names
    ends = f", ending at {' or '.join(map(repr, given['stop']))}" * bool(given["stop"])
    swept = Swept(rows=tuple(found), sequences=sequences, delta=delta, epsilon=epsilon, num_layers=lm.config.num_layers,
                  form=questions.form, what=f"{lm.name}, {len(questions.prompts)} {questions.source}, the answer being "
                       f"{RULES[questions.extract].where}, at most {max_new_tokens} new tokens{ends}, batches of "
                       f"{batch_size}, fastest of {rounds} round{'s' * (rounds > 1)}")
    replace_text("the sweep's table", Path(folder) / FILES[2], swept.markdown() + "\n")
    with naming_full_disk(Path(folder)), written_whole(Path(folder) / FILES[3]) as beside:
        draw_sweep(swept, beside)
    return swept


def sweep_folder(name: str, folder: Path) -> Path:
    """`folder`, for the files of a sweep. Raises SettingError where none can be written, or would replace others."""
    # `SweepFile` reads the first of them, and refuses another's.
    return writable_folder(name, folder, FILES, owns=lambda folder: (folder / FILES[0]).exists())


def _points(lm: LM, methods: Sequence[Method], given: dict[str, Any]) -> list[Point]:
    """The baselines that are needed, then the methods; each once. Raises SettingError for methods that do not fit."""
    methods = checked_methods(methods)
    common = {"weights": lm.weights_digest(), "model": describe(lm.config), "tokenizer": lm.text.digest,
              "device": jax.devices()[0].device_kind, "versions": deciding_versions(), **given}
    points: dict[str, Point] = {}
    for method in [*itertools.chain(*map(_baselines, methods)), *methods]:
        lm.check(method.decoding)
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


def _check_room(lm: LM, asked: Sequence[Sequence[int]], source: str, max_new_tokens: int) -> None:
    """Raises SettingError where an answer could end at the model's context before it has `max_new_tokens`."""
    lengths = list(map(len, asked))
    longest, context = max(lengths), lm.config.context
    if longest + max_new_tokens > context:
        raise SettingError(f"max_new_tokens is {max_new_tokens}, but the context of {lm.name} holds {context} tokens, "
                           f"and question {lengths.index(longest) + 1} of {source} takes {longest} of them; "
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
