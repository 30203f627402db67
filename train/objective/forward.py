"""The forward pass of training: tokens in, the hidden states of the wanted exits out, the other layers' forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sled.errors import SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.models.layers import Block, LayerContext, traced_windows
from sled.models.sharding.sharding import Sharding
from sled.settings.rules import OneOf, is_array
from sled.train.objective.balance import Routed, routed
from sled.train.objective.layer_dropout import Drops

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT_RULE = OneOf(tuple(REMAT), hint="full needs the least memory")


def exit_states(model: Decoder, tokens_BT, exits: Sequence[int] | jax.Array, **options) -> jax.Array:
    """The hidden states of `states_and_routing` alone: [E, B, T, D]."""
    return states_and_routing(model, tokens_BT, exits, **options)[0]


def states_and_routing(model: Decoder, tokens_BT, exits: Sequence[int] | jax.Array, *, segments_BT=None,
                       drops: Drops | None = None, remat: str = "full", compute_dtype=None,
                       sharding: Sharding | None = None) -> tuple[jax.Array, Routed | None]:
    """The hidden states number `exits` of whole sequences, [E, B, T, D], none of them normed; and what experts got.

    The latter are sums over all layers that ran and all their rows that were not dropped, but for tokens of segment 0,
    which are padding; None where there are no experts.

    model: in the stacked form. Its parameters keep their type; every layer's are cast to `compute_dtype` (None: as
        they are) where the layer runs, and so are the hidden states. Norms and softmax take float32 all the same.
    exits: numbers within 1..L, strictly ascending; E is static, the numbers may be traced. Layers above the last exit
        are not run, unless the numbers are traced.
    segments_BT: which document of a packed row each token belongs to. A token sees only the run of equal numbers
        that it lies in, and positions start anew with each run. Padding is a document of its own.
    drops: what layer dropout drops at this step (`LayerDropout.draw`).
    remat: what the backward pass finds stored of each layer, beside its input: "none" everything it needs, "full"
        nothing, "dots" every matrix product, "projections" the products with weights, not attention's. Less stored
        is more computed again, which where memory is slow (a CPU) may still be the faster.
    sharding: of the model on a mesh, which holds the embeddings and every layer's output to their place.

    Raises SettingError for a model in the separate form, and for exits or remat out of their range.
    """
    depth, place = model.num_layers, sharding.activations if sharding else (lambda h_BTD: h_BTD)
    experts, mesh = model.config.experts, sharding and sharding.mesh
    check_stacked(model)
    remat = REMAT_RULE("remat", remat)
    stop = _last_layer(exits, depth)
    dtype = jnp.dtype(compute_dtype or model.embedding.weight[...].dtype)
    counts_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT > 0
    context = context_of_rows(model.config, tokens_BT.shape[1], segments_BT)
    rows = context, counts_BT if experts else None
    graph, weights_L = nnx.split(model.layers)

    def layer(h_BTD, weights, window, drop, number):
        def run(h, rows):
            context, counts_BT = rows
            block = nnx.merge(graph, cast(weights, dtype))
            h, _, routing = block.run(h, context.for_window(window)._replace(mesh=mesh), None)
            return h, routing and routed(routing, counts_BT)

        return run(h_BTD, rows) if drop is None else drop.strategy.apply(run, h_BTD, rows, drop, number)

    exits_E = jnp.asarray(exits, jnp.int32)
    count = exits_E.shape[0]
    slots_L = jnp.searchsorted(exits_E, jnp.arange(1, depth + 1))  # of the first exit that is not below the layer
    h_BTD = place(cast(model.embed(tokens_BT, context.positions_BT), dtype))
    total = experts and Routed(jnp.zeros(experts.count), jnp.zeros(experts.count), jnp.zeros(()))
    carry = h_BTD, jnp.zeros((count, *h_BTD.shape), dtype), total
    begin = 0
    lengths = [depth] if drops is None else drops.strategy.stretches(depth)
    for length, part in _parts(lengths, stop, (weights_L, traced_windows(model.config.windows), slots_L, drops)):

        def body(carry, xs, begin=begin):
            (h, states, total), (weights, window, slot, drop) = carry, xs
            run = lambda h, weights: layer(h, weights, window, drop, begin)  # noqa: E731
            if remat != "none":
                run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False)
            h, of_rows = run(h, weights)
            h = place(h)
            total = jax.tree.map(lambda total, of_rows: total + of_rows.sum(0), total, of_rows)
            # Every layer writes into the next exit's place, the exit itself last: a layer moves one state, the
            # backward pass needs none of them, and traced exits cost no more than static ones.
            last = states[count - 1]
            return (h, states.at[slot].set(jnp.where(slot < count, h, last), mode="clip"), total), None

        carry, _ = jax.lax.scan(body, carry, part)
        begin += length
    return carry[1:]


def check_stacked(model: Decoder) -> None:
    if not isinstance(model.layers, Block):
        raise SettingError("the model's layers are separate; training takes the stacked form: model.stack()")


def _last_layer(exits, depth: int) -> int:
    """The number of layers to run."""
    if is_array(exits):
        return depth
    numbers = list(exits)
    ascending = numbers == sorted({int(n) for n in numbers})
    if not numbers or not ascending or not 1 <= numbers[0] <= numbers[-1] <= depth:
        raise SettingError(f"exits is {exits!r}, but must be numbers of hidden states within 1..{depth}, strictly "
                           "ascending")
    return numbers[-1]


def context_of_rows(config: DecoderConfig, length: int, segments_BT) -> LayerContext:
    """What layers read beside the hidden states of rows of this length, but for their windows; segments as of
    `states_and_routing`."""
    index_1T = jnp.arange(length)[None]
    if segments_BT is None:
        positions = index_1T
    else:
        first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        positions = index_1T - jax.lax.cummax(jnp.where(first_BT, index_1T, 0), axis=1)
        segments_BT = jnp.cumsum(first_BT, axis=1)  # runs: a number that comes back is another document
    return LayerContext.of(config, positions, segments_BT)


def _parts(lengths: list[int], stop: int, stacked) -> list[tuple[int, Any]]:
    """Stacked arrays of the first `stop` layers, cut into stretches of these lengths, each with its length."""
    ends = [end for end in itertools.accumulate(lengths) if end < stop] + [stop]
    sizes = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    beyond = [sum(lengths) - stop] if stop < sum(lengths) else []
    if len(sizes + beyond) == 1:
        return [(stop, stacked)]
    leaves, tree = jax.tree.flatten(stacked)
    cut = [jax.lax.split(leaf, sizes + beyond) for leaf in leaves]  # its transpose is one concatenation
    return [(size, tree.unflatten([parts[i] for parts in cut])) for i, size in enumerate(sizes)]


def cast(tree, dtype):
    """Floating-point arrays in another type."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
