"""The forward pass of training: tokens in, the hidden states of the wanted exits out, the other layers' forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sled.errors import SettingError
from sled.models.config import DecoderConfig, Experts
from sled.models.decoder import Decoder
from sled.models.layers import Block, LayerContext, traced_windows
from sled.models.sharding.mesh import ROWS
from sled.models.sharding.sharding import Sharding
from sled.settings.rules import OneOf, is_array
from sled.train.objective.balance import Routed, routed
from sled.train.objective.layer_dropout import Drops
from sled.train.parallel.pipeline import STAGE, check_microbatches, pipeline

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
                       sharding: Sharding | None = None,
                       microbatches: int | None = None) -> tuple[jax.Array, Routed | None]:
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
    sharding: of the model on a mesh, which holds the embeddings and every layer's output to their place. Where it has
        stages, the layers run as a pipeline (`sled.train.parallel.pipeline`), always all of them.
    microbatches: into how many parts the pipeline cuts the rows of each group of devices; None: as many as it likes.

    Raises SettingError for a model in the separate form, for exits or remat out of their range, and for rows that do
    not divide into the microbatches.
    """
    depth, experts = model.num_layers, model.config.experts
    check_stacked(model)
    stop = _last_layer(exits, depth)
    dtype = jnp.dtype(compute_dtype or model.embedding.weight[...].dtype)
    counts_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT > 0
    context = context_of_rows(model.config, tokens_BT.shape[1], segments_BT)
    rows = context, counts_BT if experts else None
    graph, weights_L = nnx.split(model.layers)
    layers = _Layers(graph, depth, dtype, REMAT_RULE("remat", remat), experts, sharding)
    exits_E = jnp.asarray(exits, jnp.int32)
    h_BTD = layers.place(cast(model.embed(tokens_BT, context.positions_BT), dtype))
    stacked = weights_L, traced_windows(model.config.windows), jnp.arange(1, depth + 1), drops
    if sharding is not None and sharding.mesh.shape[STAGE] > 1:
        return _in_stages(layers, exits_E, h_BTD, rows, stacked, microbatches)
    carry, begin = layers.begin(exits_E, h_BTD), 0
    lengths = [depth] if drops is None else drops.strategy.stretches(depth)
    for length, part in _parts(lengths, stop, stacked):
        carry = layers(exits_E, carry, rows, part, begin)
        begin += length
    return carry[1:]


class _Layers(NamedTuple):
    """Runs layers over rows, and keeps the hidden states of exits on the way."""

    graph: nnx.GraphDef
    depth: int
    dtype: jnp.dtype
    remat: str
    experts: Experts | None
    sharding: Sharding | None
    in_stage: bool = False

    def place(self, h_BTD, *, in_front: int = 0):
        """The hidden states where they are to lie; in_front: axes before the rows."""
        if self.sharding is None:
            return h_BTD
        return self.sharding.activations(h_BTD, in_front=in_front, in_stage=self.in_stage)

    def begin(self, exits_E, h_BTD):
        """What the layers carry, before the first of them."""
        nothing = self.experts and Routed(*(jnp.zeros(self.experts.count) for _ in range(2)), jnp.zeros(()))
        return h_BTD, jnp.zeros((exits_E.shape[0], *h_BTD.shape), self.dtype), nothing

    def __call__(self, exits_E, carry, rows, part, first: int):
        """The carry after some layers that are compiled alike: weights, windows, numbers (1..L; beyond L there is no
        layer) and drops, with an axis of layers in front. first: the number (0-based) of any of them."""
        count = exits_E.shape[0]
        mesh = None if self.sharding is None or self.in_stage else self.sharding.mesh

        def layer(h_BTD, weights, window, drop):
            def run(h, rows):
                context, counts_BT = rows
                block = nnx.merge(self.graph, cast(weights, self.dtype))
                h, _, routing = block.run(h, context.for_window(window)._replace(mesh=mesh), None)
                return h, routing and routed(routing, counts_BT)

            return run(h_BTD, rows) if drop is None else drop.strategy.apply(run, h_BTD, rows, drop, first)

        def body(carry, xs):
            (h, states, total), (weights, window, number, drop) = carry, xs
            run = lambda h, weights: layer(h, weights, window, drop)  # noqa: E731
            if self.remat != "none":
                run = jax.checkpoint(run, policy=REMAT[self.remat], prevent_cse=False)
            h, of_rows = run(h, weights)
            h = self.place(h)
            of_rows = jax.tree.map(lambda of_rows: jnp.where(number <= self.depth, of_rows.sum(0), 0), of_rows)
            total = jax.tree.map(jnp.add, total, of_rows)
            # Every layer writes into the next exit's place, the exit itself last: a layer moves one state, the
            # backward pass needs none of them, and traced exits cost no more than static ones.
            last, slot = states[count - 1], jnp.searchsorted(exits_E, number)  # the first exit not below the layer
            return (h, states.at[slot].set(jnp.where(slot < count, h, last), mode="clip"), total), None

        return jax.lax.scan(body, carry, part)[0]


