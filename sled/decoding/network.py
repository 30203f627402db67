"""What decoding needs of a model, and nothing else: the seam between `models/` and `sled/decoding/`."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax

from sled.fusion.projection import SharedHead

KV = tuple[jax.Array, jax.Array]
NOWHERE = -1  # the position of a token that is switched off


class ExitHead(Protocol):
    """An exit's own way from its hidden state to logits."""

    projection: SharedHead | None
    """Its own, or None where it ends in the shared one."""

    def read(self, h) -> jax.Array:
        """The exit's hidden states [..., D] made ready for projection."""


@runtime_checkable
class BlockHead(ExitHead, Protocol):
    """An exit head that looks back, with K/V of its own: `read` takes what `run` makes of the exit's hidden states.

    `run` sees every token that the layer below the exit runs on, the exit's decision or none. So its K/V depend on the
    hidden states below alone, and are exact wherever that layer's are: after drafts that were not kept, and of tokens
    that left before. A network without such heads need know nothing of them.
    """

    def empty_cache(self, batch: int, slots: int, ahead: int) -> KV:
        """Its K/V, as `Network.empty_caches` has them of a layer."""

    def run(self, h_BTD, positions_BT, cache: KV | None) -> tuple[jax.Array, KV]:
        """Its layer, as `Network.run_layers` has one."""


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
    def shared_head(self) -> SharedHead:
        """The final projection, through which every layer's logits come."""

    def embed(self, tokens_BT, positions_BT) -> jax.Array:
        """[B, T] token ids, at these absolute positions, to hidden state 0, [B, T, D]."""

    def empty_caches(self, batch: int, slots: int, ahead: int) -> list[KV]:
        """One K/V pair per layer, for texts of `slots` positions; the slot axis is the last but one.

        A layer may keep fewer than all, if it never looks further back: tokens are written up to `ahead` positions
        beyond one that still attends.
        """

    def run_layers(self, h_BTD, positions_BT, caches: list[KV] | None, start: int,
                   stop: int) -> tuple[list[jax.Array], list[KV]]:
        """Layers start+1 .. stop over a block of tokens at the given absolute positions.

        Writes the block's K/V (at a negative position, `NOWHERE`, nothing that is ever read) and attends to positions
        0 .. its own. Of a row the positions are neighbours. Returns the layers' outputs and their caches.
        """

    def write_kv(self, h_BTD, positions_BT, caches: list[KV], start: int, stop: int) -> list[KV]:
        """K/V of layers start+1 .. stop as if `h_BTD` were the input of each of them; returns the caches."""

    def normalise(self, h) -> jax.Array:
        """The final norm, on any hidden state [..., D]."""

    def exit_head(self, layer: int) -> ExitHead | None:
        """What the exit after `layer` has of its own, or None where it shares norm and projection with the last."""


class Build(Protocol):
    """Rebuilds the network from its parameters inside a traced function. Hashable: equal builders share programs."""

    outline: Network
    """The network for what it is; its weights are not to be read."""

    mesh: jax.sharding.Mesh | None
    """The devices over which rows and weights are split; None: they lie on one."""

    def __call__(self, params: Any) -> Network: ...
