"""What a decoding step cannot do without: its matrix products alone, and one reading of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from sled.lm import LM
from sled.models import Decoder
from sled.models.layers import Linear
from sled.models.layers.experts import ExpertMLP

PRODUCTS, READING = "products and head", "weights read once"


def floors(lm: LM) -> dict[str, Callable]:
    """By name, functions of prompts [B, T] and of how many tokens each gets: for every token they do this one thing
    for all rows. They return how many tokens that makes.
    """
    def way(step):
        def run(prompts_BT, tokens: int) -> int:
            jax.block_until_ready(_repeat(lm.build, lm.params, step, len(prompts_BT), tokens))
            return len(prompts_BT) * tokens

        return run

    return {PRODUCTS: way(_products), READING: way(_reading)}


@jax.jit(static_argnames=("build", "step", "batch"))
def _repeat(build, params, step, batch: int, times):
    """y <- step(network, y), as often: y [B, 1] is what binds all work to the work before it, so that it is done."""
    return jax.lax.fori_loop(0, times, lambda _, y_B1: step(build(params), y_B1), jnp.zeros((batch, 1)))


def _products(network: Decoder, y_B1):
    """The product of every weight matrix, one after another, and the logits."""
    def inputs(width: int):  # ones, but not for the compiler
        return jnp.broadcast_to(1 + 1e-9 * y_B1, (len(y_B1), width))

    for part in _parts(network):
        if isinstance(part, ExpertMLP):
            out_B1D, _ = part(inputs(network.config.width)[:, None])
            y_B1 = out_B1D[:, 0, :1]
        else:
            y_B1 = part(inputs(len(part.weight)))[:, :1]
    return network.shared_head.project(inputs(network.config.width))[:, :1]


def _parts(network: Decoder) -> Iterator[Linear | ExpertMLP]:
    for block in network.layers:
        for part in (block.attention, block.mlp):
            if isinstance(part, ExpertMLP):
                yield part
            else:
                yield from (module for _, module in nnx.iter_modules(part) if isinstance(module, Linear))


def _reading(network: Decoder, y_B1):
    """A sum over all weights of the layers and the projection."""
    weights = [network.shared_head.w_VD, *jax.tree.leaves(nnx.state(network.layers))]
    for weight in weights:
        y_B1, weight = jax.lax.optimization_barrier((y_B1, weight))
        y_B1 = y_B1 + 1e-9 * weight.astype(y_B1.dtype).sum(0).reshape(-1)[0]
    return y_B1
