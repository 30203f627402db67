"""What `sled bench claims` measures: the same questions answered in many ways, bytes counted, limits tried."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

import sled
from sled.bench.solving import measure
from sled.errors import SettingError
from sled.exits import Decision
from sled.lm import LM
from sled.settings.decorator import settings

TOGETHER = 32  # questions answered at once where only answers count
LEVELS = 80  # thresholds tried below a floor: enough to tell none let through from a few


@settings
class Together(sled.EarlyExit):
    """Early exit by a rule over the batch: at an exit where one row is not sure, none leaves.

    So a row's text depends on its batch-mates. It is here to be compared with; no policy of the library does it.
    """

    def at_exit(self, view) -> Decision:
        leaves_B, logits_BV, memory = super().at_exit(view)
        return Decision(leaves_B & (leaves_B | ~view.here_B).all(), logits_BV, memory)


class Answers(NamedTuple):
    """N questions answered in one way. seconds_M: of the M batches, each in its fastest round; none where not timed."""

    tokens: list[list[int]]
    exit_layers: list[list[int]]
    seconds_M: np.ndarray

    @property
    def depth_N(self) -> np.ndarray:
        """Layers per token of every text."""
        return np.array([np.mean(layers) for layers in self.exit_layers])

    @property
    def length_N(self) -> np.ndarray:
        return np.array([len(tokens) for tokens in self.tokens])

    def same(self, other: Answers) -> list[bool]:
        """Which texts equal the other's, as far as both go on with the questions."""
        return [a == b for a, b in zip(self.tokens, other.tokens, strict=False)]


def answered(lm: LM, prompts: Sequence[Any], batch: int, ways: Mapping[str, Mapping[str, Any]], new_tokens: int,
             rounds: int, bar: tqdm) -> dict[str, Answers]:
    """Every way's answers, in batches of neighbours, timed in `rounds` in which all ways take a batch in turn.

    ways: by name, what `lm.generate` is given besides. bar: moves by one a batch and way, and once more a round.
    """
    batches = [prompts[at:at + batch] for at in range(0, len(prompts), batch)]
    calls = {(name, at): functools.partial(lm.generate, ids, max_new_tokens=new_tokens, batch_size=batch, **how)
             for at, ids in enumerate(batches) for name, how in ways.items()}
    runs = measure(calls, rounds, bar)
    found = {}
    for name in ways:
        mine = [runs[name, at] for at in range(len(batches))]
        found[name] = Answers(*(list(itertools.chain.from_iterable(getattr(run.first, field) for run in mine))
                                for field in ("tokens", "exit_layers")),
                              np.array([run.times.best for run in mine if rounds]))
    return found


def memory_saved(lm: LM, layer: int, draft: int, lengths: Sequence[int]) -> np.ndarray:
    """By the length of a text in tokens: which share of the bytes that speculation holds with a separate model to draft
    is spared by drafting after `layer` of the model itself.

    The separate one has as many layers, of the same size, the embedding and the head, and K/V of its own. Weights and
    K/V are counted by their shapes; self-speculation also keeps hidden states of its drafts.
    """
    network = lm.build.outline
    of_layer = [_bytes(nnx.state(block)) for block in network.layers]
    whole = _bytes(lm.params)
    drafter = whole - sum(of_layer[layer:])
    kept = (draft + 1) * network.config.width * np.dtype(np.float32).itemsize
    saved = []
    for length in lengths:
        caches = jax.eval_shape(functools.partial(network.empty_caches, 1, length, draft + 1))
        plain = whole + _bytes(caches)
        saved.append(1 - (plain + kept) / (plain + drafter + _bytes(caches[:layer])))
    return np.array(saved)


def _bytes(tree) -> int:
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def let_through(lm: LM, prompt: Any, layers: tuple[int, ...], threshold: float) -> list[bool]:
    """Whether an engine with the floor `threshold` takes a request that asks for a lower one: at all exits or at one
    of them, from 0 up to a little below it."""
    engine = sled.Engine(lm, slots=1, capacity=len(prompt) + 1, limits=sled.Limits(threshold_floor=threshold),
                         exits=sled.EarlyExit(layers, (threshold,) * len(layers)))
    taken = []
    for lower in np.linspace(0, threshold - 0.01, LEVELS).tolist():
        moved = [tuple(lower if at == n else threshold for n in range(len(layers))) for at in range(len(layers))]
        for thresholds in dict.fromkeys([(lower,) * len(layers), *moved]):
            try:
                engine.submit(prompt, exits=sled.EarlyExit(layers, thresholds))
                taken.append(True)
            except SettingError:
                taken.append(False)
    return taken


def over_budget(lm: LM, prompts: Sequence[Any], lengths_N: np.ndarray, layers: tuple[int, ...],
                bar: tqdm) -> list[bool]:
    """Whether requests, none of whose tokens leaves early, took more layer-tokens than they were granted: those of the
    longest prompt and of one new token.

    lengths_N: of the full model's texts. Only requests whose texts need more than is granted are made. bar: moves by
    one a prompt.
    """
    depth, granted = lm.config.num_layers, max(map(len, prompts)) + 1
    needed_N = np.array([len(prompt) for prompt in prompts]) + lengths_N
    asked = [prompt for prompt, needed in zip(prompts, needed_N, strict=True) if needed > granted]
    bar.update(len(prompts) - len(asked))
    if not asked:
        return []
    engine = sled.Engine(lm, slots=min(8, len(asked)), capacity=int(needed_N.max()), exits=sled.EarlyExit(layers, 1.0),
                         limits=sled.Limits(budget=depth * granted))
    over = []
    for request, prompt in [(engine.submit(prompt, max_new_tokens=int(lengths_N.max())), prompt) for prompt in asked]:
        over.append(len(prompt) + len(request.result().tokens) > granted)
        bar.update()
    return over
