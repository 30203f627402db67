"""Every layer of one or several models read as an exit, on the held-out word problems: what training for exits gives.

For every layer, through the projection (and the exit head, where it has one): the loss and the accuracy of the next
token on given solutions; the agreement with the last layer, at the places of the text that the last layer itself
generates; and the share of problems solved when every token leaves after this layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sled
from sled.bench.report import BenchReport, column
from sled.bench.solving import MAX_NEW_TOKENS
from sled.demo import problems as demo
from sled.errors import SettingError
from sled.eval.numbers import exact_match
from sled.lm import LM
from sled.plots import writable_picture
from sled.settings.rules import Several, Whole
from sled.survey.choices import layer_choices

ROWS = 32  # texts read at once
MODELS = 4  # side by side in a picture


@dataclass
class LayerRow:
    """One layer of one model."""

    model: str = column("model")
    layer: int = column("layer")
    loss: float = column("loss, nats/token", decimals=4)
    accuracy: float = column("next token right", decimals=4)
    agreement: float = column("agrees with the last layer", decimals=4)
    solved: float = column("solved, all tokens leaving here", decimals=3)


def run_layers_bench(model: str | Sequence[str], *, problems: int = 200, picture: Path | None = None) -> BenchReport:
    """Measures every layer of every model on `problems` held-out problems; draws them into `picture`, if given.

    model: 1 to 4 of them, as for `sled.load`; those that were trained on the bundled word problems solve some. Raises
    SettingError for another number of them, and what loading raises.
    """
    problems = Whole(1, hint="it counts the problems")("problems", problems)
    model = Several((str, Path), "models", hint="demo is the bundled one")("model", model)
    if not 1 <= len(model) <= MODELS or len(set(model)) < len(model):
        raise SettingError(f"model is {model}, but must be 1 to {MODELS} different ones, such as demo")
    if picture:
        writable_picture("--picture", picture)
    loaded = {str(name): sled.load(name, dtype="float32") for name in model}
    rows = []
    with tqdm(total=sum(lm.config.num_layers for lm in loaded.values()), desc="sled bench layers", unit="layer") as bar:
        for name, lm in loaded.items():
            rows += _layers_of(name, lm, demo.problems("heldout", problems), bar)
    if picture:
        from sled.bench.pictures import draw_layers  # imported here: matplotlib is slow

        draw_layers(rows, picture)
    return BenchReport("Every layer of a model, read as an exit, on held-out word problems",
                  {"problems": problems, "max_new_tokens": MAX_NEW_TOKENS}, rows,
                  ["The solutions that loss and accuracy are taken on are the problems' own, the end of the text "
                   "included; agreement is over the tokens that the last layer generates, each read after the ones "
                   "before it."])


def _layers_of(name: str, lm: LM, asked: list[demo.Problem], bar: tqdm) -> list[LayerRow]:
    questions = [lm.text.encode(demo.prompt(problem.question)) for problem in asked]
    solutions = [lm.text.encode(" " + problem.solution) + list(lm.config.eos_ids[:1]) for problem in asked]
    depth = lm.config.num_layers
    rows, generated = [], None
    for layer in range(depth, 0, -1):
        exits = {} if layer == depth else dict(exits=sled.EarlyExit(layer, threshold=0.0))
        out = lm.generate(questions, max_new_tokens=MAX_NEW_TOKENS, **exits)
        if generated is None:
            generated = out.tokens
            (loss_L, accuracy_L), (_, agreement_L) = (_means(lm, questions, texts) for texts in (solutions, generated))
        rows.append(LayerRow(
            model=name, layer=layer, loss=float(loss_L[layer - 1]), accuracy=float(accuracy_L[layer - 1]),
            agreement=float(agreement_L[layer - 1]),
            solved=exact_match(out.texts, [problem.answer for problem in asked])))
        bar.update()
    return rows[::-1]


def _means(lm: LM, prompts: list[list[int]], texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Means [L] over all tokens of the texts, for the layers 1 .. L: negative log-likelihood, and the share that is the
    layer's first choice."""
    pairs = list(zip(*([np.array(ids, np.int32) for ids in each] for each in (prompts, texts)), strict=True))
    token_LT, _, logprob_LT, _ = (np.concatenate(each, axis=1) for each in zip(
        *layer_choices(lm, pairs, batch_size=ROWS, progress=False), strict=True))
    return -logprob_LT.mean(1), (token_LT == np.concatenate([text for _, text in pairs])).mean(1)
