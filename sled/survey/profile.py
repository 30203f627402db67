"""The times of the parts of a step on this machine: layers, projection, and the real loop around them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sled.decoding import loop
from sled.decoding.batch import Generation
from sled.decoding.network import Build
from sled.decoding.options import FINAL_LAYER, FULL_DEPTH, GREEDY, Decoding
from sled.decoding.programs import bounded, forget_programs
from sled.decoding.readout import Readout
from sled.decoding.state import DecodeState, Plan, start
from sled.errors import DecodingWarning, warn
from sled.exits import EarlyExit, Policy, SelfSpeculation
from sled.exits.schedule import Timing
from sled.fusion.partial import max_and_index
from sled.lm import LM
from sled.survey.costs import Costs

ROUNDS = 8
BUSY = 1.25  # times a step that its parts seem to take on a machine that is not quiet
LONG = 0.03  # seconds of one measurement, so that to begin it counts little
SHORT_DRAFT, LONG_DRAFT = 4, 8  # of the two cycles that are timed; they are verified in blocks of one size
Measure = Callable[[int], float]  # seconds of one, of so many in a row


def measured_costs(lm: LM, prompts: Sequence[np.ndarray], *, draft_layer: int, exit_layer: int, windows: Sequence[int],
                   capacity: int, progress: bool, first_ids: int | None = None) -> Costs:
    """The costs of a batch of these prompts, with caches for `capacity` positions: of every part the fastest round.

    draft_layer, exit_layer: where the loop is timed with drafts and with an early exit. windows: tokens of a row that
    a verification takes. first_ids: how many token ids drafts may be of, None for all.
    """
    forget_programs()
    bench = _Bench(lm, prompts, capacity)
    short, long = (SelfSpeculation(draft_layer, draft, max_draft=LONG_DRAFT) for draft in (SHORT_DRAFT, LONG_DRAFT))
    leaves, stays = (EarlyExit(exit_layer, threshold) for threshold in (0.0, 1.0))
    cycle = leaves.window  # tokens that leave until their K/V must be made
    sizes = sorted({*loop.block_sizes(cycle), *windows})
    parts: dict[Any, Measure] = {
        **{("layers", size): bench.layers(size) for size in sizes},
        **{("head", size): bench.head(size) for size in sizes},
        **({"few": bench.head(1, first_ids)} if first_ids else {}),
        "plain": bench.steps(FULL_DEPTH, 1), "call": bench.calls(),
        "short": bench.steps(short, SHORT_DRAFT + 1), "long": bench.steps(long, LONG_DRAFT + 1),
        "leaves": bench.steps(leaves, cycle), "stays": bench.steps(stays, 1)}
    times = _fastest(parts, progress)
    apart = times["layers", 1] + times["head", 1]
    if apart > BUSY * times["plain"]:
        warn(f"the layers and the projection of a step took {apart:.3g} s by themselves, but a whole step "
             f"{times['plain']:.3g} s: other work ran on this machine meanwhile, so the speeds are wrong; time them "
             "again on a quiet machine, or leave them out with profile=False (--no-profile)", DecodingWarning)
    return _solved(times, lm.config.num_layers, sizes, draft_layer, exit_layer, long.window, cycle)


def _solved(times: dict[Any, float], depth: int, sizes: Sequence[int], draft_layer: int, exit_layer: int, window: int,
            cycle: int) -> Costs:
    """What is left of the times of whole cycles when their layers and projections are taken off.

    Two cycles of drafts differ by drafting steps alone; a cycle of tokens that leave and a step in which none does, by
    steps with an exit and by runs of the layers above.
    """
    costs = Costs(depth, {size: times["layers", size] / depth for size in sizes},
                  {size: times["head", size] for size in sizes}, times.get("few"))
    layer, head, above = costs.layer, costs.head, depth - exit_layer
    drafting = (times["long"] - times["short"]) / (LONG_DRAFT - SHORT_DRAFT)
    first = drafting - head(1)
    verifying = times["short"] - SHORT_DRAFT * drafting - first
    left = times["leaves"] - cycle * head(1) - above * layer(cycle)
    stayed = times["stays"] - 2 * head(1) - above * layer(1)
    exit_step = (left - stayed) / (cycle - 1)
    return Costs(depth, costs.layer_of, costs.head_of, costs.few, plain=times["plain"] - costs.step,
                 draft=first - draft_layer * layer(1),
                 verify=verifying - (depth - draft_layer) * layer(window) - head(window),
                 exit=exit_step - exit_layer * layer(1), deeper=stayed - exit_step,
                 call=times["call"] - times["plain"])


def _fastest(parts: dict[Any, Measure], progress: bool) -> dict[Any, float]:
    """Seconds of every part in its fastest round; all are timed in turn, round by round."""
    counts, times = {}, {}
    with tqdm(total=len(parts) * (ROUNDS + 1), desc="timing this machine", unit="part", disable=not progress) as bar:
        for name, measure in parts.items():
            measure(1)  # compiles
            times[name] = min(measure(4), measure(4))
            counts[name] = math.ceil(LONG / times[name])
            bar.update()
        for _ in range(ROUNDS):
            for name, measure in parts.items():
                times[name] = min(times[name], measure(counts[name]))
                bar.update()
    return times


class _Bench:
    """What times the parts of decoding a batch of prompts, at the positions after them."""

    def __init__(self, lm: LM, prompts: Sequence[np.ndarray], capacity: int):
        self._lm, self._prompts, self._capacity = lm, list(prompts), capacity
        self._lengths_B = np.array([len(p) for p in prompts], np.int32)

    def layers(self, tokens: int) -> Measure:
        """All layers over `tokens` tokens of each row."""
        lm, caches = self._lm, self._start(FULL_DEPTH).caches
        positions_BT = self._lengths_B[:, None] + np.arange(tokens, dtype=np.int32)
        return lambda times: _seconds(_run_layers, lm.build, lm.params, caches, positions_BT, times) / times

    def head(self, tokens: int, first_ids: int | None = None) -> Measure:
        """The projection and the choice at `tokens` tokens of each row, of all or of the first ids."""
        lm, places = self._lm, len(self._prompts) * tokens
        h_PD = jax.eval_shape(lm.build.outline.embed, *[jax.ShapeDtypeStruct((places, 1), np.int32)] * 2)
        h_PD = np.random.default_rng(0).normal(size=(places, lm.config.width)).astype(h_PD.dtype)
        return lambda times: _seconds(_run_head, lm.build, lm.params, h_PD, times, first_ids) / times

    def steps(self, policy: Policy, cycle: int) -> Measure:
        """`cycle` steps of the loop, in which a row emits at most as many tokens."""
        lm, rows = self._lm, len(self._prompts)
        room = self._capacity - int(self._lengths_B.max()) - policy.window
        timing = Timing(*map(np.int32, policy.schedule.timing(policy.verifies)))

        def measure(times: int) -> float:
            times = max(1, min(times, room // cycle))
            limit_B, steps = np.full(rows, self._capacity, np.int32), np.int32(times * cycle)
            return _seconds(loop.decode, lm.build, lm.params, self._start(policy), policy, timing, FINAL_LAYER, GREEDY,
                            np.array([-1], np.int32), limit_B, steps, np.bool_(False)) / times

        return measure

    def calls(self) -> Measure:
        """Steps of plain decoding with what surrounds a batch, each."""
        lm, rows, room = self._lm, len(self._prompts), self._capacity - int(self._lengths_B.max())

        def measure(times: int) -> float:
            times = min(times, room)
            run = Generation(lm.build, lm.params, self._prompts, Decoding(), limits=[room] * rows, seeds=[0] * rows,
                             stop_ids=())
            begun = time.perf_counter()
            for _ in range(times):
                run.advance(1)
            return (time.perf_counter() - begun) / times

        return measure

    def _start(self, policy: Policy) -> DecodeState:
        lm, rows = self._lm, len(self._prompts)
        return start(lm.build, lm.params, self._prompts, [self._capacity] * rows, [0] * rows, capacity=self._capacity,
                     plan=Plan.of(policy, FINAL_LAYER, lm.build.outline), memory=policy.initial_memory(rows))


def _seconds(run: Callable, *arguments) -> float:
    jax.block_until_ready(arguments[2])
    begun = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - begun


@bounded(rows=("caches", "positions_BT"))
def _run_layers(build: Build, params, caches, positions_BT, times):
    """All layers, so many times, each time on what came out before: none can be left out."""
    network = build(params)

    def run(_, carry):
        h_BTD, caches = carry
        states, caches = network.run_layers(h_BTD, positions_BT, caches, 0, network.num_layers)
        return network.normalise(states[-1]).astype(h_BTD.dtype), caches

    h_BTD = network.embed(jnp.zeros_like(positions_BT), positions_BT)
    return jax.lax.fori_loop(0, times, run, (h_BTD, caches))[0]


@bounded(rows=("h_PD",), static=("first_ids",))
def _run_head(build: Build, params, h_PD, times, first_ids: int | None):
    """The last layer's choices, so many times; of the first ids alone as drafts are made."""
    readout = Readout(build(params))
    head = readout.network.shared_head
    few = head if first_ids is None else head.some(first_ids)

    def run(_, h_PD):
        if first_ids is None:
            logits_PV = readout.fuse(FINAL_LAYER, {readout.num_layers: h_PD}, readout.num_layers)
        else:
            logits_PV = few.project(readout.network.normalise(h_PD))
        return jnp.where(max_and_index(logits_PV)[1] < 0, 0, h_PD)  # itself, which the compiler cannot know

    return jax.lax.fori_loop(0, times, run, h_PD)
