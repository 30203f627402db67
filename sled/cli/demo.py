"""`sled demo`: the bundled model on problems it has never seen, decoded five ways."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import tyro

import sled
from sled.cli.derived import derive, offer, settings_of
from sled.cli.options import ModelOptions
from sled.cli.values import NewPath
from sled.plots import writable_picture
from sled.settings.rules import Whole

MAX_NEW_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Demo(derive("Fused", *settings_of(offer(sled.SLED, "rate", "scale")))):
    """Solve held-out word problems greedily and by SLED; print a table, and draw what each layer predicts.

    Runs offline on the bundled model, within a minute or two on a CPU.
    """

    problems: int = 100
    """Held-out problems to solve for the table."""
    show: int = 3
    """Problems to print with both solutions."""
    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"])] = Path("sled-demo")
    """Folder for the lens picture."""

    def run(self) -> None:
        from sled.demo.problems import problems, prompt
        from sled.eval.numbers import final_answer

        Whole(1, hint="it counts the problems to solve")("--problems", self.problems)
        Whole(0, hint="it counts the problems to print")("--show", self.show)
        path = writable_picture("--out", self.out / "lens.png")
        ways = {
            "greedy (last layer)": sled.FinalLayer(),
            f"clamp only (k={self.scale})": sled.ClampOnly(scale=self.scale),
            f"SLED (rate={self.rate:g}, k={self.scale})": sled.SLED(rate=self.rate, scale=self.scale),
            "DoLa (low layers)": sled.DoLa(),
            "Confident Decoding": sled.ConfidentDecoding(),
        }
        lm = ModelOptions().load()
        asked = problems("heldout", self.problems, seed=0)
        prompts = [prompt(p.question) for p in asked]
        print(f"{len(asked)} held-out problems, {lm.config.num_layers} layers, "
              f"{len(ways)} ways to decode the same model\n")
        table = []
        for name, fusion in ways.items():
            print(f"  {name} ...", flush=True)
            solve = functools.partial(lm.generate, prompts, max_new_tokens=MAX_NEW_TOKENS, fusion=fusion, batch_size=50)
            solve(progress=True)  # compiles; the second run is the one that is timed
            out = solve()
            right = sum(final_answer(text) == p.answer for text, p in zip(out.texts, asked, strict=True))
            table.append((name, out, right))
        print()
        for i, p in enumerate(itertools.islice(asked, self.show)):
            print("\n".join(side_by_side(p.question, table[0][1].texts[i], table[2][1].texts[i])) + "\n")
        print(f"{'method':28}  exact match  tokens/s (compiled before)")
        for name, out, right in table:
            print(f"{name:28}  {right:4d} / {len(asked):<4d}  {out.stats.tokens_per_second:8.0f}")
        text = prompts[0] + table[0][1].texts[0]
        lens = lm.lens(text, fusion=sled.SLED(rate=self.rate, scale=self.scale))
        first = max(0, len(lm.text.encode(prompts[0])) - 1)
        sled.lens.picture(lens, path, first=first, count=32,
                          title="What each layer would say next, while the demo model solves a problem")
        print(f"\nlens picture: {path}")


def side_by_side(question: str, greedy: str, sled: str) -> list[str]:
    """A question, and under it two solutions in two columns."""
    width = min(shutil.get_terminal_size().columns, 110)
    half = (width - 3) // 2
    wrap = lambda text: [line for part in text.strip().splitlines() for line in textwrap.wrap(part, half)]  # noqa: E731
    rows = itertools.zip_longest(["greedy:", *wrap(greedy)], ["SLED:", *wrap(sled)], fillvalue="")
    return [*textwrap.wrap(question, width), *(f"{left:{half}} | {right}".rstrip() for left, right in rows)]
