"""How often texts that should be equal are: plain decoding in batches, against the same texts decoded in other ways.

In exact arithmetic every way gives plain decoding's tokens. On a machine, the products of another block of tokens add
up in another order; what is rounded away differs, and where two tokens are nearly tied, the other one may win. From
there the texts part. So the first difference of a text tells all: how far apart the logits of the two tokens were, in
one pass of the model over the text before them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sled
from sled.bench.report import BenchReport, column
from sled.bench.solving import mixed_questions
from sled.decoding.readout import Readout
from sled.decoding.state import bucket
from sled.exits.policy import with_last
from sled.fusion import FinalLayer
from sled.lm import LM
from sled.loading import DTYPES
from sled.plots import writable_picture
from sled.settings.rules import OneOf, Whole

CHUNK = 5  # tokens between two pauses of a stream


@dataclasses.dataclass
class WayRow:
    """One way to decode all texts; gaps are at the first differences."""

    way: str = column("way")
    equal: int = column("texts equal")
    texts: int = column("of")
    median_gap: float | None = column("gap, median", decimals=4)
    largest_gap: float | None = column("gap, largest", decimals=4)
    largest_steps: float | None = column("in steps of the type")


@dataclasses.dataclass
class DifferenceRow:
    """The first difference of one text: the new token of this number, from 1, and the gap between the two logits."""

    way: str = column("way")
    text: int = column("text")
    number: int = column("new token")
    plain: str = column("plain decoding has")
    other: str = column("this way has")
    gap: float = column("gap", decimals=4)
    steps: float = column("in steps of the type")


def run_exactness_bench(model: str = "demo", *, dtype: str = "bfloat16", texts: int = 16, new_tokens: int = 64,
                        batch_size: int = 4, exit_layer: int | None = None, draft: int = 6,
                        picture: Path | None = None) -> BenchReport:
    """Decodes `texts` held-out word problems greedily in every way, with weights of type `dtype`.

    batch_size: texts decoded together. exit_layer: where drafts are made, and where tokens could leave that never do;
    None: after a quarter of the layers. Draws the gaps into `picture`, if given.

    Raises SettingError for a number out of range, and what loading raises.
    """
    dtype = OneOf(tuple(DTYPES))("dtype", dtype)
    texts = Whole(1, hint="it counts the problems")("texts", texts)
    batch = min(texts, Whole(1, hint="it counts the texts decoded together")("batch_size", batch_size))
    if picture:
        writable_picture("--picture", picture)
    lm = sled.load(model, dtype=dtype)
    layer = max(1, lm.config.num_layers // 4) if exit_layer is None else exit_layer
    with_last("exit_layer", (layer,), lm.config.num_layers)
    prompts = mixed_questions(lm, texts)[:texts]
    room = lm.config.max_positions - max(map(len, prompts))
    new_tokens = Whole(1, room, hint="prompts and new tokens lie in the model's context")("new_tokens", new_tokens)
    ways = decoded_in_every_way(lm, prompts, new_tokens, batch, layer, draft)
    made = {name: way() for name, way in tqdm(ways.items(), desc="sled bench exactness", unit="way")}
    plain = made.pop("plain")
    step = float(jnp.finfo(DTYPES[dtype]).eps)
    rows, differences, usual = _compared(lm, prompts, plain, made, step)
    if picture:
        from sled.bench.pictures import draw_exactness  # imported here: matplotlib is slow

        draw_exactness(usual, differences, dtype, picture)
    title = (f"Texts equal to plain decoding in batches of {batch}: {texts} held-out word problems, {new_tokens} new "
             f"tokens at most, {lm.name}, {dtype}")
    return BenchReport(title, {"model": lm.name, "dtype": dtype, "new_tokens": new_tokens, "batch": batch,
                               "exit_layer": layer, "draft": draft}, [*rows, *differences], _notes(usual, rows))


def decoded_in_every_way(lm: LM, prompts: list[list[int]], new_tokens: int, batch: int, layer: int,
                         draft: int) -> dict[str, Callable[[], list[list[int]]]]:
    """What decodes the prompts to the same tokens, but for rounding, by name; plain decoding in batches first."""

    def generate(size: int = batch, **how) -> list[list[int]]:
        return lm.generate(prompts, max_new_tokens=new_tokens, batch_size=size, **how).tokens

    def stream() -> list[list[int]]:
        rows = []
        for at in range(0, len(prompts), batch):
            pieces = lm.stream(prompts[at:at + batch], max_new_tokens=new_tokens, chunk=CHUNK)
            rows += map(list, map(itertools.chain, *(piece.tokens for piece in pieces)))
        return rows

    def engine() -> list[list[int]]:
        server = sled.Engine(lm, slots=batch, capacity=min(lm.config.max_positions, 2 * longest))
        requests = [server.submit(prompt, max_new_tokens=new_tokens) for prompt in prompts]
        return [request.result().tokens for request in requests]

    longest = max(map(len, prompts)) + new_tokens
    larger = min(2 * batch, len(prompts))
    return {
        "plain": generate, "again": generate, **({"each alone": lambda: generate(1)} if batch > 1 else {}),
        **({f"batches of {larger}": lambda: generate(larger)} if larger > batch else {}),
        f"streamed, {CHUNK} tokens at a time": stream,
        f"by the engine, {batch} slot{'s' * (batch > 1)}": engine,
        f"early exit after {layer}, threshold 1": lambda: generate(exits=sled.EarlyExit(layer, threshold=1.0)),
        f"self-speculation after {layer}, drafts of {draft}": lambda: generate(
            exits=sled.SelfSpeculation(layer, draft=draft)),
    }


def _compared(lm: LM, prompts, plain, made: dict[str, list[list[int]]], step: float):
    """A row per way, a row per first difference, and the gaps between plain decoding's two best tokens, of every token.
    """
    found: dict[str, list[DifferenceRow]] = {name: [] for name in made}
    usual = []
    width = bucket(max(len(p) + len(t) for p, t in zip(prompts, plain, strict=True)))
    most = max(map(len, plain))
    for i, (prompt, tokens) in enumerate(zip(prompts, plain, strict=True)):
        text_T = np.zeros(width, np.int32)
        text_T[:len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits_NV = np.asarray(_logits_of_new(lm.build, lm.params, text_T, np.int32(len(prompt) - 1), most))
        best_N2 = np.sort(np.partition(logits_NV[:len(tokens)], -2)[:, -2:])
        usual.append(best_N2[:, 1] - best_N2[:, 0])
        for name, rows in made.items():
            if rows[i] != tokens:
                at = next(n for n, pair in enumerate(zip(tokens, rows[i], strict=False)) if pair[0] != pair[1])
                one, other = tokens[at], rows[i][at]
                gap, size = abs(float(logits_NV[at, one] - logits_NV[at, other])), abs(float(logits_NV[at, one]))
                found[name].append(DifferenceRow(
                    name, i + 1, at + 1, lm.text.token(one), lm.text.token(other), gap,
                    gap / (step * 2.0 ** math.floor(math.log2(size)))))
    rows = [WayRow(name, len(prompts) - len(mine), len(prompts), *_of_gaps(mine)) for name, mine in found.items()]
    return rows, [row for mine in found.values() for row in mine], np.concatenate(usual)


def _of_gaps(rows: Sequence[DifferenceRow]) -> tuple[float | None, float | None, float | None]:
    if not rows:
        return None, None, None
    gaps = [row.gap for row in rows]
    return float(np.median(gaps)), max(gaps), max(row.steps for row in rows)


@functools.partial(jax.jit, static_argnames=("build", "most"))
def _logits_of_new(build, params, text_T, before, most: int):
    """The logits [most, V] of the tokens after position `before`, in one pass over the text."""
    network = build(params)
    positions_1T = jnp.arange(text_T.shape[0])[None]
    states, _ = network.run_layers(network.embed(text_T[None]), positions_1T, None, 0, network.num_layers)
    h_ND = jnp.take(states[-1][0], before + jnp.arange(most), axis=0, mode="clip")
    return Readout(network).fuse(FinalLayer(), {network.num_layers: h_ND}, network.num_layers)


def _notes(usual: np.ndarray, rows: Sequence[WayRow]) -> list[str]:
    largest = max((row.largest_gap for row in rows if row.largest_gap is not None), default=None)
    notes = ["gap: between the logits of the two tokens where a text first differs from plain decoding's, in one pass "
             "over the text before them; in steps of the type: over the distance of neighbouring numbers of that type "
             f"at that logit. Of all {usual.size} tokens of plain decoding, the two best tokens lie "
             f"{np.median(usual):.2f} apart (median)"]
    if largest is None:
        return [f"{notes[0]}."]
    return [f"{notes[0]}; {np.mean(usual <= largest):.1%} of them no further than the largest gap here: those are the "
            "ties that rounding decides."]
