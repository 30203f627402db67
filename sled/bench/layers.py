"""Every layer of one or several models read as an exit, on the held-out word problems: what training for exits gives.

For every layer, through the projection (and the exit head, where it has one): the loss and the accuracy of the next
token on given solutions; the agreement with the last layer, at the places of the text that the last layer itself
generates; and the share of problems solved when every token leaves after this layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sled
from sled.bench.report import BenchReport, column
from sled.bench.solving import MAX_NEW_TOKENS
from sled.decoding.readout import Readout
from sled.decoding.state import bucket
from sled.demo import problems as demo
from sled.errors import SettingError
from sled.eval.numbers import exact_match
from sled.lm import LM
from sled.plots import writable_picture
from sled.settings.rules import Several, Whole

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
            loss_L, accuracy_L = _read(lm, questions, solutions)
            _, agreement_L = _read(lm, questions, generated)
        rows.append(LayerRow(
            model=name, layer=layer, loss=float(loss_L[layer - 1]), accuracy=float(accuracy_L[layer - 1]),
            agreement=float(agreement_L[layer - 1]),
            solved=exact_match(out.texts, [problem.answer for problem in asked])))
        bar.update()
    return rows[::-1]


def _read(lm: LM, prompts: list[list[int]], continuations: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Means [L] over all tokens of the continuations, for the layers 1..L: negative log-likelihood, and the share that
    is the layer's first choice."""
    sums = np.zeros((3, lm.config.num_layers))
    for at in range(0, len(prompts), ROWS):
        some = list(zip(prompts[at:at + ROWS], continuations[at:at + ROWS], strict=True))
        length = bucket(max(len(p) + len(c) for p, c in some))
        tokens_BT, asked_BT = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), bool)
        for b, (p, c) in enumerate(some):
            tokens_BT[b, :len(p) + len(c)] = [*p, *c]
            asked_BT[b, len(p) - 1:len(p) + len(c) - 1] = True
        sums += jax.device_get(_sums(lm.build, lm.params, tokens_BT, asked_BT))
    return sums[0] / sums[2], sums[1] / sums[2]


@jax.jit(static_argnames="build")
def _sums(build, params, tokens_BT, asked_BT):
    """Loss, hits and number of the places asked, summed: [3, L]. Place t is asked for token t + 1."""
    network = build(params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    readout, depth = Readout(network), network.num_layers
    states, *_ = readout.run_layers(network.embed(tokens_BT, positions_BT), positions_BT, None, None, 0, depth)
    next_BT = jnp.roll(tokens_BT, -1, axis=1)

    def of_layer(number):
        ready_BTD, head = readout(states, number)
        logits_BTV = head.project(ready_BTD)
        logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), next_BT[..., None], axis=-1)[..., 0]
        right_BT = logits_BTV.argmax(-1) == next_BT
        return jnp.array([jnp.where(asked_BT, x, 0).sum() for x in (-logp_BT, right_BT, 1)])

    return jnp.stack([of_layer(number) for number in range(1, depth + 1)], axis=1)
