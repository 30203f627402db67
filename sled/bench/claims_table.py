"""The claims themselves: what is said, which figures decide it, and under which conditions they were measured."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

import sled
from sled.bench.claims_rule import DIFFERENCE, RULE, SHARE, Figure, correlation, resampled, share, speed, verdict
from sled.bench.claims_runs import TOGETHER, Answers
from sled.bench.report import column
from sled.eval.report.compare import compare
from sled.survey.result import Drafting

BATCH = 8
CAUTIOUS, BOLD = 0.95, 0.7  # the thresholds of the accounts
DAMAGE = 0.05  # the least share of texts, answers or requests that counts as damage: a single one always happens
GREEDY, SLED, DRAFTED, SLED_DRAFTED, APART, LOCKED = (
    "greedy", "SLED", "self-speculation", "SLED by self-speculation", "each row alone", "all rows together")


@dataclasses.dataclass
class ClaimRow:
    """A claim, what was measured of it, and whether it holds. figures: in full, in the JSON form alone."""

    number: str = column("no.")
    claim: str = column("what is said")
    source: str = column("by")
    measured: str = column("measured here [95% interval]")
    conditions: str = column("conditions")
    verdict: str = column("verdict")
    figures: list[Figure]

    @classmethod
    def of(cls, number: str, claim: str, source: str, conditions: str, *figures: Figure) -> ClaimRow:
        return cls(number, claim, source, "; ".join(map(str, figures)), conditions, verdict(figures), list(figures))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the questions set aside chose: exits, the lowest threshold that keeps enough there, and drafts."""

    layers: tuple[int, ...]
    threshold: float
    drafts: Drafting

    def exits(self, threshold: float, kind=sled.EarlyExit):
        return kind(self.layers, threshold)

    def written(self, threshold: float) -> str:
        return f"sled.EarlyExit({self.layers}, {threshold:g})"


@dataclasses.dataclass(frozen=True)
class Measured:
    """All answers, by the name of the way or the threshold: to all questions, in batches of `TOGETHER`; to the first
    questions one by one, and in batches of `BATCH`; and, by greedy decoding and the chosen exits, to all one by one.

    right: by way, which of all questions were answered rightly. saved: as of `memory_saved`; taken, over: of requests.
    """

    chosen: Chosen
    every: dict[str, Answers]
    right: dict[str, np.ndarray]
    alone: dict[str, Answers]
    batched: dict[str, Answers]
    all_alone: dict[str, Answers]
    prompt_lengths: np.ndarray
    saved: np.ndarray
    taken: list[bool]
    over: list[bool]

    def kept(self, way: str, **claim) -> Figure:
        return share("quality kept", self.right[way][self.right[GREEDY]], **claim)

    def lost(self, way: str) -> Figure:
        return share("solved answers lost", ~self.right[way][self.right[GREEDY]], claimed=DAMAGE)

    def faster(self, ours: str, theirs: str = GREEDY, name: str = "speed", **claim) -> Figure:
        return speed(name, self.alone[theirs].seconds_M, self.alone[ours].seconds_M, **claim)


