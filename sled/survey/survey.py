"""`sled.layers`: what every layer of a model says on the model's own answers, and what leaving there would give."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sled.decoding import loop
from sled.decoding.batch import HEADROOM
from sled.decoding.memory import naming_shortage
from sled.decoding.options import Decoding
from sled.decoding.rows import batch_height
from sled.decoding.state import bucket
from sled.errors import CalibrationError, SettingError
from sled.exits import EarlyExit, SelfSpeculation
from sled.lm import LM
from sled.settings.rules import Flag, Whole
from sled.settings.unknown import naming_unknown
from sled.survey.choices import Choices, layer_choices
from sled.survey.costs import DRAFTS, Costs
from sled.survey.profile import measured_costs
from sled.survey.result import KEEPS, SURE, Drafting, Leaving, Spoken, Survey
from sled.survey.simulate import count_drafts, count_exits
from sled.text.prompts import Prompts, prompt_ids

THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
BINS = 15  # of the calibration error, as in Guo et al. 2017
ANSWERS_AT_ONCE = 8
HEAVY = 2  # layers that the projection must weigh before drafts from few token ids are considered
ROOM = 64  # positions for new tokens in which the loop is timed, at least


@naming_unknown
@naming_shortage("reading the layers", "give shorter prompts, or a smaller max_new_tokens or batch_size")
def layers(lm: LM, prompts: Prompts, *, max_new_tokens: int = 128, batch_size: int = 1, profile: bool = True,
           progress: bool = True) -> Survey:
    """What every layer says on the model's own greedy answers, and what drafting or leaving there is expected to give.

    The model answers the prompts once, without exits; then all layers are read along these answers. Drafts see the full
    model's text until one is wrong, so what self-speculation would accept is counted, not estimated. Exits are
    judged token by token after the full model's text: a real early exit goes on from its own errors. Expected speeds
    follow from the counts and the times of the parts of a step, and are of decoding: what comes after the prompt.

    prompts: like those to come; some hundred tokens of answers are enough for a first look, some thousand for figures.
    batch_size: prompts decoded together, in what is timed. profile: False times nothing, and the speeds are those of a
    device bound by memory, which reads every weight once per step.

    Raises: PromptError, SettingError, TokenizerError; SettingError for a model of one layer, which has no early one;
    CalibrationError where all texts end with their first token.
    """
    batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
    profile = Flag(hint="True times this machine")("profile", profile)
    if lm.config.num_layers == 1:
        raise SettingError(f"{lm.name} has 1 layer, so there is no early one to look at; give a deeper model")
    ids = prompt_ids(prompts, lm.text, lm.config)
    out = lm.decode(ids, Decoding(max_new_tokens=max_new_tokens), batch_size=max(batch_size, ANSWERS_AT_ONCE),
                    progress=progress)
    texts = [np.array(tokens, np.int32) for tokens in out.tokens]
    if sum(map(len, texts)) <= len(texts):
        raise CalibrationError(f"all {len(texts)} answers end with their first token, so there is nothing to draft or "
                               "to leave early; give prompts that the model answers, or a larger max_new_tokens")
    first_ids = _first_ids(lm)
    choices = layer_choices(lm, list(zip(ids, texts, strict=True)), batch_size=ANSWERS_AT_ONCE, progress=progress,
                            first_ids=first_ids)
    limits = [min(max_new_tokens, lm.config.context - len(prompt)) for prompt in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # as `LM.decode` makes batches
    batches = [order[at:at + batch_size] for at in range(0, len(order), batch_size)]
    counted = _Counted(lm, choices, texts, limits, batches, first_ids)
    bound = Costs.of_weights(lm, first_ids)
    costs = None
    if profile:
        rows = min(batch_size, batch_height(len(ids)))
        middle = [ids[i] for i in (order * rows)[len(order) // 2:][:rows]]
        room = min(HEADROOM, max(max_new_tokens, ROOM))
        drafting, leaving = counted.drafting(bound, bound), counted.leaving(bound, bound)
        costs = measured_costs(
            lm, middle, windows=sorted(set(counted.windows.values())), first_ids=first_ids, progress=progress,
            capacity=bucket(max(map(len, middle)) + room), draft_layer=max(drafting, key=lambda way: way.speed).layer,
            exit_layer=max(leaving, key=lambda way: way.speed * (way.kept >= KEEPS)).layer)
    used = costs or bound
    return Survey(model=lm.name, num_layers=lm.config.num_layers, prompts=len(ids), tokens=sum(map(len, texts)),
                  batch_size=batch_size, layers=_spoken(choices, texts, used, counted.windows),
                  drafting=counted.drafting(used, bound), leaving=counted.leaving(used, bound), costs=costs,
                  weights=lm.weights_digest())


def _first_ids(lm: LM) -> int | None:
    """How many ids drafts may be of, beside all: those that weigh a layer, where the projection weighs several."""
    weight = Costs.of_weights(lm).head(1)
    return int(lm.config.vocab_size / weight) // 64 * 64 or None if weight > HEAVY else None


class _Counted:
    """Counts of drafts and exits over all answers, and the speeds that they come to under some costs."""

    def __init__(self, lm: LM, choices: Sequence[Choices], texts: Sequence[np.ndarray], limits: Sequence[int],
                 batches: Sequence[Sequence[int]], first_ids: int | None):
        self._choices, self._texts = choices, texts
        # Tokens of the block that verifies a draft: the smallest that holds it and the token before it.
        self.windows = {draft: next(size for size in loop.block_sizes(SelfSpeculation(1, draft).window) if size > draft)
                        for draft in DRAFTS}
        self._drafts = {}  # by the ids that drafts may be of: counts of all texts, and of the longest of each batch
        for ids in dict.fromkeys((None, first_ids)):
            tokens = [c.token_LT if ids is None else c.draft_LT for c in choices]
            drafted = [count_drafts(*each, DRAFTS, limit=limit, ends=lm.config.eos_ids)
                       for *each, limit in zip(tokens, texts, limits, strict=True)]
            # The rows of a batch draft and verify together, so the row that takes longest decides.
            longest = [sum(np.max([drafted[i][field] for i in batch], axis=0) for batch in batches)
                       for field in range(3)]
            self._drafts[ids] = [sum(each) for each in zip(*drafted, strict=True)], longest
        self._steps, self._batches = sum(max(len(texts[i]) for i in batch) for batch in batches), len(batches)
        self._left = [count_exits([choices[i] for i in batch], THRESHOLDS, [limits[i] for i in batch],
                                  window=EarlyExit(1).window) for batch in batches]

    def _speed(self, costs: Costs, seconds):
        """Of decoding whose steps take so long, as a multiple of plain decoding's."""
        calls = self._batches * costs.call
        return (self._steps * costs.step + calls) / (seconds + calls)

    def drafting(self, costs: Costs, bound: Costs) -> tuple[Drafting, ...]:
        """Every draft length after every layer."""
        ways = []
        for layer, (n, (draft, window)), (ids, (counts, longest)) in itertools.product(
                range(1, costs.depth), enumerate(self.windows.items()), self._drafts.items()):
            at = layer - 1, n
            drafted, accepted, verifications = (count_EN[at] for count_EN in counts)
            speed, bound_speed = (self._speed(each, each.drafting(
                layer, window, longest[0][at], longest[2][at], few=ids is not None)) for each in (costs, bound))
            ways.append(Drafting(layer, draft, ids, float(accepted / drafted), float(accepted / verifications),
                                 float(speed), float(bound_speed)))
        return tuple(ways)

    def leaving(self, costs: Costs, bound: Costs) -> tuple[Leaving, ...]:
        """Every threshold after every layer."""
        probability_LT, right_LT = (np.concatenate(x, axis=1) for x in _told(self._choices, self._texts))
        ways = []
        for layer in range(1, costs.depth):
            speeds = [self._speed(each, sum(each.leaving(layer, left, EarlyExit(1).window) for left in self._left))
                      for each in (costs, bound)]
            for q, threshold in enumerate(THRESHOLDS):
                leaves_T = probability_LT[layer - 1] > np.float32(threshold)
                ways.append(Leaving(
                    layer, threshold, left=float(leaves_T.mean()),
                    kept=float(1 - (leaves_T & ~right_LT[layer - 1]).mean()),
                    mean_depth=float(np.where(leaves_T, layer, costs.depth).mean()), speed=float(speeds[0][q]),
                    bound_speed=float(speeds[1][q])))
        return tuple(ways)


