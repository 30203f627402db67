"""Log-probabilities of given continuations under any fusion of the layers.

Each distinct prompt is run once, whatever the number of its continuations; a continuation's tokens
then run as one block on a copy of its prompt's K/V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sled.decoding.network import NOWHERE, Build
from sled.decoding.programs import bounded, forget_programs
from sled.decoding.readout import Readout
from sled.decoding.state import Plan, bucket, start
from sled.exits import FullDepth
from sled.fusion.partial import max_and_index
from sled.fusion.strategy import at_lower_bound

LOGITS_AT_ONCE = 2**25  # places x candidates x vocabulary of one pass: 128 MiB of float32

Pair = tuple[np.ndarray, np.ndarray]


def score_pairs(build: Build, params: Any, pairs: list[Pair], *, fusion, batch_size: int,
                normalise: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Scores (prompt ids, continuation ids) pairs, neither of them empty.

    Yields (index of the pair, log-probability of each continuation token [m], most likely token at each place [m],
    whether the fusion leaves the continuation's token out [m]) in an order of its own. Without `normalise` what the
    fusion gives takes the log-probability's place.
    """
    if getattr(fusion, "log_softmax", False):  # the same scores, with the lower bound still to be seen
        fusion, normalise = dataclasses.replace(fusion, log_softmax=False), True
    forget_programs()
    plan = Plan.of(FullDepth(), fusion, build.outline)
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(pairs):
        of_prompt.setdefault(tuple(prompt), []).append(index)
    prompts = sorted(of_prompt, key=len)  # rows of like length share a batch
    for begin in range(0, len(prompts), batch_size):
        some = prompts[begin:begin + batch_size]
        rows = [(row, index) for row, prompt in enumerate(some) for index in of_prompt[prompt]]
        longest = bucket(max(len(pairs[index][1]) for _, index in rows))
        capacity = bucket(len(some[-1]) + longest)
        if len(prompts) > batch_size:
            some = some + some[-1:] * (batch_size - len(some))
        lengths = [len(prompt) for prompt in some]
        state = start(build, params, [np.array(p, np.int32) for p in some], lengths, [0] * len(some),
                      capacity=capacity, plan=plan)
        height = min(batch_size, len(rows))
        for at in range(0, len(rows), height):
            some_rows = rows[at:at + height]
            block = _block([(row, *pairs[index]) for row, index in some_rows], height, longest)
            judged = jax.device_get(_score_block(build, params, (state.caches, state.head_caches), *block, fusion,
                                                 normalise))
            begun = 0
            for _, index in some_rows:
                end = begun + len(pairs[index][1])
                yield index, *(x_P[begun:end] for x_P in judged)
                begun = end


def _block(rows, height: int, longest: int):
    """Arrays for `_score_block`: a row's inputs are its prompt's last token and all but its own last.

    The last two are an order of the places in which those with a token to score come first, and how many these are.
    """
    which_B = np.zeros(height, np.int32)
    inputs_BT, targets_BT = np.zeros((2, height, longest), np.int32)
    positions_BT = np.full((height, longest), NOWHERE, np.int32)
    for b, (row, prompt, continuation) in enumerate(rows):
        m = len(continuation)
        which_B[b] = row
        inputs_BT[b, :m] = [prompt[-1], *continuation[:-1]]
        targets_BT[b, :m] = continuation
        positions_BT[b, :m] = len(prompt) - 1 + np.arange(m)
    idle_P = positions_BT.ravel() == NOWHERE
    return which_B, inputs_BT, targets_BT, positions_BT, np.argsort(idle_P, kind="stable"), (~idle_P).sum()


@bounded(static_argnames=("build", "normalise"))
def _score_block(build: Build, params, caches, which_B, inputs_BT, targets_BT, positions_BT, order_P, scored,
                 fusion, normalise: bool):
    """Log-probability, most likely token, and whether the token is left out, [P] each, of the first `scored` places in
    the order `order_P`."""
    readout = Readout(network := build(params))
    caches = jax.tree.map(lambda x: x[which_B], caches)
    h0 = network.embed(inputs_BT, positions_BT)
    states, *_ = readout.run_layers(h0, positions_BT, *caches, 0, network.num_layers)
    flat = lambda x: x.reshape(-1, *x.shape[2:])[order_P]  # noqa: E731  every place is a row of its own

    def judge(states_PD, target_P):
        logits_PV = readout.fuse(fusion, states_PD, network.num_layers)
        scores_PV = jax.nn.log_softmax(logits_PV, axis=-1) if normalise else logits_PV
        logits_P, scores_P = (jnp.take_along_axis(x_PV, target_P[:, None], axis=-1)[:, 0]
                              for x_PV in (logits_PV, scores_PV))
        return scores_P.astype(jnp.float32), max_and_index(logits_PV)[1][:, 0], at_lower_bound(fusion, logits_P)

    def judge_some(scored_P, *inputs):
        nothing = tuple(jnp.zeros(scored_P.shape, kind) for kind in (jnp.float32, jnp.int32, bool))
        return jax.lax.cond(scored_P.any(), lambda: judge(*inputs), lambda: nothing)

    inputs = (jnp.arange(order_P.size) < scored, {n: flat(h) for n, h in (states | {0: h0}).items()},
              flat(targets_BT))
    layers = 1 + len(fusion.early_layers(network.num_layers, tied=network.tied_head))
    return map_places(judge_some, inputs, layers * network.shared_head.vocabulary)


def map_places(f: Callable, inputs, logits_per_place: int):
    """f over arrays with a leading axis of places, as many places at once as memory should hold."""
    count = jax.tree.leaves(inputs)[0].shape[0]
    passes = -(-count // max(1, LOGITS_AT_ONCE // logits_per_place))
    each = -(-count // passes)

    def cut(x):
        padding = [(0, passes * each - count)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(passes, each, *x.shape[1:])

    outputs = jax.lax.map(lambda xs: f(*xs), jax.tree.map(cut, inputs))
    return jax.tree.map(lambda y: y.reshape(passes * each, *y.shape[2:])[:count], outputs)
