"""Early exit: a token leaves at the first exit that is sure enough, and is trusted.

Schuster et al. 2022 (CALM, arXiv 2207.07061) for measures and decaying thresholds; Bae et al. 2023
(FREE, arXiv 2310.05424) for the exact K/V of tokens that left.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.exits.confidence import MEASURES, PROJECTING, Classifier, check_classifier, confidence
from sled.exits.policy import Decision, Exits, ExitView, Policy, only_if, with_last
from sled.settings.decorator import setting, settings
from sled.settings.rules import WIDE, Each, Instance, Number, OneOf, OrNone, Whole

DECAYS = ("none", "calm-paper", "calm-code")


@settings
class EarlyExit(Policy):
    """A token leaves at the first exit that is sure of it, unchecked: less work, and the text may change.

    It leaves after the first of `layers` whose confidence is above the threshold; at it CALM's leave too, here 1 never.
    The exit's logits are those of the fusion in use, on the layers up to the exit, through its own head where the
    model has one (`sled.models.ExitHeads`). Rows decide alone: neither batch-mates nor the schedule
    change a row's tokens, and at threshold 1 they are plain decoding's; in a type narrower than float32 but for near
    ties, which another block of tokens may round otherwise. A row whose confidence is not finite goes on to the next
    exit. The tokens of the prompt go through all layers, but for the last one, after which the first new token may
    leave as any other.

    With "calm-paper" the threshold lambda falls with t, the tokens made so far of at most N, to 0.9 lambda +
    0.1 exp(-decay_temperature t / N); with "calm-code", as in t5x, to 0.9 lambda +
    0.1 lambda exp(-decay_temperature t / N).
    """

    layers: int | tuple[int, ...] = setting(
        Exits(), option="exit_layers", help="layers after which a token may leave, one or several")
    threshold: float | tuple[float, ...] | jax.Array = setting(
        Each(Number(0, 1, hint="lower leaves earlier and errs more, and 1 never leaves early"), one=True), default=0.9,
        rows="BE", help="how sure an exit must be, one number for all exits or one per exit")
    measure: str = setting(OneOf(MEASURES), default="max_probability", help=(
        "what sure means: max_probability, of the most likely token; margin, its lead over the second; entropy, 1 - "
        "entropy / log V; saturation, the cosine with the hidden state of the layer below, which needs no projection"))
    decay: str = setting(OneOf(DECAYS), default="none", help=(
        "how the threshold falls as the text grows, since early errors cost more: calm-paper as in CALM's paper, "
        "calm-code as in its code"))
    decay_temperature: float = setting(Number(0, WIDE, hint="CALM uses 4"), default=4.0, rows="B",
                                       help="how fast the threshold falls")
    min_layer: int = setting(Whole(0, hint="0 is no bound"), default=0, rows="B",
                             help="no token leaves before this layer; with the last one or more, none leaves early")
    kv: str = setting(OneOf(("exact", "propagate")), default="exact", help=(
        "the keys and values of a token in the layers it skipped: exact, made later in a block, when a segment next "
        "runs for any row; propagate, made at once from the exit's hidden state, which is cheaper and approximate"))
    max_deferred: int = setting(Whole(1, hint="15 is usual"), default=15, help=(
        "how many tokens of a row may wait for their exact keys and values before the deeper layers must run"))
    classifier: Classifier | None = setting(
        OrNone(Instance(Classifier, hint="sled.Classifier(weights, bias) is one")), default=None, traced=True,
        option=None, help='trained measure, which measure="classifier" needs')

    def __post_init__(self):
        given = len(self.threshold) if isinstance(self.threshold, tuple) else (1, *jnp.shape(self.threshold))[-1]
        if given not in (1, len(self.layers)):
            raise SettingError(f"EarlyExit.threshold has {given} numbers for {len(self.layers)} exits; "
                               "give one number for all, one per exit, or an array (rows, exits)")
        if (self.measure == "classifier") != (self.classifier is not None):
            raise SettingError('EarlyExit: measure="classifier" and a trained `classifier` go together; '
                               "give both or neither")
        if self.classifier is not None and self.classifier.layers not in (None, self.layers):
            raise SettingError(f"EarlyExit.classifier was trained for exits {self.classifier.layers}, but layers is "
                               f"{self.layers}; give the same, or train one for these")
        if self.classifier is not None:
            check_classifier("EarlyExit.classifier", self.classifier, len(self.layers))

    @property
    def propagates(self) -> bool:
        return self.kv == "propagate"

    @property
    def window(self) -> int:
        return 1 if self.propagates else self.max_deferred + 1

    def check(self, network) -> None:
        if self.classifier is None:
            return
        trained, width = self.classifier.weight_ED.shape[1], network.shared_head.w_VD.shape[1]
        if trained != width:
            raise SettingError(f"EarlyExit.classifier is for hidden states of width {trained}, but the model's is "
                               f"{width}; train one for this model")

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return with_last("EarlyExit.layers", self.layers, num_layers)

    @property
    def lowest_threshold(self) -> float:
        """The lowest that `thresholds` comes to, of all exits: where the decay has gone all the way."""
        lowest = float(np.min(np.asarray(self.threshold)))
        return lowest if self.decay == "none" else 0.9 * lowest

    def first_exit(self, num_layers: int) -> int:
        """The first of `layers` from `min_layer` on, or the last layer."""
        return min((n for n in self.layers if n >= np.min(self.min_layer)), default=num_layers)

    def with_threshold(self, threshold: float) -> EarlyExit:
        return dataclasses.replace(self, threshold=threshold)

    def at_exit(self, view: ExitView) -> Decision:
        """Rows whose confidence is finite and above the threshold leave, with the exit's fused logits."""
        logits_BV = view.fused_logits() if self.measure in PROJECTING else None
        sure_B = confidence(self.measure, logits_BV, view.states[view.layer], view.states[view.layer - 1],
                            self.classifier, view.index)
        threshold_B = self.thresholds(view.emitted_B, view.most_B)[:, view.index]
        leaves_B = view.here_B & jnp.isfinite(sure_B) & (sure_B > threshold_B) & (view.layer >= self.min_layer)
        if logits_BV is None:
            logits_BV = only_if(leaves_B.any(), view.fused_logits)
        return Decision(leaves_B, logits_BV, view.memory)

    def thresholds(self, emitted_B, most_B):
        """lambda' [B, exits], after `emitted_B` new tokens of at most `most_B`."""
        threshold = jnp.stack(self.threshold) if isinstance(self.threshold, tuple) else jnp.asarray(self.threshold)
        threshold = jnp.broadcast_to(threshold, (emitted_B.shape[0], len(self.layers)))
        if self.decay == "none":
            return threshold
        fade_B1 = jnp.exp(-self.decay_temperature * emitted_B / jnp.maximum(most_B, 1))[:, None]
        late = threshold if self.decay == "calm-code" else 1.0
        return jnp.clip(0.9 * threshold + 0.1 * late * fade_B1, 0, 1)
