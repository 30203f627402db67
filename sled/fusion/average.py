"""A weighted average of the layers' distributions: what popular accounts of SLED describe. It is not SLED."""

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.fusion.statistics import layer_statistics
from sled.fusion.strategy import explicit_layers, layers_setting, norm_setting
from sled.io import shown
from sled.settings.decorator import setting, settings
from sled.settings.rules import Each, Number, OrNone, is_array

LARGEST_WEIGHT = 1e30  # so that their sum is finite


@settings
class LayerAverage:
    """The weighted mean of the layers' distributions.

    As log-probabilities (B, V): log sum_n w_n P_n over the early layers and the final one.
    None as `layers` is "all": every hidden state before the final one, embeddings included.
    """

    weights: tuple[float, ...] | jax.Array | None = setting(
        OrNone(Each(Number(0, LARGEST_WEIGHT, hint="give one per early layer and one for the final layer; they are "
                                                   "scaled to sum to 1, and None weighs all alike"))),
        default=None, rows="BC", option=None, help="weights of the candidate layers, the final one last, not all zero")
    layers: str | tuple[int, ...] | None = layers_setting(None, "all", help="all")
    norm_early: bool = norm_setting(True, hint="without, their distributions are not on the final one's scale")

    def __post_init__(self):
        if isinstance(self.weights, tuple):
            empty = not any(is_array(w) or w > 0 for w in self.weights)  # an entry that is an array is traced
        else:
            known = self.weights is not None and not isinstance(self.weights, jax.core.Tracer)
            empty = known and not np.all(np.max(self.weights, axis=-1, initial=0) > 0)
        if empty:
            raise SettingError(f"LayerAverage.weights is {shown(self.weights)}, but must not be all 0 for any row; "
                               "None weighs all alike")

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        return tuple(range(num_layers)) if self.layers in (None, "all") else explicit_layers(self, num_layers)

    def logits(self, h_BCD, head):
        share_BC = self._shares(h_BCD.shape[1], head.dtype(h_BCD))
        stats = layer_statistics(h_BCD, head, 1)
        # log(w_n / Z_n), to be added to the layer's logits; the tiled form passes over W a second time.
        offset_BC = jnp.log(share_BC) - stats.log_norm_BC

        def mixture(l_xCV):
            return jax.nn.logsumexp(l_xCV + offset_BC[..., None], axis=-2)

        if head.tile is None:
            return mixture(head.project(h_BCD))

        def step(out_SBV, l_SBCV, start):
            return jax.lax.dynamic_update_slice_in_dim(out_SBV, mixture(l_SBCV), start, axis=2)

        batch = h_BCD.shape[0]
        empty_SBV = jnp.zeros((head.shards, batch, head.vocabulary // head.shards), offset_BC.dtype)
        return head.stream(h_BCD, empty_SBV, step).swapaxes(0, 1).reshape(batch, -1)

    def _shares(self, candidates, dtype):
        """The weights (1, C) or (B, C), summing to 1."""
        if self.weights is None:
            return jnp.full((1, candidates), 1 / candidates, dtype)
        weights = jnp.stack(self.weights) if isinstance(self.weights, tuple) else self.weights
        weights = jnp.atleast_2d(jnp.asarray(weights, dtype))
        if weights.shape[-1] != candidates:
            raise SettingError(
                f"LayerAverage got {weights.shape[-1]} weights for {candidates} candidate layers; "
                "give one per early layer and one for the final layer."
            )
        return weights / weights.sum(-1, keepdims=True)
