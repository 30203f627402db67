"""Exit heads in training: read and judged beside each other, and tuned alone on a frozen backbone.

EE-Tuning (arXiv 2402.00518): the backbone of a trained model stays as it is, its exits learn. Gradients, and an
optimiser's state, exist only for the heads; the backbone runs forward once for all of them, and not backward. Layers
above the last exit run only where the last layer teaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sled.errors import SettingError
from sled.models.config import ExitHeads
from sled.models.decoder import Decoder
from sled.models.layers import traced_windows
from sled.models.sharding.sharding import Sharding
from sled.models.stored import abstract_stacked
from sled.train.objective.cross_entropy import ExitMetrics, exit_cross_entropy
from sled.train.objective.forward import cast, check_stacked, context_of_rows, exit_states

EXIT_HEADS = nnx.PathContains("exit_heads")


def with_heads(model: Decoder, heads: ExitHeads, *, mesh: jax.sharding.Mesh | None = None, seed: int = 0) -> Decoder:
    """The stacked decoder with new exit heads (`Decoder.with_exit_heads`), its other weights shared.

    mesh: where the model lies on one, the heads are made where `Sharding` puts them, never whole on one device.
    """
    check_stacked(model)
    if mesh is None:
        return model.with_exit_heads(heads, rngs=nnx.Rngs(seed))
    bare, weights = nnx.split(model.with_exit_heads(None))
    config = dataclasses.replace(model.config, exit_heads=heads)

    def make(weights):
        return partition(nnx.state(nnx.merge(bare, weights).with_exit_heads(heads, rngs=nnx.Rngs(seed))))[0]

    made = Sharding(config, mesh).create(make, weights)
    return nnx.merge(nnx.graphdef(abstract_stacked(config)), merge(made, weights))


def partition(weights: nnx.State) -> tuple[nnx.State, nnx.State]:
    """A decoder's weights as (exit heads, backbone); no array is copied. `merge` puts them together again.

    Raises SettingError where there are no exit heads.
    """
    heads, backbone = nnx.split_state(weights, EXIT_HEADS, ...)
    if not jax.tree.leaves(heads):
        raise SettingError("the model has no exit heads, so there is nothing to tune; give it some with "
                           "model.with_exit_heads(ExitHeads(layers))")
    return heads, backbone


def merge(heads: nnx.State, backbone: nnx.State) -> nnx.State:
    """All weights of the decoder, from the two parts that `partition` makes."""
    return nnx.merge_state(heads, backbone)


def read_exits(model: Decoder, h_EBTD, exits: Sequence[int], segments_BT=None) -> jax.Array:
    """Hidden states number `exits` (static, 1..L) of `exit_states`, made ready for projection: [E, B, T, D].

    Each by its exit's head, all heads side by side, or by the final norm where there is none. Stacked form. Heads
    compute in the type of the states, whatever type their parameters have. segments_BT: as for `exit_states`, for heads
    that look back.
    """
    settings = model.config.exit_heads
    own = [] if settings is None else [e for e, n in enumerate(exits) if n in settings.layers]
    if not own:
        return model.normalise(h_EBTD)
    graph, heads = nnx.split(model.exit_heads)
    windows_E = traced_windows(model.config.head_windows)
    if tuple(exits[e] for e in own) != settings.layers:
        which = jnp.array([settings.layers.index(exits[e]) for e in own])
        heads, windows_E = jax.tree.map(lambda leaf: leaf[which], (heads, windows_E))
    heads = cast(heads, h_EBTD.dtype)
    context = context_of_rows(model.config, h_EBTD.shape[2], segments_BT)

    def read_one(head, window, h_BTD):
        head = nnx.merge(graph, head)
        if head.block is not None:
            h_BTD, _ = head.block(h_BTD, context.for_window(window), None)
        return head(h_BTD, model.norm)

    read = jax.vmap(read_one)
    if len(own) == len(exits):
        return read(heads, windows_E, h_EBTD)
    own = jnp.array(own)
    return model.normalise(h_EBTD).at[own].set(read(heads, windows_E, h_EBTD[own]))


def exit_head_loss(model: Decoder, h_EBTD, exits: Sequence[int], targets_BT, mask_BT, weights_E, *, segments_BT=None,
                   **options) -> tuple[jax.Array, ExitMetrics]:
    """`exit_cross_entropy` of hidden states number `exits`, each read by its exit's head if it has one. Stacked form.

    h_EBTD: as `exit_states` gives them, not normed; exits: their numbers, static where the model has heads.
    segments_BT: as for `exit_states`. The rest, `options` too, is as for `exit_cross_entropy`. Exits with a projection
    of their own are summed one by one after those that share it.
    Raises SettingError as it does, and for distillation into a projection of its own: the last layer's logits are then
    not at hand.
    """
    read_EBTD, weights_E = read_exits(model, h_EBTD, exits, segments_BT).astype(h_EBTD.dtype), jnp.asarray(weights_E)
    settings = model.config.exit_heads
    own = [e for e, n in enumerate(exits) if n in settings.layers] if settings and not settings.tied else []
    shared = cast(model.shared_head, h_EBTD.dtype)
    if not own:
        return exit_cross_entropy(read_EBTD, shared, targets_BT, mask_BT, weights_E, **options)
    if options.get("distill") is not None:
        raise SettingError("distill is given, but exits have projections of their own, which never see the last "
                           "layer's logits; leave it None (--distill 0), or tie the heads")
    own_EVD = cast(jax.lax.split(model.exit_heads.projection[...], [1] * len(settings.layers)), h_EBTD.dtype)
    groups = [([e], shared.with_weights(own_EVD[settings.layers.index(exits[e])][0])) for e in own]
    if others := [e for e in range(len(exits)) if e not in own]:
        groups.append((others, shared))
    losses, parts = zip(*(exit_cross_entropy(read_EBTD[jnp.array(group)], head, targets_BT, mask_BT,
                                             weights_E[jnp.array(group)], **options) for group, head in groups),
                        strict=True)
    order = jnp.argsort(jnp.array([e for group, _ in groups for e in group]))
    per_exit = {name: jnp.concatenate([getattr(part, name) for part in parts])[order]
                for name in ("nll_E", "accuracy_E", "z_E")}
    return sum(losses), ExitMetrics(**per_exit, distillation_E=None, targets=parts[0].targets)


def tuning_loss(model: Decoder, tokens_BT, targets_BT, mask_BT, weights_E=None, *, segments_BT=None,
                compute_dtype=None, sharding: Sharding | None = None, distill=None,
                **options) -> tuple[jax.Array, ExitMetrics]:
    """The loss of the model's exit heads alone, in nats, to be differentiated by them; and its parts.

    model: in the stacked form, with exit heads. Its layers are run up to the last exit, and no gradient enters them.
    distill: weight of each exit's divergence from the last layer, beside its likelihood (`exit_cross_entropy`); all
        layers are then run. None: off.
    targets_BT, mask_BT: what comes after each token, and how much it counts.
    weights_E: of the exits, in their order; None: all 1. segments_BT, compute_dtype, sharding: as for
    `exit_states`; options: as for `exit_cross_entropy`.
    """
    exits = model.config.exit_heads.layers
    weights_E, count = jnp.ones(len(exits)) if weights_E is None else jnp.asarray(weights_E), len(exits)
    if distill is not None:  # the teacher has weight 0: of its own loss nothing is computed
        exits, weights_E = (*exits, model.num_layers), jnp.append(weights_E, 0)
    states = exit_states(model, tokens_BT, exits, segments_BT=segments_BT, remat="none", compute_dtype=compute_dtype,
                         sharding=sharding)
    loss, metrics = exit_head_loss(model, jax.lax.stop_gradient(states), exits, targets_BT, mask_BT, weights_E,
                                   segments_BT=segments_BT, distill=distill, **options)
    return loss, metrics._replace(**{name: values[:count] for name, values in metrics._asdict().items()
                                     if name.endswith("_E") and values is not None})
