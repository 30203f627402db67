"""What decoding needs of a model, and nothing else: the seam between `models/` and `sled/decoding/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        """One K/V pair per layer, with room for `slots` positions; the slot axis is the last but one."""

    def run_layers(self, h_BTD, positions_BT, caches: list[KV] | None, start: int,
                   stop: int) -> tuple[list[jax.Array], list[KV]]:
        """Layers start+1 .. stop over a block of tokens at the given absolute positions.

        Writes the block's K/V into its slots (slot = position; a position from `slots` on writes
        nothing that is ever read) and attends to slots 0 .. position. Returns the layers' outputs and their caches.
        """

    def write_kv(self, h_BTD, positions_BT, caches: list[KV], start: int, stop: int) -> list[KV]:
        """K/V of layers start+1 .. stop as if `h_BTD` were the input of each of them; returns the caches."""

    def normalise(self, h) -> jax.Array:
        """The final norm, on any hidden state [..., D]."""


# Rebuilds the network from its parameters inside a traced function. Hashable: equal builders share
# compiled programs.
Build = Callable[[Any], Network]


def candidates(network: Network, states: Mapping[int, jax.Array], early: tuple[int, ...], norm_early: bool,
               last: int) -> jax.Array:
    """Hidden states [..., C, D] for a fusion: the early layers asked for, then layer `last`, normed."""
    picked = [network.normalise(states[n]) if norm_early else states[n] for n in early]
    return jnp.stack([*picked, network.normalise(states[last])], axis=-2)


def fuse(network: Network, fusion, states: Mapping[int, jax.Array], last: int, *, places: int | None = None):
    """The fusion's logits [P, V] at P places where layer `last` speaks last: the model's end, or an exit.

    states: hidden states [P, D] by layer, at least those that the fusion looks at. places: how many
    there are in all, where P is only a part of them (under `vmap`).
    """
    early = fusion.early_layers(last, tied=network.tied_head)
    h_PCD = candidates(network, states, early, fusion.norm_early, last)
    w_VD = network.head_weight
    rows = (places or h_PCD.shape[0]) * h_PCD.shape[1]
    return fusion.logits(h_PCD, SharedHead(w_VD, tile=default_tile(rows, w_VD.shape[0])))
