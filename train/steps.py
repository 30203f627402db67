"""Losses and train step on a stacked decoder: what every training script here is built from.

Besides the last layer, one earlier layer a step is taught to speak through the shared projection
(LayerSkip's rotating early-exit loss, arXiv 2404.16710), so that leaving early means something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sled.errors import SettingError
from sled.models.decoder import Decoder


class TrainState(NamedTuple):
    """Everything a step changes: a pytree that a checkpoint can hold whole."""

    weights: nnx.State
    optimizer: optax.OptState
    step: jax.Array


def cross_entropy(logits_BTV, targets_BT, weights_BT) -> jax.Array:
    """Mean negative log-likelihood in nats, a scalar; each position counts by its weight."""
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return jnp.sum(nll_BT * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1e-9)


def next_token_losses(model: Decoder, tokens_BT, weights_BT, layers_E) -> jax.Array:
    """Loss of each exit: hidden states number `layers_E` (1..L, may be traced) predict the next token.

    `weights_BT` says how much each token counts as a target (the first is none). Returns [E], in nats.
    """
    states = model.hidden_states(tokens_BT[:, :-1])
    return jnp.stack([cross_entropy(model.logits(states[layer]), tokens_BT[:, 1:], weights_BT[:, 1:])
                      for layer in layers_E])


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Warm-up over 100 steps (a tenth of a short run), constant, linear to 0 over the last quarter.

    The constant part makes it cheap to change one's mind: a run goes on with another number of
    steps from any checkpoint before its decay.
    """
    warmup, decay = min(100, steps // 10), steps // 4
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak),
         optax.linear_schedule(peak, 0.0, decay)], [warmup, steps - decay])


def muon(peak: float, steps: int, *, decay: float = 0.1, clip: float = 1.0) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for norms and embeddings, with `schedule` and clipping.

    Stacked matrices are the leaves of three axes [L, in, out]. Their updates are scaled to Adam's
    usual size (root mean square 0.2), so that one rate serves both.
    """
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            schedule(peak, steps), adam_b2=0.98, weight_decay=decay, consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda weights: jax.tree.map(
                lambda leaf: stacked if leaf.ndim > 2 else None, weights)))


def init_state(model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of a model in the stacked form.

    The weights are copied: steps give up the state that they are given, and the model outlives that.
    """
    weights = jax.tree.map(jnp.copy, nnx.split(model)[1])
    return TrainState(weights, optimizer.init(weights), jnp.zeros((), jnp.int32))


def make_train_step(model: Decoder, optimizer: optax.GradientTransformation, *,
                    exit_weight: float) -> Callable:
    """A compiled `step(state, tokens_BT, weights_BT) -> (state, losses)`; the old state is given up.

    `losses` [2] are those of the last layer and of the earlier one whose turn it was; the second is
    added with `exit_weight`. Every new shape of the tokens compiles the gradient, not the update.
    Raises SettingError for a model of a single layer.
    """
    graph, _ = nnx.split(model)
    depth = model.config.num_layers
    if depth < 2:
        raise SettingError("num_layers is 1, so no earlier layer can be taught to speak; take at least 2")

    def loss(weights, tokens_BT, weights_BT, early):
        losses = next_token_losses(nnx.merge(graph, weights), tokens_BT, weights_BT, (depth, early))
        return losses[0] + exit_weight * losses[1], losses

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def update(state: TrainState, gradient: nnx.State) -> TrainState:
        change, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
        return TrainState(optax.apply_updates(state.weights, change), optimizer_state, state.step + 1)

    update = jax.jit(update, donate_argnums=0)

    def step(state: TrainState, tokens_BT, weights_BT):
        early = 1 + state.step % (depth - 1)
        change, losses = gradient(state.weights, tokens_BT, weights_BT, early)
        return update(state, change), losses

    return step


def make_evaluation(model: Decoder) -> Callable:
    """A jitted `evaluate(weights, tokens_BT, weights_BT) -> (losses, solved)` over every layer.

    `losses` [L] and `solved` [L] count only tokens of full weight (1). `solved` is the share of rows
    in which each of those is the most likely one: exactly the rows that greedy decoding reproduces.
    """
    graph, _ = nnx.split(model)

    def evaluate(weights, tokens_BT, weights_BT):
        model = nnx.merge(graph, weights)
        targets_BT, counted_BT = tokens_BT[:, 1:], weights_BT[:, 1:] == 1

        def measure(h_BTD):
            logits = model.logits(h_BTD)
            right_BT = (logits.argmax(-1) == targets_BT) | ~counted_BT
            return cross_entropy(logits, targets_BT, counted_BT), right_BT.all(-1).mean()

        return jax.lax.map(measure, model.hidden_states(tokens_BT[:, :-1])[1:])

    return jax.jit(evaluate)
