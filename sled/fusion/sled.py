"""Self Logits Evolution Decoding: move the final logits towards what the early layers say they will become.

Zhang et al., NeurIPS 2024, arXiv 2411.02433; the numbers at the k evolved tokens follow the authors'
released code. `ClampOnly` is the baseline that separates SLED's effect from that of its clamp.
"""

import jax
import jax.numpy as jnp

from sled.errors import SettingError
from sled.fusion import latent_bound
from sled.fusion.certain import ROUNDING, best_two
from sled.fusion.statistics import LayerStatistics, layer_statistics
from sled.fusion.strategy import explicit_layers, layers_setting, left_out_setting, norm_setting, per_row
from sled.settings.decorator import bound_of, setting, settings
from sled.settings.rules import WIDE, Flag, Number, Whole

_PRESETS = {
    "official-code": {},
    "paper": {"layers": "blocks"},
    "factor": {"lower_bound": -2500.0, "log_softmax": True},
    "truthfulqa": {"rate": 2.5, "scale": 75, "steps": 10, "lower_bound": -100.0},
}


def _scale_setting():
    return setting(Whole(1, hint="5, 10 or 20 is usual"), default=10, rows="B",
                   help="how many of the final layer's top tokens, or all of a smaller vocabulary, take part, k")


def _log_softmax_setting():
    return setting(Flag(hint="True gives log-probabilities over the tokens that stay and the others' lower bound"),
                   default=False, option=None, help="whether the result goes through a log-softmax")


