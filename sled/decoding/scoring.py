"""Log-probabilities of given continuations under any fusion of the layers.

Each distinct prompt is run once, whatever the number of its continuations; a continuation's tokens
then run as one block on a copy of its prompt's K/V.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sled.decoding.groups import even, fetched, groups_of
from sled.decoding.network import KV, NOWHERE, Build
from sled.decoding.programs import bounded, forget_programs
from sled.decoding.readout import Readout
from sled.decoding.state import Plan, bucket, start
from sled.exits import FullDepth
from sled.fusion.partial import max_and_index
from sled.fusion.strategy import at_lower_bound

LOGITS_AT_ONCE = 2**25  # places x candidates x vocabulary of one pass: 128 MiB of float32

Pair = tuple[np.ndarray, np.ndarray]
Caches = tuple[list[KV], dict[int, KV]]  # of layers and of block heads, as a state has them


class Block(NamedTuple):
    """Continuations to be run as one block, one a row, on the K/V of their prompts.

    which_B: the row of the caches that holds each one's prompt. inputs_BT, targets_BT: the tokens read, which are the
    prompt's last and all of the continuation but its own last, and the continuation. positions_BT: of the inputs.
    order_P: an order of the B x T places in which those that hold a token come first; count_1: how many do.

    Of several groups of devices each has a block like these, on its own prompts; they stand one behind the other.
    """

    which_B: np.ndarray
    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    positions_BT: np.ndarray
    order_P: np.ndarray
    count_1: np.ndarray


def score_pairs(build: Build, params: Any, pairs: list[Pair], *, fusion, batch_size: int,
                normalise: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Scores (prompt ids, continuation ids) pairs, neither of them empty.

    Yields (index of the pair, log-probability of each continuation token [m], most likely token at each place [m],
    whether the fusion leaves the continuation's token out [m]) in an order of its own. Without `normalise` what the
    fusion gives takes the log-probability's place.
    """
    if getattr(fusion, "log_softmax", False):  # the same scores, with the lower bound still to be seen
        fusion, normalise = dataclasses.replace(fusion, log_softmax=False), True
    score = functools.partial(_score_block, build, params, fusion=fusion, normalise=normalise)
    plan = Plan.of(FullDepth(), fusion, build.outline)
    for index, scores in read_pairs(build, params, pairs, score, plan=plan, batch_size=batch_size):
        yield index, *scores


def read_pairs(build: Build, params: Any, pairs: list[Pair], read: Callable[[Caches, Block], tuple], *, plan: Plan,
               batch_size: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Runs each distinct prompt of (prompt ids, continuation ids) pairs once, and `read` on blocks of continuations.

    read: takes the prompts' caches and a block, and returns arrays with the block's places in front, in its order.
    Yields (index of the pair, these arrays at its continuation's tokens) in an order of its own.
    """
    forget_programs()
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(pairs):
        of_prompt.setdefault(tuple(prompt), []).append(index)
    prompts = sorted(of_prompt, key=len)  # rows of like length share a batch
    for begin in range(0, len(prompts), batch_size):
        some = prompts[begin:begin + batch_size]
        rows = [(row, index) for row, prompt in enumerate(some) for index in of_prompt[prompt]]
        longest = bucket(max(len(pairs[index][1]) for _, index in rows))
        capacity = bucket(len(some[-1]) + longest)
        groups, own = groups_of(build.mesh), len(some)
        full = batch_size if len(prompts) > batch_size else own
        full = even(max(full, groups) if len(rows) > 1 else full, build.mesh)
        some = [some[row % own] for row in range(full)]  # copies fill the rows, and share the continuations
        turn = collections.Counter()
        for at, (row, index) in enumerate(rows):
            copies = range(row, full, own)
            rows[at] = copies[turn[row] % len(copies)], index
            turn[row] += 1
        lengths = [len(prompt) for prompt in some]
        state = start(build, params, [np.array(p, np.int32) for p in some], lengths, [0] * len(some),
                      capacity=capacity, plan=plan)
        groups = groups if full % groups == 0 else 1
        of_group = [[(row - first, index) for row, index in rows if 0 <= row - first < full // groups]
                    for first in range(0, full, full // groups)]
        most = max(map(len, of_group))
        height = min(-(-batch_size // groups), most)
        for at in range(0, most, height):
            turns = [rows[at:at + height] for rows in of_group]
            blocks = (_block([(row, *pairs[index]) for row, index in turn], height, longest) for turn in turns)
            block = Block(*map(np.concatenate, zip(*blocks, strict=True)))
            found = fetched(read((state.caches, state.head_caches), block))
            for group, turn in enumerate(turns):
                begun = group * height * longest
                for _, index in turn:
                    end = begun + len(pairs[index][1])
                    yield index, [x_P[begun:end] for x_P in found]
                    begun = end


def _block(rows, height: int, longest: int) -> Block:
    """Of (row of the prompt, prompt, continuation) each, filled to `height` rows of `longest` places."""
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
    order_P, count_1 = np.argsort(idle_P, kind="stable"), (~idle_P).sum(keepdims=True)
    return Block(which_B, inputs_BT, targets_BT, positions_BT, order_P, count_1)


def run_places(readout: Readout, caches: Caches, block: Block) -> dict[int, jax.Array]:
    """Hidden states by number at the block's places [P, D], in its order: every place is a row of its own."""
    caches = jax.tree.map(lambda x: x[block.which_B], caches)
    h0 = readout.network.embed(block.inputs_BT, block.positions_BT)
    states, *_ = readout.run_layers(h0, block.positions_BT, *caches, 0, readout.num_layers)
    return {n: in_order(h, block) for n, h in (states | {0: h0}).items()}


def in_order(x_BT, block: Block):
    """An array of the block's places [B, T, ...] with one axis of places, in their order."""
    return x_BT.reshape(-1, *x_BT.shape[2:])[block.order_P]


@bounded(rows=("caches", "block"), settings=("fusion",), static=("normalise",))
def _score_block(build: Build, params, caches, block: Block, fusion, normalise: bool):
    """Log-probability, most likely token, and whether the token is left out, [P] each, of the block's places."""
    readout = Readout(network := build(params))
    states = run_places(readout, caches, block)

    def judge(states_PD, target_P):
        logits_PV = readout.fuse(fusion, states_PD, network.num_layers)
        scores_PV = jax.nn.log_softmax(logits_PV, axis=-1) if normalise else logits_PV
        logits_P, scores_P = (jnp.take_along_axis(x_PV, target_P[:, None], axis=-1)[:, 0]
                              for x_PV in (logits_PV, scores_PV))
        return scores_P.astype(jnp.float32), max_and_index(logits_PV)[1][:, 0], at_lower_bound(fusion, logits_P)

    def judge_some(scored_P, *inputs):
        nothing = tuple(jnp.zeros(scored_P.shape, kind) for kind in (jnp.float32, jnp.int32, bool))
        return jax.lax.cond(scored_P.any(), lambda: judge(*inputs), lambda: nothing)

    inputs = (jnp.arange(block.order_P.size) < block.count_1, states, in_order(block.targets_BT, block))
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
