"""CALM's trained confidence measure: will the last layer say the same as this exit?

Schuster et al. 2022 (arXiv 2207.07061): one linear unit per exit on its hidden state, trained with the model frozen.
Its target is whether the exit's most likely token is the last layer's, its loss the binary cross-entropy, averaged
over exits (their independent objective, which they found better than the geometric one).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from sled.decoding.readout import Readout
from sled.decoding.scoring import map_places
from sled.errors import DataError
from sled.exits.confidence import Classifier
from sled.exits.policy import Exits, with_last
from sled.fusion.partial import max_and_index
from sled.models.decoder import Decoder
from sled.models.layers import Block
from sled.settings.rules import Number, Whole
from sled.train.data.rows import TrainingBatch
from sled.train.objective.exit_heads import read_exits
from sled.train.objective.forward import exit_states


def train_classifier(model: Decoder | Any, batches: Iterable[TrainingBatch], layers: int | tuple[int, ...], *,
                     steps: int = 500, learning_rate: float = 0.01, progress: bool = True) -> Classifier:
    """A classifier for `sled.EarlyExit(layers, measure="classifier", classifier=...)`.

    model: a decoder in either form, or an `LM`. A separate one is stacked first, which takes its layers' memory twice.
    batches: rows of text, such as `sled.train.data.batches.Batches`; a token of weight above 0 counts as a place where
        the exit is judged by what it would have said there.
    layers: the exits, within 1..L-1. Each speaks as it does in `FinalLayer`: through its head, if it has one.
    steps: batches to learn from, one step each.
    learning_rate: of Adam, falling to 0; on hidden states whose every feature is scaled to mean 0 and deviation 1 by
        the first batch (which the result undoes).
    progress: shows a bar with the loss, and how often classifier and truth are on the same side of one half.

    Raises SettingError for a layer that is no early exit, DataError where the batches end before `steps`, or the first
    has no token to judge.
    """
    model = model if isinstance(model, Decoder) else model.build(model.params)
    layers = Exits()("layers", layers)
    exits = with_last("layers", layers, model.num_layers)
    steps = Whole(1, hint="each learns from one batch")("steps", steps)
    learning_rate = Number(0, open_low=True, hint="0.01 is usual")("learning_rate", learning_rate)
    graph, weights = nnx.split(model if isinstance(model.layers, Block) else model.stack())
    adam = optax.scale_by_adam()

    @jax.jit
    def look(weights, batch):
        """Features [E, N, D], whether the exit agrees [E, N], how much each place counts [N]."""
        return _examples(nnx.merge(graph, weights), exits, batch)

    @jax.jit
    def update(learned, state, scaling, examples, rate):
        gradient, measured = jax.grad(_loss, has_aux=True)(learned, scaling, *examples)
        change, state = adam.update(gradient, state, learned)
        return jax.tree.map(lambda x, by: x - rate * by, learned, change), state, measured

    learned = scaling = state = None
    source = iter(batches)
    with tqdm(total=steps, desc="Training the classifier", unit="step", disable=not progress) as bar:
        for step in range(steps):
            if (batch := next(source, None)) is None:
                raise DataError(f"the batches end after {step} of {steps} steps; give as many, or endless ones")
            examples = look(weights, batch)
            if learned is None:
                scaling = _scaling(examples[0], examples[2])
                learned = jnp.zeros_like(scaling[0]), jnp.zeros(len(layers), scaling[0].dtype)
                state = adam.init(learned)
            learned, state, measured = update(learned, state, scaling, examples, learning_rate * (1 - step / steps))
            if progress and (step % 20 == 0 or step == steps - 1):  # not at each: it waits for the device
                bar.set_postfix(loss=f"{measured[0]:.4f}", right=f"{measured[1]:.1%}")
            bar.update()
    (weight_ED, bias_E), (mean_ED, deviation_ED) = learned, scaling
    weight_ED = weight_ED / deviation_ED
    return Classifier(weight_ED, bias_E - (weight_ED * mean_ED).sum(-1), layers)


def _examples(model: Decoder, exits: tuple[int, ...], batch: TrainingBatch):
    segments_BT = batch.segments_BT[:, :-1]
    h_EBTD = exit_states(model, batch.tokens_BT[:, :-1], exits, segments_BT=segments_BT, remat="none")
    read_END = read_exits(model, h_EBTD, exits, segments_BT).reshape(len(exits), -1, h_EBTD.shape[-1])
    says_EN = jnp.stack([_most_likely(model, h_ND, n) for h_ND, n in zip(read_END, exits, strict=True)])
    features_END = h_EBTD[:-1].reshape(len(exits) - 1, -1, h_EBTD.shape[-1])
    counts_N = jnp.asarray(batch.weights_BT[:, 1:] > 0).ravel()
    features_END = features_END.astype(jnp.promote_types(features_END.dtype, jnp.float32))
    return features_END, says_EN[:-1] == says_EN[-1], counts_N


def _most_likely(model: Decoder, h_ND, layer: int):
    """The token [N] that hidden states made ready at `layer` give most; never all their logits at once."""
    head = Readout(model).head(layer)
    return map_places(lambda h_PD: max_and_index(head.project(h_PD))[1][:, 0], (h_ND,), head.vocabulary)


def _scaling(features_END, counts_N):
    """Mean and deviation of every feature over the places that count, [E, D] each.

    A deviation is at least a thousandth of its mean: what varies less drowns in rounding once the scaling is undone.
    """
    if not counts_N.any():
        raise DataError("the first batch has no token of weight above 0; give rows with targets")
    share_N1 = (counts_N / counts_N.sum())[:, None]
    mean_ED = (share_N1 * features_END).sum(1)
    deviation_ED = jnp.sqrt((share_N1 * jnp.square(features_END - mean_ED[:, None])).sum(1))
    deviation_ED = jnp.maximum(deviation_ED, 1e-3 * jnp.abs(mean_ED))
    return mean_ED, jnp.where(deviation_ED > 0, deviation_ED, 1)


def _loss(learned, scaling, features_END, agrees_EN, counts_N):
    """Mean binary cross-entropy of places and exits, in nats; and it again, with the share of right sides."""
    (weight_ED, bias_E), (mean_ED, deviation_ED) = learned, scaling
    scaled_END = (features_END - mean_ED[:, None]) / deviation_ED[:, None]
    logit_EN = jnp.einsum("end,ed->en", scaled_END, weight_ED) + bias_E[:, None]
    share_N = counts_N / jnp.maximum(counts_N.sum(), 1)
    loss = (share_N * optax.sigmoid_binary_cross_entropy(logit_EN, agrees_EN)).sum(-1).mean()
    return loss, (loss, (share_N * ((logit_EN > 0) == agrees_EN)).sum(-1).mean())
