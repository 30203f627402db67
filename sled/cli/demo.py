"""`sled demo`: the bundled model on problems it has never seen, decoded in all the ways of the library."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from tqdm import tqdm

import sled
from sled.cli.derived import derive, offer, settings_of
from sled.cli.options import ModelOptions
from sled.cli.values import NewPath
from sled.demo import DRAFT, EXIT
from sled.demo.problems import Problem, prompt, stream
from sled.eval.numbers import final_answer
from sled.lm import LM
from sled.plots import writable_picture
from sled.results import Output
from sled.settings.rules import Whole
from sled.timing import interleave

# Tokens of a question: so alike that each program is compiled for one size alone.
LENGTHS = range(50, 65)
MAX_NEW_TOKENS = 128  # room for all but the longest solutions; with a question it comes to 192 positions at most
GREEDY, CLAMP, FUSED, DOLA, CONFIDENT = "greedy", "clamp only (SLED, rate 0)", "SLED", "DoLa", "Confident Decoding"
LEAVING = f"early exit after {' or '.join(map(str, EXIT['layers']))}"
DRAFTING, FUSED_DRAFTING = f"self-speculation after {DRAFT['layer']}", "SLED, verifying drafts"
HEADINGS = ("", "solved", "95%", "+", "-", "p", "speed", "depth", "same")
LEGEND = (
    "solved: right answers, with a 95% interval (bootstrap). + -: problems that only this way solved, and that only "
    "greedy did; p: how likely so uneven a split is by chance (McNemar, exact). speed: as a multiple of greedy's, of "
    "whole calls for one problem at a time (in batches: sled bench exits). "
    "depth: the layer, on average, after which a token was chosen; all layers verify a draft afterwards. same: texts "
    "that are token for token greedy's, or SLED's for the last way. Early exit leaves above a confidence of "
    f"{EXIT['threshold']:g}, with exact K/V; drafts have {DRAFT['draft']} tokens.")


class Way(NamedTuple):
    """Settings of `LM.generate`, and the way without exits whose texts these should give."""

    how: dict[str, Any]
    full: str = GREEDY


class Solved(NamedTuple):
    """All problems, solved in one way. right: whether each answer is; seconds: of all calls together."""

    outs: list[Output]
    right: list[bool]
    seconds: float

    @property
    def tokens(self) -> list[list[int]]:
        return [out.tokens[0] for out in self.outs]


@dataclasses.dataclass(frozen=True)
class Demo(derive("Fused", *settings_of(offer(sled.SLED, "rate", "scale")))):
    """Solve held-out word problems by layer fusion, early exit and self-speculation: a table, and a picture of layers.

    Runs offline on the bundled model, within a minute and a half on two cores, compilation included; what was compiled
    is kept, so the next time it starts in seconds.
    """

    problems: int = 50
    """Held-out problems to solve, one at a time, in every way."""
    show: int = 2
    """Problems to print with two solutions, those first for which these differ."""
    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"])] = Path("sled-demo")
    """Folder for the lens picture."""

    def run(self) -> None:
        Whole(1, hint="it counts the problems to solve")("--problems", self.problems)
        Whole(0, hint="it counts the problems to print")("--show", self.show)
        path = writable_picture("--out", self.out / "lens.png")
        ways = self.ways()
        lm = ModelOptions().load(advise=False)
        asked = like_long(lm, self.problems)
        print(f"{len(asked)} held-out problems, {lm.config.num_layers} layers, {len(ways)} ways to decode the same "
              "model\n", flush=True)
        solved = solve_in_turn(lm, ways, asked)
        shown = telling(solved)
        for i, name in shown[:self.show]:
            columns = [(f"{way} ({'right' if solved[way].right[i] else 'wrong'})", solved[way].outs[i].texts[0])
                       for way in (GREEDY, name)]
            print("\n".join(side_by_side(asked[i].question, *columns)) + "\n")
        print(table(ways, solved))
        print(f"\n{textwrap.fill(LEGEND, line_width())}")
        first, _ = shown[0]
        begin = prompt(asked[first].question)
        lens = lm.lens(begin + solved[GREEDY].outs[first].texts[0], fusion=ways[FUSED].how["fusion"])
        sled.lens.picture(lens, path, first=len(lm.text.encode(begin)) - 1, count=32,
                          title="What each layer would say next, while the demo model solves a problem")
        print(f"\nlens picture: {path}")

    def ways(self) -> dict[str, Way]:
        """Greedy first. At rate 0, SLED is the clamp alone, and shares SLED's program."""
        fused, drafting = sled.SLED(rate=self.rate, scale=self.scale), sled.SelfSpeculation(**DRAFT)
        return {GREEDY: Way({}), CLAMP: Way({"fusion": dataclasses.replace(fused, rate=0.0)}),
                FUSED: Way({"fusion": fused}), DOLA: Way({"fusion": sled.DoLa()}),
                CONFIDENT: Way({"fusion": sled.ConfidentDecoding()}),
                LEAVING: Way({"exits": sled.EarlyExit(**EXIT)}), DRAFTING: Way({"exits": drafting}),
                FUSED_DRAFTING: Way({"fusion": fused, "exits": drafting}, FUSED)}


