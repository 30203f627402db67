"""The one way from a layer's hidden state to logits: through its exit head, or the norm and projection all share.

Fusion, drafts, the lens, exit losses and export read layers through this class, so that an exit head, a norm or a
treatment of the logits has one home.

Hidden states go by the numbers of their layers. Where the exit after layer n has a head that looks back (`BlockHead`),
what that made of hidden state n goes by -n: a layer's input is the one, what is read there the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sled.decoding.network import KV, BlockHead, Network
from sled.errors import SettingError
from sled.fusion.projection import SharedHead, fused_logits, with_tile


class Readout(NamedTuple):
    """Reads the layers of `network`."""

    network: Network

    @property
    def num_layers(self) -> int:
        return self.network.num_layers

    def __call__(self, states: Mapping[int, jax.Array], layer: int) -> tuple[jax.Array, SharedHead]:
        """Hidden state `layer` [..., D] made ready for projection, and the projection that its logits come from."""
        return self.pre_logits(states, layer), self.head(layer)

    def pre_logits(self, states: Mapping[int, jax.Array], layer: int) -> jax.Array:
        """Hidden state `layer` [..., D] made ready for projection: by its exit head, or else by the final norm.

        states: by number, as `run_layers` gives them.
        """
        head = self.network.exit_head(layer)
        return self.network.normalise(states[layer]) if head is None else head.read(states[self.source(layer)])

    def block_head(self, layer: int) -> BlockHead | None:
        """The head of the exit after `layer`, if it looks back."""
        head = self.network.exit_head(layer)
        return head if isinstance(head, BlockHead) else None

    def source(self, layer: int) -> int:
        """The number of what the exit after `layer` reads."""
        return layer if self.block_head(layer) is None else -layer

    def source_in_fusion(self, layer: int) -> int:
        """The number of what a fusion reads of early layer `layer`: see `form`."""
        return self.source(layer) if self.form(layer, True) == "head" else layer

    def empty_head_caches(self, layers: Iterable[int], batch: int, slots: int, ahead: int) -> dict[int, KV]:
        """Zeroed K/V of the block heads after these layers; as `Network.empty_caches`."""
        return {n: self.block_head(n).empty_cache(batch, slots, ahead) for n in layers}

    def run_layers(self, h_BTD, positions_BT, caches: list[KV] | None, head_caches: Mapping[int, KV] | None, start: int,
                   stop: int) -> tuple[dict[int, jax.Array], list[KV], dict[int, KV]]:
        """Layers start+1 .. stop over a block of tokens, as `Network.run_layers`, and block heads beside them.

        head_caches: K/V of block heads by layer; heads that have none here do not run. None, as for a block that stands
        alone: all run.
        Returns hidden states by number, the layers' caches, and all heads'.
        """
        new, caches = self.network.run_layers(h_BTD, positions_BT, caches, start, stop)
        states, held = dict(enumerate(new, start + 1)), dict(head_caches or {})
        for n in range(start + 1, stop + 1):
            head = self.block_head(n)
            if head is not None and (head_caches is None or n in head_caches):
                states[-n], held[n] = head.run(states[n], positions_BT, held.get(n))
        return states, caches, held

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
                    return self.pre_logits(states, n)
                case "normed":
                    return self.network.normalise(states[n])
            return states[n]

        final = self.pre_logits(states, last)
        # Of one type: states may be wider than what a norm gives, and would have the projection widened for them.
        return jnp.stack([*(early_one(n).astype(final.dtype) for n in early), final], axis=-2)

    def fuse(self, fusion, states: Mapping[int, jax.Array], last: int) -> jax.Array:
        """The fusion's logits [P, V] at P positions where `last` is the last layer: the model's end, or an exit.

        states: hidden states [P, D] by number, at least those that the fusion looks at.
        """
        h_PCD = self.candidates(states, self.early_layers(fusion, last), fusion.norm_early, last)
        return fused_logits(fusion, h_PCD, self.head(last))

    def certain_by_layer(self, fusion, final_PV, states: Mapping[int, jax.Array], last: int, asked_P) -> jax.Array:
        """At which of the P positions asked for [P] the fusion proves, from the last layer's logits and some of the
        early ones, that its choice is the last layer's. states: as for `fuse`."""
        def certain(head, h_PCD, final_PV, asked_P):
            return asked_P & fusion.certain_by_layer(final_PV, h_PCD, head, asked_P)

        h_PCD = self.candidates(states, self.early_layers(fusion, last), fusion.norm_early, last)
        return with_tile(certain, self.head(last), h_PCD, final_PV, asked_P)
