"""The train step and the evaluation: pure functions of the state, compiled, on one device or on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sled.errors import SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.models.sharding.sharding import ROWS, RULES, Sharding
from sled.train.data.rows import TrainingBatch
from sled.train.objective.balance import balance_loss
from sled.train.objective.cross_entropy import Split
from sled.train.objective.exit_heads import exit_head_loss, merge, partition, tuning_loss
from sled.train.objective.exit_weights import fixed_layers
from sled.train.objective.forward import states_and_routing
from sled.train.objective.layer_dropout import LayerDropout
from sled.train.recipes import ALL, HEADS, Recipe

TABLES = ("embedding", "weight"), ("head", "weight")
EVALUATED = 4096  # tokens that are evaluated at a time on each device, if a row is not longer


class TrainState(NamedTuple):
    """The arrays that a step changes, which a checkpoint holds whole. step: how many were taken."""

    weights: nnx.State
    optimizer: optax.OptState
    step: jax.Array


class StepMetrics(NamedTuple):
    """The measurements of a step.

    loss: what it went down. layers_E, nll_E: of the exits that learnt, their layers and likelihoods in nats per target,
    NaN where an exit's weight is 0. accuracy: the last exit's. gradient_norm: before it is clipped.
    """

    loss: jax.Array
    layers_E: jax.Array
    nll_E: jax.Array
    accuracy: jax.Array
    gradient_norm: jax.Array


class LayerSums(NamedTuple):
    """Sums over held-out targets, to be added up and divided: [L] for the layers 1..L, and how many targets."""

    nll_L: jax.Array
    correct_L: jax.Array
    targets: jax.Array


def init_state(weights: nnx.State, optimizer: optax.GradientTransformation, sharding: Sharding | None = None, *,
               trainable: str = ALL) -> TrainState:
    """The state before the first step; on a mesh the optimiser's part lies like the weights.

    The weights are copied: a step gives up the state that it is given, and the model may outlive that.
    trainable: as in the recipe; the optimiser keeps nothing for what does not learn.
    """
    weights = jax.tree.map(jnp.copy, weights)

    own, _ = _parted(weights, trainable)
    step = jnp.zeros((), jnp.int32)
    if sharding is None:
        return TrainState(weights, optimizer.init(own), step)
    return TrainState(weights, sharding.create(optimizer.init, own), jax.device_put(step, sharding.shardings(step)))


def static_exits(config: DecoderConfig, recipe: Recipe) -> tuple[int, ...] | None:
    """The exits that a model with heads learns through, the same at every step; None where they need not be known.

    Raises SettingError for exits that the model does not have, that change where heads want them to stay, or that leave
    a head to learn nothing.
    """
    recipe.exits.exits_at(0, config.num_layers)
    if config.exit_heads is None or recipe.trainable == HEADS:
        return None
    exits, learning = fixed_layers(recipe.exits, config.num_layers, recipe.steps)
    if idle := [n for n in config.exit_heads.layers if n not in learning]:
        layers = " ".join(map(str, config.exit_heads.layers))
        raise SettingError(f"the model's exit after layer {idle[0]} has a head, but with {recipe.exits} it learns "
                           "nothing, while all below it changes; give WeightedExits with AllExits (--exit-layers "
                           f"{layers}) and weights that are not 0 for it, or leave the heads out")
    return exits


def make_train_step(model: Decoder, recipe: Recipe, optimizer: optax.GradientTransformation,
                    sharding: Sharding | None = None, *,
                    microbatches: int | None = None) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """A compiled `step(state, batch, dropout) -> (state, metrics)`; the state given is given up.

    model: in the stacked form, for its structure alone. batch: of `recipe.batch_size` rows, on a mesh a global array
    (`Sharding.batch`). dropout: the recipe's, or one that saves work (`LayerDropout.saving`), or None; its counts are
    static, all else is traced. microbatches: of a pipeline, as for `states_and_routing`.
    """
    graph, _ = nnx.split(model)
    seed, parts = recipe.seed, recipe.accumulate
    heads, depth = model.config.exit_heads, model.num_layers
    _parted(nnx.state(model), recipe.trainable)  # raises where heads are to learn, and there are none
    exits = static_exits(model.config, recipe)

    def part_loss(own, rest, batch: TrainingBatch, dropout: LayerDropout | None, step, part, share):
        """The loss of one part of the batch, which holds this share of the batch's targets."""
        model = _placed(graph, merge(own, rest), sharding)
        if recipe.trainable == HEADS:
            layers_E = jnp.array(heads.layers)
            loss, metrics = tuning_loss(model, batch.tokens_BT, **_targets(batch, recipe, sharding),
                                        segments_BT=batch.segments_BT, compute_dtype=jnp.dtype(recipe.compute_dtype),
                                        sharding=sharding, distill=recipe.distill or None,
                                        temperature=recipe.temperature)
        else:
            layers_E, weights_E = recipe.exits.exits_at(step, depth)
            key = jax.random.fold_in(jax.random.key(seed), part)
            drops = None if dropout is None else dropout.draw(key, step, batch.tokens_BT.shape[0], depth)
            loss, metrics = _exit_losses(model, batch, layers_E if exits is None else exits, weights_E, recipe,
                                         sharding, drops=drops, microbatches=microbatches, distill=recipe.distill,
                                         temperature=recipe.temperature)
        return share * loss, (layers_E, (share * metrics.nll_E, share * metrics.accuracy_E[-1]))

    gradient = jax.value_and_grad(part_loss, has_aux=True)

    def whole(own, rest, batch, dropout, step):
        """Loss, measurements and gradient of the whole batch."""
        targets_A = batch.weights_BT[:, :, 1:].sum((1, 2))
        parts_A = jnp.arange(parts), batch, targets_A / jnp.maximum(targets_A.sum(), 1e-9)

        def of_part(part, batch, share):
            (loss, (layers_E, measured)), change = gradient(own, rest, batch, dropout, step, part, share)
            return (loss, measured, change), layers_E

        if parts == 1:
            return of_part(*jax.tree.map(lambda x: x[0], parts_A))
        shapes, _ = jax.eval_shape(lambda: of_part(*jax.tree.map(lambda x: x[0], parts_A)))
        zeros = jax.tree.map(jnp.zeros_like, shapes)

        def add(total, part):
            of_this, layers_E = of_part(*part)
            return jax.tree.map(jnp.add, total, of_this), layers_E

        total, layers_AE = jax.lax.scan(add, zeros, parts_A)
        return total, layers_AE[0]

    def step(state: TrainState, batch: TrainingBatch, dropout: LayerDropout | None):
        batch = jax.tree.map(lambda x: _in_parts(x, parts, sharding), batch)
        own, rest = _parted(state.weights, recipe.trainable)
        (loss, (nll_E, accuracy), change), layers_E = whole(own, rest, batch, dropout, state.step)
        moved, optimizer_state = optimizer.update(change, state.optimizer, own)
        metrics = StepMetrics(loss, layers_E, nll_E, accuracy, optax.global_norm(change))
        weights = merge(optax.apply_updates(own, moved), rest)
        made = TrainState(weights, optimizer_state, state.step + 1), metrics
        # Held to its place: the partitioner might put it elsewhere, and the next step would compile again.
        return made if sharding is None else jax.lax.with_sharding_constraint(made, sharding.shardings(made))

    return jax.jit(step, donate_argnums=0)


