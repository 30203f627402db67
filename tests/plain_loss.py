"""The multi-exit loss by its definition, with all logits at once: the oracle of the loss and of the training step."""

import jax
import jax.numpy as jnp


def plain_loss(h_EBTD, w_VD, targets_BT, mask_BT, weights_E, z_loss=0.0, distill=0.0, temperature=1.0):
    """(loss, (nll_E, accuracy_E, z_E, distillation_E)) of states that the last norm has been through."""
    logits = jnp.einsum("ebtd,vd->ebtv", h_EBTD, w_VD)
    log_sum = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, jnp.where(mask_BT == 0, 0, targets_BT)[None, ..., None], -1)[..., 0]
    p = jax.lax.stop_gradient(jax.nn.softmax(logits[-1] / temperature))
    divergence = temperature**2 * jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(logits / temperature)), -1)
    divergence = divergence.at[-1].set(0)
    parts = log_sum - picked, logits.argmax(-1) == jnp.where(mask_BT == 0, 0, targets_BT), log_sum**2, divergence
    parts = [jnp.sum(jnp.where(mask_BT == 0, 0, mask_BT * x), (1, 2)) / mask_BT.sum() for x in parts]
    return jnp.sum(weights_E * (parts[0] + z_loss * parts[2] + distill * parts[3])), parts
