"""Decoding by Contrasting Layers: the final layer against the early layer it differs most from.

Chuang et al., ICLR 2024, arXiv 2309.03883, with the candidate layers and the filter of transformers 4.5x
(which no longer ships it). There the layer was chosen for the whole batch; here every row has its own.
"""

import jax.numpy as jnp

from sled.errors import SettingError
from sled.fusion.certain import best_two
from sled.fusion.statistics import layer_statistics
from sled.fusion.strategy import explicit_layers, layers_setting, left_out_setting, norm_setting, per_row
from sled.settings.decorator import setting, settings
from sled.settings.rules import Number


@settings
class DoLa:
    """The final layer's log-probabilities less those of the early layer that differs from it most.

    log P_N - log P_n for the early layer n with the largest divergence from the final layer N; as released, with
    M = (P_N + P_n) / 2, half of the mean over the vocabulary of M (log M - log P_N) + M (log M - log P_n). Only tokens
    with P_N >= relative_top * max P_N are kept, the others get `lower_bound`.

    In models of more than 40 layers, "low" and "high" are taken from the first or last 20; with tied embeddings "low"
    starts at 2.

    Its authors generate with a repetition penalty of 1.2 (`sled.Sampling(repetition_penalty=1.2)`). Without one it may
    repeat itself on small models, in their code too.
    """

    layers: str | tuple[int, ...] = layers_setting(
        "low", "high", help="low or high, which are every second layer of that half")
    relative_top: float = setting(Number(0, 1, open_low=True, hint="0.1 is usual"), default=0.1, rows="B",
                                  help="share of the highest probability below which tokens are left out")
    lower_bound: float = left_out_setting(float("-inf"))
    norm_early: bool = norm_setting(False, hint="the released code does not norm them")

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        if not isinstance(self.layers, str):
            return explicit_layers(self, num_layers)
        half = num_layers // 2
        if self.layers == "high":
            return tuple(range(half if num_layers <= 40 else num_layers - 20, num_layers, 2))
        # On its own matrix an embedding only repeats the input token, so a tied model starts later.
        start = 0 if not tied else {1: 0, 2: 1}.get(num_layers, 2)
        if start == half:
            return (start,)
        layers = tuple(range(start, half if num_layers <= 40 else 20, 2))
        if not layers:
            raise SettingError(f'DoLa(layers="low") finds none in a tied model of {num_layers}; use "high".')
        return layers

    def certain(self, final_BV):
        """Rows [B] whose largest contrasted logit is the final layer's, whatever the early layers are.

        Where the second token's probability is less than `relative_top` of the first's, the first is the only one kept.
        Its logit is log P_N at least, as no log P_n is above 0, and that must be above `lower_bound`.
        """
        best = best_two(final_BV)
        relative_top_B, bound_B = (per_row(value, final_BV)[:, 0] for value in (self.relative_top, self.lower_bound))
        alone_B = best.first_B - best.second_B > best.rounding_B - jnp.log(relative_top_B)
        return alone_B & (jnp.log(best.probability_B) > bound_B + best.rounding_B)

    def logits(self, h_BCD, head):
        """Contrasted logits (B, V) of hidden states (B, C, D), final layer last."""
        stats = layer_statistics(h_BCD, head, 1)
        divergence_BE = final_divergence(h_BCD, head, stats.log_norm_BC)
        chosen_B1 = jnp.argmax(divergence_BE, axis=1)[:, None]
        h_BD = jnp.take_along_axis(h_BCD, chosen_B1[..., None], axis=1)[:, 0]
        log_early_BV = head.project(h_BD) - jnp.take_along_axis(stats.log_norm_BC, chosen_B1, axis=1)
        log_final_BV = stats.final_BV - stats.log_norm_BC[:, -1:]
        threshold_B1 = jnp.log(stats.max_prob_BC[:, -1:]) + jnp.log(per_row(self.relative_top, log_final_BV))
        # Compared with the maximum as it stands in the array, so that relative_top = 1 keeps the maximum.
        threshold_B1 = jnp.minimum(threshold_B1, log_final_BV.max(-1, keepdims=True))
        contrast_BV = log_final_BV - log_early_BV
        return jnp.where(log_final_BV >= threshold_B1, contrast_BV, per_row(self.lower_bound, contrast_BV))


def final_divergence(h_BCD, head, log_norm_BC):
    """DoLa's divergence (B, E) of each early layer from the final one, given the log-normalisers.

    A second pass over the projection in the tiled form: M needs both distributions normalised.
    """

    def total(l_xCV):
        log_p = l_xCV - log_norm_BC[..., None]
        log_early, log_final = log_p[..., :-1, :], log_p[..., -1:, :]
        log_m = jnp.logaddexp(log_early, log_final) - jnp.log(2.0).astype(log_p.dtype)
        return (jnp.exp(log_m) * (2 * log_m - log_early - log_final)).sum(-1)

    if head.tile is None:
        sums_BE = total(head.project(h_BCD))
    else:
        zero_SBE = jnp.zeros((head.shards, *log_norm_BC[:, :-1].shape), log_norm_BC.dtype)
        sums_BE = head.stream(h_BCD, zero_SBE, lambda sums, l_SBCV, _: sums + total(l_SBCV)).sum(0)
    return sums_BE / (2 * head.vocabulary)