def _told(choices: Sequence[Choices], texts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of every answer, by layer: the probability of the layer's choice, and whether it is the answer's token."""
    return ([c.probability_LT for c in choices],
            [c.token_LT == text_T for c, text_T in zip(choices, texts, strict=True)])


def _spoken(choices: Sequence[Choices], texts: Sequence[np.ndarray], costs: Costs, windows) -> tuple[Spoken, ...]:
    probability_LT, right_LT = (np.concatenate(x, axis=1) for x in _told(choices, texts))
    said = []
    for layer, (probability_T, right_T) in enumerate(zip(probability_LT[:-1], right_LT[:-1], strict=True), 1):
        sure_T = probability_T > SURE
        said.append(Spoken(
            layer, float(right_T.mean()), calibration_error(probability_T, right_T), float(sure_T.mean()),
            float(right_T[sure_T].mean()) if sure_T.any() else None,
            costs.pays_from(layer, windows)))
    return tuple(said)


def calibration_error(probability_T: np.ndarray, right_T: np.ndarray) -> float:
    """The expected calibration error: the mean distance, over all tokens, between the mean probability and the share
    that is right in a token's bin. Bins are `BINS` of equal width."""
    bin_T = np.minimum((probability_T * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bin_T, weights=probability_T - right_T, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right_T))
