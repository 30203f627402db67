"""The decoder: embeddings, layers, final norm, and the one projection that every layer speaks through.

Two forms of the same weights. *Separate* (a list of blocks) serves decoding: each layer's weights
are read where they lie. *Stacked* (one block whose parameters have a leading layer axis) serves
training: `lax.scan` compiles one layer instead of L. `stack` and `unstack` convert once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sled.models.config import DecoderConfig
from sled.models.layers import KV, Block, RMSNorm, rotary_angles


class Embedding(nnx.Module):
    """A [V, D] table: rows looked up for tokens, or multiplied with hidden states for logits."""

    def __init__(self, vocab_size: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, width), dtype))


class Decoder(nnx.Module):
    """A decoder-only transformer that gives every layer's hidden state.

    `config.num_layers` = L. Hidden state 0 is the embedding output, n is the output of layer n (of
    1..L), none of them normed; `normalise` applies the final norm, `logits` the shared projection.
    """

    def __init__(self, config: DecoderConfig, *, embed: Embedding, layers: nnx.List | Block, norm: RMSNorm,
                 head: Embedding | None):
        self.config = config
        self.embedding = embed
        self.layers = layers
        self.norm = norm
        self.head = head

    @classmethod
    def init(cls, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32) -> Decoder:
        """Random weights in the separate form. Under `nnx.eval_shape` it allocates nothing."""
        table = lambda: Embedding(config.vocab_size, config.width, dtype=dtype, rngs=rngs)  # noqa: E731
        return cls(
            config,
            embed=table(),
            layers=nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]),
            norm=RMSNorm(config.width, eps=config.norm_eps, dtype=dtype),
            head=None if config.tied_head else table(),
        )

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def tied_head(self) -> bool:
        """Whether the shared projection is the embedding table itself."""
        return self.head is None

    @property
    def head_weight(self) -> jax.Array:
        """The shared final projection W [V, D]."""
        return (self.embedding if self.head is None else self.head).weight[...]

    @property
    def windows_L(self) -> jax.Array:
        """How many positions back each layer sees, as numbers for a scan over layers: [L]."""
        unlimited = jnp.iinfo(jnp.int32).max  # not max_positions: a longer sequence would be cut
        return jnp.array([unlimited if w is None else w for w in self.config.windows])

    def embed(self, tokens_BT) -> jax.Array:
        """Hidden state 0 of each token: [B, T, D]."""
        return jnp.take(self.embedding.weight[...], tokens_BT, axis=0)

    def empty_caches(self, batch: int, slots: int) -> list[KV]:
        """Zeroed K/V caches of every layer for `slots` positions: L pairs of [B, K, slots + 1, H]."""
        shape = (batch, self.config.num_kv_heads, slots + 1, self.config.head_dim)
        dtype = self.embedding.weight[...].dtype
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.num_layers)]

    def run_layers(self, h_BTD, positions_BT, caches: list[KV] | None, start: int,
                   stop: int) -> tuple[list[jax.Array], list[KV]]:
        """Layers start+1 .. stop on a block of tokens, separate form.

        `h_BTD` is hidden state `start`; `positions_BT` are the tokens' absolute positions; `caches`
        holds the K/V of exactly those layers, or None for a block that stands alone (prefill,
        training). Returns the hidden states start+1 .. stop and those layers' new K/V.
        A position without a slot writes nothing that is ever read: so are rows switched off.
        """
        angles = rotary_angles(self.config, positions_BT)
        states, new = [], []
        for i in range(start, stop):
            cache = None if caches is None else caches[i - start]
            h_BTD, kv = self.layers[i](h_BTD, positions_BT, angles, cache, self.config.windows[i])
            states.append(h_BTD)
            new.append(kv)
        return states, new

    def write_kv(self, h_BTD, positions_BT, caches: list[KV], start: int, stop: int) -> list[KV]:
        """K/V of layers start+1 .. stop as if `h_BTD` were the input of each, written into their caches.

        CALM's propagation (arXiv 2207.07061) for tokens that left before these layers. Separate form.
        """
        angles = rotary_angles(self.config, positions_BT)
        return [self.layers[i].write_kv(h_BTD, positions_BT, angles, cache)
                for i, cache in zip(range(start, stop), caches, strict=True)]

    def hidden_states(self, tokens_BT) -> jax.Array:
        """Every hidden state of whole sequences, either form: [L + 1, B, T, D], none of them normed."""
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        h0 = self.embed(tokens_BT)
        if not isinstance(self.layers, Block):
            states, _ = self.run_layers(h0, positions, None, 0, self.config.num_layers)
            return jnp.stack([h0, *states])

        angles = rotary_angles(self.config, positions)
        graph, weights_L = nnx.split(self.layers)

        def layer(h, xs):
            weights, window = xs
            h, _ = nnx.merge(graph, weights)(h, positions, angles, None, window)
            return h, h

        _, states = jax.lax.scan(layer, h0, (weights_L, self.windows_L))
        return jnp.concatenate([h0[None], states])

    def normalise(self, h) -> jax.Array:
        """The final norm, on any layer's hidden state [..., D]."""
        return self.norm(h)

    def logits(self, h, *, norm: bool = True) -> jax.Array:
        """Any hidden state [..., D] through the shared projection: [..., V], float32 (or wider).

        `norm=False` skips the final norm, as SLED's and DoLa's released code does for early layers.
        """
        h = self.normalise(h) if norm else h
        wide = jnp.promote_types(h.dtype, jnp.float32)
        return jnp.matmul(h, self.head_weight.T, preferred_element_type=wide)

    def stack(self) -> Decoder:
        """The stacked form: each layer parameter gains a leading axis L. Copies the layers once."""
        graphs, states = zip(*(nnx.split(block) for block in self.layers), strict=True)
        stacked = nnx.merge(graphs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        return self._with_layers(stacked)

    def unstack(self) -> Decoder:
        """The separate form of a stacked decoder. Copies the layers once."""
        graph, state = nnx.split(self.layers)
        blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
                  for i in range(self.config.num_layers)]
        return self._with_layers(nnx.List(blocks))

    def _with_layers(self, layers) -> Decoder:
        return Decoder(self.config, embed=self.embedding, layers=layers, norm=self.norm, head=self.head)
