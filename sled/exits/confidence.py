"""How sure an exit is of its token: measures in [0, 1], larger is surer.

Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022 (arXiv 2207.07061) names three:
the softmax response, the saturation of the hidden state, and a trained classifier. Entropy and the
margin between the two best tokens are common beside them. NaN means: not sure at all.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.settings.rules import is_array

PROJECTING = ("max_probability", "margin", "entropy")  # measures of the exit's logits
MEASURES = (*PROJECTING, "saturation", "classifier")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """CALM's trained measure, one linear unit per exit: sigmoid(weight . h + bias).

    weight_ED: [E, D], bias_E: [E], for E early exits in ascending order; h is the hidden state after
    the exit's layer, not normed. layers: the exits it was trained for, where that is known; static.
    """

    weight_ED: jax.Array
    bias_E: jax.Array
    layers: tuple[int, ...] | None = dataclasses.field(default=None, metadata=dict(static=True))


def check_classifier(name: str, classifier: Classifier, exits: int) -> None:
    """Raises SettingError where the classifier's arrays are none, not those of so many exits, or not finite."""
    weight_ED, bias_E = classifier.weight_ED, classifier.bias_E
    if not is_array(weight_ED) or not is_array(bias_E):
        kinds = f"{type(weight_ED).__name__} and {type(bias_E).__name__}"
        raise SettingError(f"{name} has weights of the types {kinds}, but must have arrays of NumPy or jax, of the "
                           f"shapes ({exits}, width) and ({exits},); give np.array(...)")
    if weight_ED.ndim != 2 or len(weight_ED) != exits or bias_E.shape != (exits,):
        raise SettingError(f"{name} has weights of the shapes {weight_ED.shape} and {bias_E.shape}, but for the exits "
                           f"that layers names they are ({exits}, width) and ({exits},); give weights for each of them")
    if isinstance(weight_ED, jax.core.Tracer) or isinstance(bias_E, jax.core.Tracer):
        return
    for array in (weight_ED, bias_E):
        if array.dtype.kind in "OSU" or not np.all(np.abs(array) <= np.finfo(np.float32).max):
            raise SettingError(f"{name} has weights that are not finite numbers in float32; train one anew")


def confidence(measure: str, logits_BV, h_BD, below_BD, classifier: Classifier | None, exit_index: int):
    """The measure by name, [B], float32, of one exit.

    logits_BV: the exit's logits (fused, before any processor; read only by the first three measures).
    h_BD, below_BD: hidden states after the exit's layer and after the layer below it.
    """
    match measure:
        case "max_probability":
            return max_probability(logits_BV)
        case "margin":
            return margin(logits_BV)
        case "entropy":
            return entropy(logits_BV)
        case "saturation":
            return saturation(h_BD, below_BD)
        case "classifier":
            h_BD = h_BD.astype(jnp.promote_types(h_BD.dtype, jnp.float32))
            return jax.nn.sigmoid(h_BD @ classifier.weight_ED[exit_index] + classifier.bias_E[exit_index])
    raise ValueError(measure)


def max_probability(logits_BV):
    """The most likely token's probability (what CALM's text calls softmax response)."""
    return jnp.exp(logits_BV.max(-1) - jax.nn.logsumexp(logits_BV, axis=-1))


def margin(logits_BV):
    """The most likely token's probability less the second one's (CALM's softmax response as computed)."""
    first, second = jnp.moveaxis(jax.lax.top_k(logits_BV, 2)[0], -1, 0)
    log_norm = jax.nn.logsumexp(logits_BV, axis=-1)
    return jnp.exp(first - log_norm) - jnp.exp(second - log_norm)


def entropy(logits_BV):
    """1 - entropy / log V: 1 where one token has all probability, 0 where all have the same."""
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    p_BV = jnp.exp(logp_BV)
    nats_B = -jnp.where(p_BV > 0, p_BV * logp_BV, 0).sum(-1)
    return 1 - nats_B / jnp.log(logits_BV.shape[-1])


def saturation(h_BD, below_BD):
    """Cosine of a hidden state with the layer below's, negative ones as 0. Needs no projection.

    At most 1 whatever the rounding, so that a threshold of 1 never leaves early.
    """
    h, below = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (h_BD, below_BD))
    lengths = jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(below, axis=-1)
    return jnp.clip((h * below).sum(-1) / lengths, 0, 1)
