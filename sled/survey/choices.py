"""The token that every layer would choose at each token of given continuations, and how sure it is of it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sled.decoding.network import Build
from sled.decoding.options import FINAL_LAYER, FULL_DEPTH
from sled.decoding.programs import bounded
from sled.decoding.readout import Readout
from sled.decoding.scoring import in_order, map_places, read_pairs, run_places
from sled.decoding.state import Plan
from sled.fusion.partial import max_and_index
from sled.lm import LM

STATES_AT_ONCE = 2**26  # layers x tokens x width of one pass: 256 MiB of float32
KINDS = (jnp.int32, jnp.float32, jnp.float32, jnp.int32)  # of the fields of `Choices`


class Choices(NamedTuple):
    """At each of the T tokens of one continuation, before it is read, by the layers 1 .. L.

    token_LT: the layer's most likely token, int32. probability_LT: what the layer gives to it, float32.
    logprob_LT: the logarithm of what it gives to the continuation's own token, float32.
    draft_LT: the most likely of the first token ids that were asked for, or `token_LT` again.
    """

    token_LT: np.ndarray
    probability_LT: np.ndarray
    logprob_LT: np.ndarray
    draft_LT: np.ndarray


def layer_choices(lm: LM, pairs: list[tuple[np.ndarray, np.ndarray]], *, batch_size: int, progress: bool,
                  first_ids: int | None = None) -> list[Choices]:
    """The choices of all layers over (prompt ids, continuation ids) pairs, neither of them empty.

    Each layer is read through its exit head where it has one, else through the final norm and projection, in one pass
    over the text: every token's choice is made after the tokens before it in the text. Never holds more logits than
    those of one layer at some places. first_ids: how many of the token ids drafts may be of, None for all.
    """
    longest = max(len(continuation) for _, continuation in pairs)
    rows = max(1, min(batch_size, STATES_AT_ONCE // (lm.config.num_layers * lm.config.width * longest)))
    read = functools.partial(_read_block, lm.build, first_ids, lm.params)
    readout = Readout(lm.build.outline)
    heads = tuple(n for n in range(1, lm.config.num_layers) if readout.block_head(n) is not None)
    plan = Plan.of(FULL_DEPTH, FINAL_LAYER, lm.build.outline)._replace(block_heads=heads)
    found = read_pairs(lm.build, lm.params, pairs, read, plan=plan, batch_size=rows)
    bar = tqdm(found, total=len(pairs), desc="reading the layers", unit="text", disable=not progress)
    choices = {index: Choices(*(x_PL.T for x_PL in read)) for index, read in bar}
    return [choices[index] for index in range(len(pairs))]


@bounded(rows=("caches", "block"), static=("first_ids",))
def _read_block(build: Build, first_ids: int | None, params, caches, block):
    """The fields of `Choices`, [P, L] each, at the block's places."""
    readout = Readout(network := build(params))
    depth, shared = network.num_layers, network.shared_head
    states = run_places(readout, caches, block)

    def choose(h_PD, head, target_P):
        logits_PV = head.project(h_PD)
        norm_P = jax.nn.logsumexp(logits_PV, axis=-1)
        best_P1, token_P1 = max_and_index(logits_PV)
        target_logit_P = jnp.take_along_axis(logits_PV, target_P[:, None], axis=-1)[:, 0]
        draft_P1 = token_P1
        if first_ids is not None:  # masked, as devices may split the vocabulary
            draft_P1 = max_and_index(jnp.where(jnp.arange(shared.vocabulary) < first_ids, logits_PV, -jnp.inf))[1]
        return token_P1[:, 0], jnp.exp(best_P1[:, 0] - norm_P), target_logit_P - norm_P, draft_P1[:, 0]

    def read(states_PD, target_P):
        ready = [readout.pre_logits(states_PD, n) for n in range(1, depth + 1)]
        # One layer's logits at a time, never those of all.
        h_LPD = jnp.stack([h_PD.astype(ready[-1].dtype) for h_PD in ready])
        found = jax.lax.map(lambda h_PD: choose(h_PD, shared, target_P), h_LPD)
        for n in range(1, depth):
            if readout.own_projection(n) is not None:
                own = choose(ready[n - 1], readout.head(n), target_P)
                found = jax.tree.map(lambda x_LP, own_P, n=n: x_LP.at[n - 1].set(own_P), found, own)
        return tuple(x_LP.T.astype(kind) for x_LP, kind in zip(found, KINDS, strict=True))

    def read_some(asked_P, *inputs):
        nothing = tuple(jnp.zeros((asked_P.size, depth), kind) for kind in KINDS)
        return jax.lax.cond(asked_P.any(), lambda: read(*inputs), lambda: nothing)

    asked_P = jnp.arange(block.order_P.size) < block.count_1
    return map_places(read_some, (asked_P, states, in_order(block.targets_BT, block)), shared.vocabulary)