def claims(of: Measured) -> list[ClaimRow]:
    """Every claim, with the figures that decide it."""
    line, chosen, best = ClaimRow.of, of.chosen, of.chosen.threshold
    one, many, together = "one by one", f"in batches of {BATCH}", f"answers in batches of {TOGETHER}"
    both, drafts = f"{together}, speed {one}", chosen.drafts.written
    accounts, layerskip = "popular accounts of early exit", "LayerSkip, arXiv 2404.16710"
    attack = "accounts of attacks on early exit"
    _, sled_row = compare({way: of.right[way].astype(float) for way in (GREEDY, SLED)}, GREEDY).rows
    return [
        line("1a", "A threshold of 0.95 keeps 99% of the quality at 1.5 times the speed", accounts,
             f"{chosen.written(CAUTIOUS)}; {both}", of.kept(CAUTIOUS, claimed=0.99), of.faster(CAUTIOUS, claimed=1.5)),
        line("1b", "A threshold of 0.7 is 3 times as fast and costs 5 to 10% of the accuracy", accounts,
             f"{chosen.written(BOLD)}; {both}", of.kept(BOLD, claimed=0.9), of.faster(BOLD, claimed=3.0)),
        line("2a", "Self-speculation is twice as fast at 98% of the quality", layerskip, f"{drafts}; {both}",
             share("texts as greedy's", of.every[DRAFTED].same(of.every[GREEDY]), claimed=0.98),
             of.faster(DRAFTED, claimed=2.0)),
        line("2b", "It takes 15 to 25% less memory than drafts of a separate model", layerskip,
             f"{drafts}; the separate model: its layers up to there, embedding and head; weights and K/V, by their "
             "shapes",
             resampled("bytes spared", SHARE, lambda saved: saved.mean(-1), of.saved, claimed=0.15, no_effect=0.0)),
        line("3", "Early exit is 3 times as fast at 95% of the quality", "EE-LLM, arXiv 2312.04916",
             f"{chosen.written(best)}; {both}", of.kept(best, claimed=0.95), of.faster(best, claimed=3.0)),
        line("4a", "SLED is better at arithmetic than greedy decoding", "SLED, arXiv 2411.02433, and accounts of it",
             f"sled.SLED(); it rights {sled_row.wins} answers and spoils {sled_row.losses}; {together}",
             Figure("solved, less greedy's", sled_row.difference, *sled_row.difference_interval, DIFFERENCE,
                    no_effect=0.0)),
        line("4b", "SLED is faster than greedy decoding", "accounts of SLED", f"sled.SLED(), {one}", of.faster(SLED)),
        line("4c", "The same", "accounts of SLED", f"sled.SLED() verifying {drafts}, {one}", of.faster(SLED_DRAFTED),
             share("texts as SLED's", of.alone[SLED_DRAFTED].same(of.alone[SLED]), claimed=1.0)),
        line("4d", "SLED is faster when it verifies drafts than by itself", "self-speculation under SLED, here",
             f"sled.SLED() verifying {drafts}, {one}", of.faster(SLED_DRAFTED, SLED)),
        line("5a", "All rows of a batch must leave after the same layer, or texts go wrong",
             f"{accounts}; CALM's code, which takes the batch's least confidence",
             f"{chosen.written(best)}, {one} against batches of {TOGETHER} and of {BATCH}; of {BATCH} rows, some left "
             f"apart at {left_apart(of.batched[APART]):.0%} of the positions",
             share("texts changed", changed(of), claimed=DAMAGE)),
        line("5b", "In a batch each row's own exits gain nothing over all leaving together, and over none",
             accounts, f"{chosen.written(best)}, exact K/V, {many}",
             *(speed(f"speed over {name}", of.batched[way].seconds_M, of.batched[APART].seconds_M, claimed=1.0,
                     no_effect=None, at_most=True) for way, name in ((LOCKED, "together"), (GREEDY, "no exit")))),
        line("6a", "Whoever moves the threshold makes the model wrong", attack,
             f"{chosen.written(0)}, no floor; {together}", of.lost(0.0)),
        line("6b", "The same", attack, f"sled.Limits(threshold_floor={best:g}), thresholds below it",
             share("requests let through", of.taken, claimed=DAMAGE)),
        line("6c", "Whoever lowers the threshold to the operator's floor makes the model wrong", attack,
             f"{chosen.written(best)}, at the floor; {together}", of.lost(best)),
        line("6d", "Whoever moves the threshold, or finds texts that no exit is sure of, makes it slow",
             "DeepSloth, arXiv 2010.02432 (of classifiers)", f"{chosen.written(1)} against {best:g}, {one}",
             of.faster(best, 1.0, "times as long")),
        line("6e", "The same", "DeepSloth, arXiv 2010.02432 (of classifiers)",
             f"{chosen.written(1)}, sled.Limits(budget=...) for the longest prompt and one new token; "
             f"{len(of.over)} requests that need more",
             share("requests beyond what was granted", of.over, claimed=DAMAGE)),
        line("6f", "The time that a text takes tells what is in it",
             "audits of networks with exits, arXiv 2208.11180 (of classifiers)",
             f"{chosen.written(best)}; {together}, seconds {one}; beyond the lengths of prompt and text",
             wrong_by_depth(of), depth_by_time(of, best)),
        line("6g", "The same", "audits of networks with exits, arXiv 2208.11180 (of classifiers)",
             f"all layers, as by sled.Limits(constant_depth=True); the depths are those of 6f; {one}",
             depth_by_time(of, GREEDY)),
    ]


def changed(of: Measured) -> list[bool]:
    """Which texts are others alone than in a batch, large or, as far as these were asked, small."""
    alone = of.all_alone[of.chosen.threshold]
    small = [*alone.same(of.batched[APART]), *itertools.repeat(True, len(alone.tokens))]
    return [not (a and b) for a, b in zip(alone.same(of.every[of.chosen.threshold]), small, strict=False)]


def left_apart(answers: Answers) -> float:
    """The share of the positions that several rows of a batch have come to, at which they left after several layers."""
    batches = (answers.exit_layers[at:at + BATCH] for at in range(0, len(answers.exit_layers), BATCH))
    several = [set(layers) for rows in batches for layers in itertools.zip_longest(*rows)
               if len(layers) - layers.count(None) > 1]
    return sum(len(layers - {None}) > 1 for layers in several) / max(len(several), 1)


def wrong_by_depth(of: Measured) -> Figure:
    """What a text's depth tells of whether its answer is wrong."""
    answers = of.every[of.chosen.threshold]
    return correlation("wrong answer by depth", ~of.right[of.chosen.threshold], answers.depth_N, of.prompt_lengths,
                       answers.length_N)


def depth_by_time(of: Measured, way: str) -> Figure:
    """What the time per token tells of the depth that the text has with exits."""
    answers = of.all_alone[way]
    return correlation("depth by time per token", of.all_alone[of.chosen.threshold].depth_N,
                       answers.seconds_M / answers.length_N, of.prompt_lengths, answers.length_N)


def notes(of: Measured) -> list[str]:
    together = of.batched[LOCKED].same(of.all_alone[of.chosen.threshold])
    return [
        RULE,
        "Quality kept: of the questions that the full model solves, the share that stays solved; others that become "
        "right earn no credit. Speeds: seconds of greedy decoding, or of what is named, over seconds of this, of whole "
        "calls. Correlations: partial, of ranks.",
        f"Damage, to answers, texts or limits, is claimed to be {DAMAGE:.0%} of the cases at least.",
        f"Where all rows of a batch of {BATCH} leave together, {together.count(False)} of {len(together)} texts were "
        "other ones than alone."]