@settings
class SLED:
    """The final layer's top tokens, evolved towards what the layers below it say together.

    Every other token gets `lower_bound`.
    With P_n = softmax(l_n / temperature) and N the final layer, for the top `scale` tokens i:
        m_n(i) = max(cosine(P_n - e_i, l_n - l_N), 0)^2 for every early layer n
        P_latent(i) = sum_n m_n(i) / sum_nj m_n(j), all zero where every m is zero
        l <- l - rate (1 - t / steps) / temperature (softmax(l / temperature) - P_latent), t = 0 .. steps - 1
    the softmax over the whole vocabulary at every step.

    None as `layers` is "all": every hidden state before the final one, embeddings included.
    """

    rate: float = setting(Number(0, WIDE, hint="0.5 to 3 is usual"), default=2.0, rows="B",
                          help="evolution rate, alpha")
    scale: int = _scale_setting()
    steps: int = setting(Whole(1, 1000, hint="1 is usual"), default=1, rows="B", help="evolution steps")
    temperature: float = setting(Number(1 / WIDE, WIDE, hint="1 is usual"), default=1.0, rows="B", option=None,
                                 help="what divides the logits in every softmax, and the update")
    lower_bound: float = left_out_setting(-1000.0)
    log_softmax: bool = _log_softmax_setting()
    norm_early: bool = norm_setting(False, hint="the released code does not norm them")
    layers: str | tuple[int, ...] | None = layers_setting(
        None, "all", "blocks", help="all, or blocks, which are all but the embeddings")
    max_scale: int | None = bound_of("scale", least=16)

    @classmethod
    def preset(cls, name: str, **changes) -> "SLED":
        """Published settings by name, with any field changed by keyword.

        "official-code": generation in the authors' code: one step, no temperature, embeddings are a
            candidate, other tokens get -1000.
        "paper": the text as secondary accounts give it: a temperature tau divides every logit inside a
            softmax and, as the gradient of the divergence does, the update (alpha / tau); other tokens get
            a small value such as -1000. The code has no tau; it is 1 here. Whether the text counts the
            embeddings as a layer no account says; here the candidates are n = 1 .. N - 1, without them.
        "factor": multiple-choice scoring of FACTOR in the code: -2500, then log-softmax.
        "truthfulqa": scoring of TruthfulQA in the code: ten steps of falling rate, -100, raw logits; rate and
            scale of the 7B model (13B: 2.5 and 100; 70B: 2 and 50).
        """
        if name not in _PRESETS:
            raise SettingError(f"SLED.preset({name!r}) is unknown; the presets are {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **changes})

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        if self.layers in (None, "all"):
            return tuple(range(num_layers))
        if self.layers == "blocks":
            if num_layers < 2:
                raise SettingError('SLED(layers="blocks") finds no early layer in a model of one; use "all".')
            return tuple(range(1, num_layers))
        return explicit_layers(self, num_layers)

    def certain(self, final_BV):
        """Rows [B] whose largest fused logit is the final layer's, whatever the early layers are.

        With a = rate / temperature and L = P_latent, one step takes a (p_i - L_i) from the logit of token i. No L_i is
        below 0, and they sum to 1 at most, so the first token stays ahead of token i if
            l_1 - l_i >= a (1 + p_1 - p_i).
        Where this holds for the second token, p_2 <= exp(-a / temperature), and so a p_2 / temperature <= 1 / e. Below
        l_2 the difference of the two sides then falls as l_i rises (its slope is a p_i / temperature - 1), so that it
        holds for all others too. The bound is sharp: an early layer that differs from the final one in the second
        token alone, which it has lower, gives that token all of L.

        After several steps p is not known, but p_1 - p_i <= 1 in each; with s, the sum of the steps' rates over the
        temperature, l_1 - l_2 >= 2 s is enough for every i. Of the tokens left out, none may come first: the first
        token loses s at most, and must stay above `lower_bound`.

        The margins hold what rounding may do, so the token is that of `logits` as computed (`sled.fusion.certain`).
        """
        column = lambda value: per_row(value, final_BV)  # noqa: E731
        rate_B, steps_B, tau_B1 = column(self.rate)[:, 0], column(self.steps)[:, 0], column(self.temperature)
        best = best_two(final_BV, tau_B1)
        gap_B = best.first_B - best.second_B
        ahead_B = best.probability_B * -jnp.expm1(-gap_B / tau_B1[:, 0])  # p_1 - p_2
        sum_B = rate_B / tau_B1[:, 0] * (steps_B + 1) / 2
        # Of a probability, also of its exponent, which is large where the temperature is low.
        rounding_B = best.rounding_B + ROUNDING * sum_B * (1 + best.rounding_B / tau_B1[:, 0])
        stays_B = gap_B > sum_B * jnp.where(steps_B == 1, 1 + ahead_B, 2) + rounding_B
        return stays_B & (best.first_B - sum_B > column(self.lower_bound)[:, 0] + rounding_B)

    def certain_by_layer(self, final_BV, h_BCD, head, asked_B):
        """As `certain`, of the rows asked for, but given hidden states [B, C, D] too, final layer last.

        What is asked is l_1 - l_i > a (p_1 - p_i) + a (L_i - L_1), after one step; `sled.fusion.latent_bound` has the
        proof, and bounds the last term by projecting as few layers as it needs. Of several steps nothing is known here.
        """
        # Behind a barrier: where some of the top tokens are sliced off, XLA's CPU compiler sorts the whole vocabulary
        # instead of looking for these alone, which takes a third of a step.
        ids_BK = jax.lax.optimization_barrier(jax.lax.top_k(final_BV, min(self.max_scale, head.vocabulary))[1])
        top_BK = jnp.take_along_axis(final_BV, ids_BK, axis=-1)
        steps_B1, tau_B1 = per_row(self.steps, top_BK), per_row(self.temperature, top_BK)
        a_B1, best = per_row(self.rate, top_BK) / tau_B1, best_two(final_BV, tau_B1)
        gap_BK = top_BK[:, :1] - top_BK
        ahead_BK = best.probability_B[:, None] * -jnp.expm1(-gap_BK / tau_B1)  # p_1 - p_i
        rounding_B1 = best.rounding_B[:, None] + ROUNDING * a_B1 * (1 + best.rounding_B[:, None] / tau_B1)
        # Each side times a: a rate of 0 leaves all where they are.
        room_BK = (gap_BK - rounding_B1 - a_B1 * ahead_BK) / jnp.where(a_B1 > 0, a_B1, 1)
        above_B1 = top_BK[:, :1] - a_B1 > per_row(self.lower_bound, top_BK) + rounding_B1
        asked_B = asked_B & (above_B1 & (steps_B1 == 1))[:, 0]
        return latent_bound.none_moves(h_BCD, head, final_BV, ids_BK, _kept(top_BK, self.scale), self.temperature,
                                       room_BK, asked_B)

    def logits(self, h_BCD, head):
        """Evolved logits (B, V) of hidden states (B, C, D), final layer last."""
        stats = layer_statistics(h_BCD, head, self.max_scale, self.temperature)
        latent_BK = latent_distribution(stats.cosine_BEK, self.scale)
        evolved_BK = self._evolve(stats, latent_BK)
        l_BV = clamp_to_top(evolved_BK, stats.top_ids_BK, self.scale, self.lower_bound, stats.final_BV)
        return jax.nn.log_softmax(l_BV) if self.log_softmax else l_BV

    def _evolve(self, stats: LayerStatistics, latent_BK):
        """The top tokens' logits (B, K) after all steps."""
        final_BV, ids_BK = stats.final_BV, stats.top_ids_BK
        steps = jnp.max(jnp.asarray(self.steps))

        def step(t, l_Bx, log_norm_B, latent_Bx):
            # A row that has had its steps gets a rate of 0.
            rate = per_row(self.rate, l_Bx) * jnp.maximum(1 - t / per_row(self.steps, l_Bx), 0)
            tau = per_row(self.temperature, l_Bx)
            return l_Bx - rate / tau * (jnp.exp(l_Bx / tau - log_norm_B[:, None]) - latent_Bx)

        def once():
            return step(0, stats.top_logits_BCK[:, -1], stats.log_norm_BC[:, -1], latent_BK)

        def many():
            row_B1 = jnp.arange(ids_BK.shape[0])[:, None]
            latent_BV = jnp.zeros_like(final_BV).at[row_B1, ids_BK].set(latent_BK)

            def body(t, l_BV):
                log_norm_B = jax.nn.logsumexp(l_BV / per_row(self.temperature, l_BV), axis=-1)
                return step(t, l_BV, log_norm_B, latent_BV)

            l_BV = jax.lax.fori_loop(1, steps, body, step(0, final_BV, stats.log_norm_BC[:, -1], latent_BV))
            return jnp.take_along_axis(l_BV, ids_BK, axis=-1)

        # One step, the common case, touches only the top tokens.
        return jax.lax.cond(steps == 1, once, many)


@settings
class ClampOnly:
    """The final layer's top tokens alone, the honest baseline of sled.

    The top `scale` tokens keep their logits, every other token gets `lower_bound`. It is SLED at rate 0, which needs no
    early layers: what remains of a gain here is the clamp's, not SLED's.
    """

    scale: int = _scale_setting()
    lower_bound: float = left_out_setting(-1000.0)
    log_softmax: bool = _log_softmax_setting()
    max_scale: int | None = bound_of("scale", least=16)
    norm_early = False

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        return ()

    def logits(self, h_BCD, head):
        final_BV = head.project(h_BCD[:, -1])
        top_BK, ids_BK = jax.lax.top_k(final_BV, min(self.max_scale, head.vocabulary))
        l_BV = clamp_to_top(top_BK, ids_BK, self.scale, self.lower_bound, final_BV)
        return jax.nn.log_softmax(l_BV) if self.log_softmax else l_BV


def latent_distribution(cosine_BEK, scale):
    """P_latent (B, K) of cosines (B, E, K); tokens ranked `scale` or lower have no part in it."""
    m_BEK = jnp.where(_kept(cosine_BEK[:, 0], scale)[:, None], jnp.maximum(cosine_BEK, 0) ** 2, 0)
    total_B1 = m_BEK.sum((1, 2))[:, None]
    return jnp.where(total_B1 > 0, m_BEK.sum(1) / jnp.where(total_B1 > 0, total_B1, 1), 0)


def clamp_to_top(top_BK, ids_BK, scale, lower_bound, like_BV):
    """Logits (B, V): `top_BK` at the first `scale` of `ids_BK`, `lower_bound` at every other token."""
    bound_B1 = per_row(lower_bound, like_BV)
    kept_BK = jnp.where(_kept(top_BK, scale), top_BK, bound_B1)
    row_B1 = jnp.arange(like_BV.shape[0])[:, None]
    return jnp.broadcast_to(bound_B1, like_BV.shape).at[row_B1, ids_BK].set(kept_BK)


def _kept(top_BK, scale):
    return jnp.arange(top_BK.shape[-1]) < per_row(scale, top_BK)