def like_long(lm: LM, count: int) -> list[Problem]:
    """Held-out problems whose questions are of like length."""
    return list(itertools.islice(
        (p for p in stream("heldout") if len(lm.text.encode(prompt(p.question))) in LENGTHS), count))


def solve_in_turn(lm: LM, ways: Mapping[str, Way], asked: Sequence[Problem]) -> dict[str, Solved]:
    """Every problem in all the ways, one call after the other, before the next problem.

    Before that each program is compiled, or loaded where it was kept, as many at a time as there are cores. The first
    to be ready, plain decoding's, shows its solution of the first problem while the others are prepared.
    """
    outs: dict[str, list[Output]] = {name: [] for name in ways}

    def solve(problem: Problem, how) -> Output:
        return lm.generate(prompt(problem.question), max_new_tokens=MAX_NEW_TOKENS, **how)

    def solver(name: str):
        waiting = iter(asked)
        return lambda: outs[name].append(solve(next(waiting), ways[name].how))

    # Settings that are alike but for their numbers are one program.
    programs = {jax.tree.structure(way.how): way.how for way in ways.values()}.values()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        ready = pool.map(lambda how: solve(asked[0], how), programs)
        with tqdm(total=len(programs), desc="preparing programs", unit="program") as bar:
            for index, out in enumerate(ready):
                bar.update()
                if not index:
                    bar.write("\n".join([*textwrap.wrap(asked[0].question, line_width()), out.texts[0].strip(), ""]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption waits for no compilation
    with tqdm(total=len(ways) * len(asked), desc="solving", unit="text") as bar:
        times = interleave({name: solver(name) for name in ways}, len(asked), bar)
    right = {name: [final_answer(out.texts[0]) == p.answer for out, p in zip(found, asked, strict=True)]
             for name, found in outs.items()}
    return {name: Solved(outs[name], right[name], sum(times[name].seconds)) for name in ways}


def table(ways: Mapping[str, Way], solved: Mapping[str, Solved]) -> str:
    """A line for each way, its problems compared one by one with greedy's, and what to beware of in these numbers."""
    from sled.eval.report.compare import compare  # imported here: it takes a second, in which decoding can begin

    rows = [HEADINGS]
    compared = compare({name: way.right for name, way in solved.items()}, GREEDY)
    for of in compared.rows:
        this, full = solved[of.method], solved[ways[of.method].full]
        low, high = of.interval
        depth = fmean(layer for out in this.outs for layer in out.exit_layers[0])
        paired = ("",) * 3 if of.p_value is None else (str(of.wins), str(of.losses), f"{of.p_value:.2g}")
        rows.append((
            of.method, f"{of.mean:.0%}", f"{low:.0%} - {high:.0%}", *paired,
            f"{solved[GREEDY].seconds / this.seconds:.2f}", f"{depth:.1f}",
            "" if this is full else f"{fmean(map(list.__eq__, this.tokens, full.tokens)):.0%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, "", *(textwrap.fill(note, line_width()) for note in compared.notes())])


def telling(solved: Mapping[str, Solved]) -> list[tuple[int, str]]:
    """Every problem by its number, with a way to show beside greedy: first those whose texts differ, by SLED and by
    other ways in turn."""
    greedy = solved[GREEDY].tokens
    differing = [[(i, name) for i, tokens in enumerate(solved[name].tokens) if tokens != greedy[i]]
                 for name in (FUSED, LEAVING, DOLA, CONFIDENT)]
    chosen: dict[int, str] = {}
    for i, name in filter(None, itertools.chain(*itertools.zip_longest(*differing))):
        chosen.setdefault(i, name)
    return [*chosen.items(), *((i, FUSED) for i in range(len(greedy)) if i not in chosen)]


def side_by_side(question: str, *columns: tuple[str, str]) -> list[str]:
    """A question, and under it two solutions, each with its heading."""
    width = line_width()
    half = (width - 3) // 2
    wrap = lambda text: [line for part in text.strip().splitlines() for line in textwrap.wrap(part, half)]  # noqa: E731
    rows = itertools.zip_longest(*([f"{heading}:", *wrap(text)] for heading, text in columns), fillvalue="")
    return [*textwrap.wrap(question, width), *(f"{left:{half}} | {right}".rstrip() for left, right in rows)]


def line_width() -> int:
    return min(shutil.get_terminal_size().columns, 110)
