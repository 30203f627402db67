"""The one way from a layer's hidden state to logits: through its exit head, or the norm and projection all share.

Fusion, drafts, the lens, exit losses and export read layers through this class, so that an exit head, a norm or a
treatment of the logits has one home.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sled.decoding.network import Network
from sled.errors import SettingError
from sled.fusion.projection import SharedHead, fused_logits


class Readout(NamedTuple):
    """Reads the layers of `network`."""

    network: Network

    @property
    def num_layers(self) -> int:
        return self.network.num_layers

    def __call__(self, h, layer: int) -> tuple[jax.Array, SharedHead]:
        """Hidden state `layer` [..., D] made ready for projection, and the projection that its logits come from."""
        return self.pre_logits(h, layer), self.head(layer)

    def pre_logits(self, h, layer: int) -> jax.Array:
        """Hidden state `layer` [..., D] made ready for projection: by its exit head, or else by the final norm."""
        head = self.network.exit_head(layer)
        return self.network.normalise(h) if head is None else head.read(h)

    def head(self, layer: int) -> SharedHead:
        """The projection of the exit after `layer`: its own, or the one that all share."""
        return self.own_projection(layer) or self.network.shared_head

    def own_projection(self, layer: int) -> SharedHead | None:
        """The projection that only the exit after `layer` has, or None where it takes the shared one."""
        head = self.network.exit_head(layer)
        return None if head is None else head.projection

    def form(self, layer: int, norm_early: bool) -> Literal["raw", "normed", "head"]:
        """The form in which early layer `layer` enters a fusion: as it is, normed, or made ready by its exit head.

        A layer with a head goes through it whatever `norm_early` is: a head is trained for what it gives. Not if the
        head has its own projection: then its state is made for that, not for the projection that a fusion shares.
        """
        head = self.network.exit_head(layer)
        if head is not None and head.projection is None:
            return "head"
        return "normed" if norm_early else "raw"

    def early_layers(self, fusion, last: int) -> tuple[int, ...]:
        """The early layers that the fusion looks at where `last` is the last layer that takes part.

        Raises SettingError for layers that the model lacks, and for several layers at an exit with its own projection:
        a fusion compares logits of one projection.
        """
        early = fusion.early_layers(last, tied=self.network.tied_head)
        if early and self.own_projection(last) is not None:
            raise SettingError(f"{type(fusion).__name__} looks at layers {early} at the exit after layer {last}, whose "
                               "head has a projection of its own, so that their logits cannot be compared; use "
                               "FinalLayer there, or a head with tied=True")
        return early

    def candidates(self, states: Mapping[int, jax.Array], early: tuple[int, ...], norm_early: bool,
                   last: int) -> jax.Array:
        """Hidden states [..., C, D] for a fusion: the early layers asked for, each in its `form`, then the last one."""
        def early_one(n: int):
            match self.form(n, norm_early):
                case "head":
                    return self.pre_logits(states[n], n)
                case "normed":
                    return self.network.normalise(states[n])
            return states[n]

        final = self.pre_logits(states[last], last)
        # Of one type: states may be wider than what a norm gives, and would have the projection widened for them.
        return jnp.stack([*(early_one(n).astype(final.dtype) for n in early), final], axis=-2)

    def fuse(self, fusion, states: Mapping[int, jax.Array], last: int) -> jax.Array:
        """The fusion's logits [P, V] at P positions where `last` is the last layer: the model's end, or an exit.

        states: hidden states [P, D] by layer, at least those that the fusion looks at.
        """
        h_PCD = self.candidates(states, self.early_layers(fusion, last), fusion.norm_early, last)
        return fused_logits(fusion, h_PCD, self.head(last))
