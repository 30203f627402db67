"""What decoding needs of a model, and nothing else: the seam between `models/` and `sled/decoding/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from sled.errors import SettingError
from sled.fusion.projection import fused_logits

KV = tuple[jax.Array, jax.Array]


class ExitHead(Protocol):
    """An exit's own way from its hidden state to logits."""

    projection: jax.Array | None
    """Its own [V, D], or None where it ends in the shared one."""

    def read(self, h) -> jax.Array:
        """The exit's hidden states [..., D] made ready for projection."""


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

    def exit_head(self, layer: int) -> ExitHead | None:
        """What the exit after `layer` has of its own, or None where it shares norm and projection with the last."""


# Rebuilds the network from its parameters inside a traced function. Hashable: equal builders share
# compiled programs.
Build = Callable[[Any], Network]


def candidates(network: Network, states: Mapping[int, jax.Array], early: tuple[int, ...], norm_early: bool,
               last: int) -> jax.Array:
    """Hidden states [..., C, D] for a fusion: the early layers asked for, each in its form (`form_of`), then layer
    `last`, read by its exit head.
    """
    def early_one(n):
        form = form_of(network, n, norm_early)
        if form == "head":
            return network.exit_head(n).read(states[n])
        return network.normalise(states[n]) if form == "normed" else states[n]

    return jnp.stack([*map(early_one, early), read(network, states[last], last)], axis=-2)


def form_of(network: Network, layer: int, norm_early: bool) -> Literal["raw", "normed", "head"]:
    """How early layer `layer` goes into a fusion: as it is, through the final norm, or read by its exit head.

    A layer with a head is read by it whatever `norm_early` says: a head is trained for what it gives. Not if the head
    has its own projection, which says nothing of how the state looks to the one that a fusion shares.
    """
    head = network.exit_head(layer)
    if head is not None and head.projection is None:
        return "head"
    return "normed" if norm_early else "raw"


def read(network: Network, h, layer: int) -> jax.Array:
    """Hidden state `layer` [..., D] made ready for projection: by that exit's head, or else by the final norm."""
    head = network.exit_head(layer)
    return network.normalise(h) if head is None else head.read(h)


def own_projection(network: Network, layer: int) -> jax.Array | None:
    """The projection [V, D] that only the exit after `layer` has, or None where it takes the shared one."""
    head = network.exit_head(layer)
    return None if head is None else head.projection


def fused_layers(network: Network, fusion, last: int) -> tuple[int, ...]:
    """The early layers that the fusion looks at where `last` speaks last.

    Raises SettingError for layers that the model lacks, and for several layers at an exit with its own projection:
    a fusion compares logits of one projection.
    """
    early = fusion.early_layers(last, tied=network.tied_head)
    if early and own_projection(network, last) is not None:
        raise SettingError(f"{type(fusion).__name__} looks at layers {early} at the exit after layer {last}, whose "
                           "head has a projection of its own, so that their logits cannot be compared; use FinalLayer "
                           "there, or a head with tied=True")
    return early


def fuse(network: Network, fusion, states: Mapping[int, jax.Array], last: int, *, places: int | None = None):
    """The fusion's logits [P, V] at P places where layer `last` speaks last: the model's end, or an exit.

    states: hidden states [P, D] by layer, at least those that the fusion looks at. places: how many
    there are in all, where P is only a part of them (under `vmap`).
    """
    early = fused_layers(network, fusion, last)
    h_PCD = candidates(network, states, early, fusion.norm_early, last)
    own_VD = own_projection(network, last)
    w_VD = network.head_weight if own_VD is None else own_VD
    return fused_logits(fusion, h_PCD, w_VD, (places or h_PCD.shape[0]) * h_PCD.shape[1])