def make_evaluation(model: Decoder, recipe: Recipe, sharding: Sharding | None = None) -> Callable[..., LayerSums]:
    """A compiled `evaluate(weights, batch) -> LayerSums` of every layer, by its exit's head or what all share.

    All layers' hidden states are held, but only those of some `EVALUATED` tokens on each device, or of one row.
    """
    graph, _ = nnx.split(model)
    depth = model.num_layers

    def evaluate(weights, batch: TrainingBatch) -> LayerSums:
        model = _placed(graph, weights, sharding)

        def of_part(batch: TrainingBatch) -> LayerSums:
            _, metrics = _exit_losses(model, batch, range(1, depth + 1), jnp.ones(depth), recipe, sharding)
            return LayerSums(metrics.nll_E * metrics.targets, metrics.accuracy_E * metrics.targets, metrics.targets)

        rows, length = batch.tokens_BT.shape
        ways = 1 if sharding is None else math.prod(sharding.mesh.shape[axis] for axis in ROWS)
        parts = next(n for n in range(1, rows + 1) if rows % (n * ways) == 0
                     and (rows // (n * ways) * length <= EVALUATED or n * ways == rows))
        sums = jax.lax.map(of_part, jax.tree.map(lambda x: _in_parts(x, parts, sharding), batch))
        return jax.tree.map(lambda x: x.sum(0), sums)

    return jax.jit(evaluate)


def _exit_losses(model: Decoder, batch: TrainingBatch, layers_E, weights_E, recipe: Recipe,
                 sharding: Sharding | None, *, drops=None, microbatches: int | None = None, **options):
    """The loss of these exits, of which experts' balance is a part, with its metrics.

    A model with exit heads takes static exits.
    """
    with jax.named_scope("layers"):
        h_EBTD, experts = states_and_routing(model, batch.tokens_BT, layers_E, segments_BT=batch.segments_BT,
                                             drops=drops, remat=recipe.remat,
                                             compute_dtype=jnp.dtype(recipe.compute_dtype), sharding=sharding,
                                             microbatches=microbatches)
    with jax.named_scope("exit_losses"):
        loss, metrics = exit_head_loss(model, h_EBTD, layers_E, weights_E=weights_E, segments_BT=batch.segments_BT,
                                       **_targets(batch, recipe, sharding), **options)
    if experts is not None:
        loss += model.config.experts.balance * balance_loss(experts)
    return loss, metrics


def _targets(batch: TrainingBatch, recipe: Recipe, sharding: Sharding | None) -> dict[str, Any]:
    """At each position the token that follows and how much it counts; and what is common to all losses."""
    following = lambda x_BT: jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    return dict(targets_BT=following(batch.tokens_BT), mask_BT=following(batch.weights_BT), z_loss=recipe.z_loss,
                split=None if sharding is None else Split(sharding.mesh, data=ROWS, tensor=RULES["vocab"]))


def _parted(weights: nnx.State, trainable: str) -> tuple[nnx.State, nnx.State]:
    """The weights that learn, and those that stay as they are."""
    return partition(weights) if trainable == HEADS else (weights, nnx.State({}))


def _placed(graph, weights, sharding: Sharding | None) -> Decoder:
    """The model of these weights, its tables held to their place."""
    if sharding is not None:
        weights = nnx.from_flat_state([(path, leaf.replace(sharding.table(leaf[...])) if path in TABLES else leaf)
                                       for path, leaf in nnx.to_flat_state(weights)])
    return nnx.merge(graph, weights)


def _in_parts(x: Any, parts: int, sharding: Sharding | None):
    """[B, ...] as [parts, B / parts, ...]. A part takes every so-manieth row: on a mesh each device keeps its own."""
    x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
    if sharding is None:
        return x
    spec = jax.sharding.PartitionSpec(None, *sharding.rows.spec)
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(sharding.mesh, spec))
