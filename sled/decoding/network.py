"""What decoding needs of a model, and nothing else: the seam between `models/` and `sled/decoding/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sled.fusion.head import SharedHead, default_tile

KV = tuple[jax.Array, jax.Array]


class Network(Protocol):
    """A decoder that shows every layer's hidden state.

    Hidden state 0 is the embedding output, n the output of layer n of 1..L. `sled.models.Decoder`
    is one; any object with these members decodes.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def tied_head(self) -> bool:
        """Whether the shared projection is the embedding table (DoLa then skips the first layers)."""

    @property
    def head_weight(self) -> jax.Array:
        """The shared final projection W [V, D]."""

    def embed(self, tokens_BT) -> jax.Array:
        """[B, T] token ids to hidden state 0, [B, T, D]."""

    def empty_caches(self, batch: int, slots: int) -> list[KV]:
        """One K/V pair per layer; the slot axis is the last but one."""

    def run_layers(self, h_BTD, positions_BT, caches: list[KV] | None, start: int,
                   stop: int) -> tuple[list[jax.Array], list[KV]]:
        """Layers start+1 .. stop over a block of tokens at the given absolute positions.

        Writes the block's K/V into its slots (slot = position; a position beyond the cache writes
        nothing) and attends to slots 0 .. position. Returns the layers' outputs and their caches.
        """

    def normalise(self, h) -> jax.Array:
        """The final norm, on any hidden state [..., D]."""


# Rebuilds the network from its parameters inside a traced function. Hashable: equal builders share
# compiled programs.
Build = Callable[[Any], Network]


def candidates(network: Network, states: list[jax.Array], early: tuple[int, ...], norm_early: bool) -> jax.Array:
    """Hidden states [..., C, D] for a fusion: the early layers asked for, then the final one, normed.

    `states` are hidden states 0 .. L, each [..., D].
    """
    picked = [network.normalise(states[i]) if norm_early else states[i] for i in early]
    return jnp.stack([*picked, network.normalise(states[network.num_layers])], axis=-2)


def fuse(network: Network, fusion, states: list[jax.Array]) -> jax.Array:
    """The fusion's logits [P, V] from hidden states 0 .. L of P places, each [P, D]."""
    early = fusion.early_layers(network.num_layers, tied=network.tied_head)
    h_PCD = candidates(network, states, early, fusion.norm_early)
    return fusion.logits(h_PCD, head_of(network, h_PCD))


def head_of(network: Network, h_PCD) -> SharedHead:
    """The shared projection, in the form that suits so many places and candidates."""
    w_VD = network.head_weight
    return SharedHead(w_VD, tile=default_tile(h_PCD.shape[0] * h_PCD.shape[1], w_VD.shape[0]))
