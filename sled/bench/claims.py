"""What popular accounts of early exit claim, measured: each claim beside its figures, their intervals and a verdict.

All ways answer the same questions, in float32, greedily; a few more questions, which are not asked otherwise, choose
exits, drafts and a threshold. What is timed is whole `generate` calls, one batch after the other, all ways in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

import sled
from sled.bench.claims_rule import share
from sled.bench.claims_runs import TOGETHER, Answers, Together, answered, let_through, memory_saved, over_budget
from sled.bench.claims_table import (
    APART,
    BATCH,
    BOLD,
    CAUTIOUS,
    DRAFTED,
    GREEDY,
    LOCKED,
    SLED,
    SLED_DRAFTED,
    Chosen,
    Measured,
    claims,
    notes,
)
from sled.bench.report import BenchReport
from sled.bench.solving import MAX_NEW_TOKENS
from sled.errors import SettingError
from sled.eval.questions import Questions, demo_questions
from sled.lm import LM
from sled.settings.rules import Whole
from sled.text.prompts import prompt_ids

ASIDE = 128  # questions by which settings are chosen: fewer could not tell 95% kept from a little less
SURVEYED = 8  # of these, by which layers and drafts are
ALONE, IN_BATCHES = 24, 64  # questions timed one by one in all ways, and in batches
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
KEEP = 0.95  # of what the full model solves, with a margin


def run_claims_bench(*, model: str = "demo", questions: Questions | None = None, problems: int = 192, rounds: int = 3,
                     new_tokens: int = MAX_NEW_TOKENS) -> BenchReport:
    """Measures all claims on `questions`, the first of which choose settings and are not asked.

    model: as for `sled.load`. questions: None asks `problems` held-out word problems of the bundled model. All
    questions asked are timed one by one in two ways, the first 24 in all; the first 64 in batches of 8.
    Raises SettingError for too few questions, for a model that solves none, and what loading raises.
    """
    rounds = Whole(1, hint="every way is timed once a round")("rounds", rounds)
    aside, asked = set_aside(questions or demo_questions(with_aside(problems)))
    lm = sled.load(model, dtype="float32")
    new_tokens = Whole(2, lm.config.context, hint="it counts the tokens of an answer")("new_tokens", new_tokens)
    measured = measure_claims(lm, aside, asked, new_tokens, rounds)
    chosen, solved = measured.chosen, measured.right[GREEDY]
    title = (f"Claims on {lm.name} ({lm.config.num_layers} layers of width {lm.config.width}, float32, greedy); "
             f"{len(solved)} {asked.source}, of which the full model solves {solved.sum()}")
    settings = {"model": lm.name, "problems": len(solved), "solved": int(solved.sum()), "rounds": rounds,
                "new_tokens": new_tokens, "layers": chosen.layers, "threshold": chosen.threshold,
                "drafts": chosen.drafts.written}
    tried = ", ".join(f"{each:g}" for each in THRESHOLDS)
    told = (f"Exits, drafts and the threshold {chosen.threshold:g} were chosen on {len(aside.prompts)} questions that "
            f"were not asked otherwise, the threshold as the lowest of {tried} down to which the interval of the "
            f"quality kept lies at {KEEP:.0%} or above, or the highest where it never does.")
    return BenchReport(title, settings, claims(measured), [*notes(measured), told])


def with_aside(problems: int) -> int:
    """So many questions to ask, at least one, and those that choose settings: two for three, at most `ASIDE`."""
    problems = Whole(1, hint="it counts the problems to ask")("problems", problems)
    return problems + max(1, min(ASIDE, problems * 2 // 3))


def set_aside(questions: Questions) -> tuple[Questions, Questions]:
    """The questions that choose settings, and those that are asked, as `with_aside` counts them. Raises SettingError
    for less than two."""
    count = max(1, min(ASIDE, len(questions.prompts) * 2 // 5))
    if len(questions.prompts) == count:
        raise SettingError("questions holds 1, but one chooses settings, and one at least is asked; give more")
    part = lambda of: dataclasses.replace(  # noqa: E731
        questions, prompts=questions.prompts[of], answers=questions.answers[of])
    return part(slice(count)), part(slice(count, None))


def measure_claims(lm: LM, aside: Questions, asked: Questions, new_tokens: int, rounds: int) -> Measured:
    """Answers the questions in all ways. Raises SettingError where the full model solves none of them."""
    prompts = prompt_ids(asked.prompts, lm.text, lm.config)
    few, several = prompts[:ALONE], prompts[:IN_BATCHES]
    with tqdm(desc="choosing exits, drafts and a threshold", unit="run") as bar:
        chosen = choose(lm, aside, new_tokens, bar)
        bar.set_description("sled bench claims")
        exits = {each: dict(exits=chosen.exits(each)) for each in (CAUTIOUS, BOLD, chosen.threshold)}
        ways = {GREEDY: {}, **exits, DRAFTED: dict(exits=chosen.drafts.policy()), SLED: dict(fusion=sled.SLED())}
        for_answers = {**ways, 0.0: dict(exits=chosen.exits(0.0))}
        one_by_one = {**ways, 1.0: dict(exits=chosen.exits(1.0)), SLED_DRAFTED: {**ways[DRAFTED], **ways[SLED]}}
        all_one_by_one = {way: ways[way] for way in (GREEDY, chosen.threshold)}
        in_batches = {GREEDY: {}, APART: exits[chosen.threshold],
                      LOCKED: dict(exits=chosen.exits(chosen.threshold, Together))}
        timed = (len(one_by_one) * len(few) + len(all_one_by_one) * len(prompts)
                 + len(in_batches) * -(-len(several) // BATCH))
        bar.total = bar.n + len(for_answers) * -(-len(prompts) // TOGETHER) + (rounds + 1) * timed + len(prompts)
        every = answered(lm, prompts, TOGETHER, for_answers, new_tokens, 0, bar)
        right = {way: solved(asked, lm, answers) for way, answers in every.items()}
        if not right[GREEDY].any():
            raise SettingError(f"questions holds {len(prompts)} of which {lm.name} solves none, so no loss could show; "
                               "give others, more, or more new_tokens")
        alone = answered(lm, few, 1, one_by_one, new_tokens, rounds, bar)
        batched = answered(lm, several, BATCH, in_batches, new_tokens, rounds, bar)
        all_alone = answered(lm, prompts, 1, all_one_by_one, new_tokens, rounds, bar)
        lengths = np.array([len(prompt) for prompt in prompts])
        saved = memory_saved(lm, chosen.drafts.layer, chosen.drafts.draft,
                             (lengths[:ALONE] + alone[GREEDY].length_N).tolist())
        return Measured(chosen, every, right, alone, batched, all_alone, lengths, saved,
                        let_through(lm, prompts[0], chosen.layers, chosen.threshold),
                        over_budget(lm, prompts, every[GREEDY].length_N, chosen.layers, bar))


def choose(lm: LM, aside: Questions, new_tokens: int, bar: tqdm) -> Chosen:
    """Exits after the two layers that promise most by `sled.layers`, the draft that does, and the lowest threshold of
    `THRESHOLDS` down to which all surely keep enough of what the full model solves; the highest where none does."""
    prompts = prompt_ids(aside.prompts, lm.text, lm.config)
    survey = sled.layers(lm, prompts[:SURVEYED], max_new_tokens=new_tokens, profile=False, progress=False)
    layers = survey.speaking_layers(2)
    ways = {GREEDY: {}, **{each: dict(exits=sled.EarlyExit(layers, each)) for each in THRESHOLDS}}
    found = answered(lm, prompts, TOGETHER, ways, new_tokens, 0, bar)
    full = solved(aside, lm, found.pop(GREEDY))
    keeping = itertools.takewhile(lambda each: keeps_enough(solved(aside, lm, found[each])[full]), THRESHOLDS)
    return Chosen(layers, min(keeping, default=THRESHOLDS[0]), survey.best_drafting())


def keeps_enough(kept: Sequence[bool]) -> bool:
    """Whether the interval, and not the share alone, is at `KEEP` or above, so that no lucky threshold is chosen."""
    low = share("quality kept", kept).low
    return low is not None and low >= KEEP


def solved(questions: Questions, lm: LM, answers: Answers) -> np.ndarray:
    """Which questions [N] were answered rightly."""
    return np.array(questions.right([lm.text.decode(tokens) for tokens in answers.tokens]))