def _in_stages(layers: _Layers, exits_E, h_BTD, rows, stacked, microbatches: int | None):
    """As the layers one after the other, by a pipeline of stages, each with as many neighbouring layers.

    Where there are fewer in the last stages, they run on weights of 0, and what that gives is dropped.
    """
    mesh, (weights_L, windows_L, numbers_L, drops) = layers.sharding.mesh, stacked
    batch, depth, stages = h_BTD.shape[0], layers.depth, mesh.shape[STAGE]
    count = check_microbatches(microbatches, batch // layers.sharding.ways(ROWS), stages)
    lacking = -depth % stages
    fill = lambda x_L: jnp.pad(x_L, [(0, lacking)] + [(0, 0)] * (x_L.ndim - 1))  # noqa: E731
    cut = lambda x: jnp.moveaxis(x.reshape(batch // count, count, *x.shape[1:]), 1, 0)  # noqa: E731
    one = lambda x: cut(x) if x.shape[0] == batch else jnp.broadcast_to(x, (count, *x.shape))  # noqa: E731
    drops_ML = None
    if drops is not None:  # rows left out by static counts would be others of each microbatch: all are computed
        scale_ML = jnp.moveaxis(jax.vmap(one)(drops.scale_LB), 1, 0)
        drops_ML = Drops(jax.vmap(fill)(scale_ML), None, drops.strategy.computing_all())
    part = jax.tree.map(fill, (weights_L, windows_L)), fill(numbers_L - depth - 1) + depth + 1
    inner = layers._replace(in_stage=True)

    def run_stage(part, h_bTD, rows_and_drops, stage):
        (weights, windows), numbers = part
        rows, drops = rows_and_drops
        if drops is not None:
            drops = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, stage * len(numbers), len(numbers)), drops)
        h_bTD, states, total = inner(exits_E, inner.begin(exits_E, h_bTD), rows, (weights, windows, numbers, drops), 0)
        return h_bTD, (states, total)

    others_M = jax.tree.map(one, rows), drops_ML
    states_SM, total_SM = pipeline(run_stage, mesh, part, layers.place(cut(h_BTD), in_front=1), others_M)
    first_S = jnp.arange(stages) * (depth + lacking) // stages  # layers below the stage
    here_SE = (exits_E > first_S[:, None]) & (exits_E <= first_S[:, None] + (depth + lacking) // stages)
    states_MEBTD = jnp.where(here_SE[:, None, :, None, None, None], states_SM, 0).sum(0)
    states_EBTD = jnp.moveaxis(states_MEBTD, 0, 2).reshape(len(exits_E), *h_BTD.shape)
    return layers.place(states_EBTD, in_front=1), jax.tree.map(lambda x_SM: x_SM.sum((0, 1)), total_SM)


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
