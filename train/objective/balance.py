"""The load-balancing loss of a mixture of experts, which keeps the router from choosing the same few for every token.

X times the sum over experts x of (share of the tokens that chose x) times (mean probability of x): Switch Transformers
(arXiv 2101.03961, equations 4 to 6), over the tokens of all layers together, as transformers'
`load_balancing_loss_func` has it. Axes: X experts, A of which each token chooses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sled.models.layers import Routing


class Routed(NamedTuple):
    """Sums over tokens, of each row or of many: how often each expert was chosen, its probability, their number."""

    chosen_BX: jax.Array
    probability_BX: jax.Array
    tokens_B: jax.Array


def routed(routing: Routing, counts_BT) -> Routed:
    """The sums of one layer. counts_BT: how much each token counts, 0 for padding."""
    counts_BT = counts_BT.astype(routing.logits_BTX.dtype)
    experts = routing.logits_BTX.shape[-1]
    chosen_BTX = jax.nn.one_hot(routing.chosen_BTA, experts, dtype=counts_BT.dtype).sum(-2)
    sums = (jnp.einsum("btx,bt->bx", of_tokens, counts_BT)
            for of_tokens in (chosen_BTX, jax.nn.softmax(routing.logits_BTX)))
    return Routed(*sums, counts_BT.sum(-1))


def balance_loss(layers: Routed) -> jax.Array:
    """The loss, without its coefficient, of sums over all layers and rows; at its least it is A."""
    tokens = jnp.maximum(layers.tokens_B, 1)
    experts = layers.chosen_BX.shape[-1]
    return experts * jnp.sum(layers.chosen_BX / tokens * (layers.probability_BX / tokens))
