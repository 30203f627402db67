"""Confident Decoding: speak from the near-final layer at the first valley of the prediction entropy.

Zhang, Zhoubian et al., "Deeper is Not Always Better", arXiv 2606.21906 (Qwen team, June 2026).
"""

import jax.numpy as jnp

from sled.fusion.statistics import layer_statistics
from sled.fusion.strategy import norm_setting
from sled.settings.decorator import setting, settings
from sled.settings.rules import Whole


@settings
class ConfidentDecoding:
    """The logits of the layer that one reaches by going down from the final one while the entropy falls.

    The paper's conservative backward search: among the layers L - M + 1 .. L, every one through the final
    norm and projection, take the first l from the end with H(l - 1) >= H(l); if the entropy falls all the
    way, the shallowest of the window (as the authors' vLLM code does). Decided per row. A NaN entropy ends
    the walk.
    """

    window: int = setting(Whole(1, hint="it counts the final layer too; 10 is the authors' choice"), default=10,
                          help="how many of the last layers take part, M")
    norm_early: bool = norm_setting(True, hint="the paper norms them")

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        # Outputs of layers only: the embeddings are no candidate.
        return tuple(range(max(1, num_layers - self.window + 1), num_layers))

    def logits(self, h_BCD, head):
        chosen_B = first_valley(layer_statistics(h_BCD, head, 1).entropy_BC)
        h_BD = jnp.take_along_axis(h_BCD, chosen_B[:, None, None], axis=1)[:, 0]
        return head.project(h_BD)


def first_valley(entropy_BC):
    """Index (B,) of the first valley of the entropy, walking back from the last candidate."""
    back_BC = entropy_BC[:, ::-1]
    falls_BE = back_BC[:, 1:] < back_BC[:, :-1]
    return entropy_BC.shape[1] - 1 - jnp.cumprod(falls_BE.astype(jnp.int32), axis=1).sum(1)
