"""The decoder: embeddings, layers, final norm, and the one projection that every layer speaks through.

Two forms of the same weights. *Separate* (a list of blocks) serves decoding: each layer's weights
are read where they lie. *Stacked* (one block whose parameters have a leading layer axis) serves
training: `lax.scan` compiles one layer instead of L. `stack` and `unstack` convert once. Exit heads,
where there are any, take part in both.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sled.errors import PromptError
from sled.fusion.projection import SharedHead
from sled.models.config import DecoderConfig, ExitHeads
from sled.models.exit_heads import BoundBlockHead, BoundHead, ExitHead
from sled.models.layers import KV, Block, Embedding, LayerContext, LayerNorm, RMSNorm, empty_cache, norm_of
from sled.models.sharding.mesh import ways_in_use

# Parts whose parameters have one more, leading axis in the stacked form, and what that axis is called.
STACKED = {"layers": "layers", "exit_heads": "exits"}

# How hidden states and logits are computed: raised wherever the same weights come to give others, if only in a narrow
# type, so that calibrations and kept answers from before do not pass for this version's. 2: float32 between layers; 3:
# and within norms, their weights too.
ARITHMETIC = 3


class Decoder(nnx.Module):
    """A decoder-only transformer that gives every layer's hidden state.

    `config.num_layers` = L. Hidden state 0 is the embedding output, n is the output of layer n (of
    1..L), none of them normed; `normalise` applies the final norm, `logits` the shared projection.
    `exit_head` is what an exit has of its own, where `config.exit_heads` names it.
    """

    def __init__(self, config: DecoderConfig, *, embed: Embedding, positions: Embedding | None,
                 layers: nnx.List | Block, norm: RMSNorm | LayerNorm, head: Embedding | None,
                 exit_heads: nnx.List | ExitHead | None = None):
        self.config = config
        self.embedding = embed
        self.positions = positions
        self.layers = layers
        self.norm = norm
        self.head = head
        self.exit_heads = exit_heads

    @classmethod
    def init(cls, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32) -> Decoder:
        """Random weights in the separate form. Under `nnx.eval_shape` it allocates nothing."""
        table = lambda rows, axis: Embedding(rows, config.width, axis, dtype=dtype, rngs=rngs)  # noqa: E731
        decoder = cls(
            dataclasses.replace(config, exit_heads=None),
            embed=table(config.vocab_size, "vocab"),
            positions=table(config.max_positions, "positions") if config.rope is None else None,
            layers=nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]),
            norm=norm_of(config, config.width, dtype),
            head=None if config.tied_head else table(config.vocab_size, "vocab"),
        )
        return decoder if config.exit_heads is None else decoder.with_exit_heads(config.exit_heads, rngs=rngs)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def tied_head(self) -> bool:
        """True where the shared projection is the embedding table itself."""
        return self.head is None

    @property
    def shared_head(self) -> SharedHead:
        """The final projection, through which every layer's logits come."""
        table = self.embedding if self.head is None else self.head
        w_VD = table.weight[...][:self.config.vocab_size]  # without rows that fill it up over a mesh
        return SharedHead(w_VD, shards=ways_in_use("tensor") or 1, cap=self.config.logit_cap)

    def embed(self, tokens_BT, positions_BT) -> jax.Array:
        """Hidden state 0 of each token: [B, T, D], float32 (or wider), whatever type the weights have.

        `positions_BT` [B or 1, T] matter where they are learned; those outside the table, of tokens that are switched
        off, are read as its nearest.

        So all hidden states are: rounded after every layer to a narrower type, they would differ about twice as much
        between blocks of other shapes, and near ties fall otherwise twice as often.
        """
        h_BTD, scale = self.embedding(tokens_BT), self.config.embedding_scale
        if scale is not None:
            h_BTD = h_BTD * jnp.asarray(scale, h_BTD.dtype)  # rounded to the weights' type, as transformers has it
        h_BTD = h_BTD.astype(jnp.promote_types(h_BTD.dtype, jnp.float32))
        return h_BTD if self.positions is None else h_BTD + self.positions(positions_BT)

    def empty_caches(self, batch: int, slots: int, ahead: int) -> list[KV]:
        """Zeroed K/V caches of every layer for `slots` positions: L pairs of [B, K, slots + 1, H].

        Layers with a window have fewer: as many as the window, and `ahead` more (see `layers.attention.ring_size`).
        """
        dtype = self.embedding.weight.dtype
        return [empty_cache(self.config, window, batch, slots, ahead, dtype) for window in self.config.windows]

    def run_layers(self, h_BTD, positions_BT, caches: list[KV] | None, start: int,
                   stop: int) -> tuple[list[jax.Array], list[KV]]:
        """Layers start+1 .. stop on a block of tokens, separate form.

        `h_BTD` is hidden state `start`; `positions_BT` are the tokens' absolute positions; `caches`
        holds the K/V of exactly those layers, or None for a block that stands alone. Returns the hidden
        states start+1 .. stop and those layers' new K/V.
        The tokens of a row stand at neighbouring positions. At a negative one a token writes nothing that is ever
        read: so are tokens and rows switched off.
        """
        context = LayerContext.of(self.config, positions_BT)
        states, new = [], []
        for i, cache in zip(range(start, stop), caches or [None] * (stop - start), strict=True):
            h_BTD, kv = self.layers[i](h_BTD, context.for_window(self.config.windows[i]), cache)
            states.append(h_BTD)
            new.append(kv)
        return states, new

    def write_kv(self, h_BTD, positions_BT, caches: list[KV], start: int, stop: int) -> list[KV]:
        """K/V of layers start+1 .. stop as if `h_BTD` were the input of each, written into their caches.

        CALM's propagation (arXiv 2207.07061) for tokens that left before these layers. Separate form.
        """
        context = LayerContext.of(self.config, positions_BT)
        return [self.layers[i].write_kv(h_BTD, context.for_window(self.config.windows[i]), cache)
                for i, cache in zip(range(start, stop), caches, strict=True)]

    def hidden_states(self, tokens_BT) -> jax.Array:
        """Every hidden state of whole sequences, separate form: [L + 1, B, T, D], none of them normed.

        Raises PromptError for sequences beyond learned positions.
        """
        if self.positions is not None and tokens_BT.shape[1] > self.config.max_positions:
            raise PromptError(f"the sequences have {tokens_BT.shape[1]} tokens, but {self.config.max_positions} "
                              "positions were learned; shorten them")
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        h0 = self.embed(tokens_BT, positions)
        states, _ = self.run_layers(h0, positions, None, 0, self.num_layers)
        return jnp.stack([h0, *states])

    def normalise(self, h) -> jax.Array:
        """The final norm, on any layer's hidden state [..., D]."""
        return self.norm(h)

    def logits(self, h, *, norm: bool = True) -> jax.Array:
        """Any hidden state [..., D] through the shared projection: [..., V], float32 (or wider).

        `norm=False` skips the final norm, as SLED's and DoLa's released code does for early layers.
        """
        return self.shared_head.project(self.normalise(h) if norm else h)

    def exit_head(self, layer: int) -> BoundHead | None:
        """The head of the exit after `layer`, or None where it shares norm and projection with the last layer."""
        heads = self.config.exit_heads
        if heads is None or layer not in heads.layers:
            return None
        index, made = heads.layers.index(layer), self.exit_heads
        head = _one_of(made, index) if isinstance(made, ExitHead) else made[index]
        if heads.kind == "block":
            return BoundBlockHead(head, self.norm, self.shared_head, self.config, self.config.head_windows[index])
        return BoundHead(head, self.norm, self.shared_head)

    def with_exit_heads(self, heads: ExitHeads | None, *, rngs: nnx.Rngs | None = None) -> Decoder:
        """The same decoder, its weights shared, with new exit heads that leave every logit as it is; None: without.

        Norms and projections begin as copies of the model's own, affine maps, MLPs and blocks as the identity. `rngs`
        draws the MLP's first matrices (None: seed 0). In either form.
        """
        config, rngs = dataclasses.replace(self.config, exit_heads=heads), rngs or nnx.Rngs(0)
        stacked = isinstance(self.layers, Block)

        def above(n: int) -> Block:
            # Where shapes alone are asked for, one layer may stand for all (`sled.models.stored`).
            return _one_of(self.layers, n) if stacked else self.layers[min(n, len(self.layers) - 1)]

        made = heads and nnx.List([
            ExitHead(config, above=above(n) if heads.kind == "block" else None, norm=self.norm,
                     projection=self.shared_head.w_VD, rngs=rngs) for n in heads.layers])
        return self._with_parts(self.layers, _stacked(made) if made and stacked else made, config)

    def for_long_context(self) -> Decoder:
        """The same decoder, its weights shared, for texts of all its positions: see `DecoderConfig`."""
        return self._with_parts(self.layers, self.exit_heads, self.config.for_long_context())

    def stack(self) -> Decoder:
        """The stacked form: each layer parameter gains a leading axis L, each exit head's an axis E. Copies once."""
        return self._with_parts(_stacked(self.layers), self.exit_heads and _stacked(self.exit_heads))

    def unstack(self) -> Decoder:
        """The separate form of a stacked decoder. Copies the layers and exit heads once."""
        heads = self.config.exit_heads
        return self._with_parts(_separated(self.layers, self.num_layers),
                                heads and _separated(self.exit_heads, len(heads.layers)))

    def _with_parts(self, layers, exit_heads, config: DecoderConfig | None = None) -> Decoder:
        return Decoder(config or self.config, embed=self.embedding, positions=self.positions, layers=layers,
                       norm=self.norm, head=self.head, exit_heads=exit_heads)


def _stacked(modules: nnx.List):
    graphs, states = zip(*(nnx.split(module) for module in modules), strict=True)
    return nnx.merge(graphs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def _separated(module: nnx.Module, count: int) -> nnx.List:
    return nnx.List([_one_of(module, i) for i in range(count)])


def _one_of(module: nnx.Module, index: int):
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))
