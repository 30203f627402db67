"""`calibrate`: the full model once, then early exit at ever lower thresholds, until one fails."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from sled.calibration.fingerprint import fingerprint
from sled.calibration.learn_then_test import (
    DELTA,
    EPSILON,
    can_lose,
    descending,
    fewest_losses,
    last_rejected,
    walk,
)
from sled.calibration.losses import Consistency, consistency
from sled.calibration.record import Calibration, Step
from sled.decoding.options import FULL_DEPTH, Decoding
from sled.errors import CalibrationError, SettingError
from sled.exits import Policy
from sled.io import shown
from sled.lm import LM
from sled.results import Output
from sled.settings.rules import OrNone, Several, Whole
from sled.text.prompts import Prompts, prompt_ids
from sled.timing import hardware, versions

REFERENCES = OrNone(Several(object, "right answers", one=False, hint="give one reference per prompt"))
# Dense where most measures have most of their tokens. More thresholds cost time, never the guarantee.
GRID = (0.999, 0.99, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)


def calibrate(lm: LM, prompts: Prompts, *, exits: Policy, delta: float = 0.1, epsilon: float = 0.05,
              grid: Iterable[float] | None = None, loss: str | Callable | None = None,
              references: Sequence[Any] | None = None, risk: Callable | None = None, seed: int = 0,
              batch_size: int = 32, progress: bool = True, **decoding) -> Calibration:
    """The lowest threshold of `exits` that can be shown to keep the expected loss at `delta` or below.

    The guarantee (Learn-then-Test, Angelopoulos et al. 2021; for early exit CALM, Schuster et al. 2022): if
    these prompts are independent draws from the source of those to come, the choice exceeds `delta` with
    probability `epsilon` at most. Fix the settings before you look at results; see docs/calibration.md.

    prompts: as for `LM.generate`, at least ln(epsilon) / ln(1 - delta) of them; a few hundred are usual.
    exits: the policy meant, with a threshold, whose present value is not read.
    grid: thresholds, in any order; tried from the highest down, to the first that fails.
    loss: what is bounded, in [0, 1] per prompt. "rouge" (None means it): 1 - ROUGE-L between the token ids of
        the early and the full model's output; "exact": whether they differ; or a function of both texts
        (token ids, without a tokenizer).
    references, risk: instead of a loss, what a right answer is, one per prompt, and risk(text, reference) in
        [0, 1]; the loss is then max(0, risk of the early text - risk of the full model's).
    decoding: the other fields of `sled.Decoding`, as you will serve; seed, batch_size: as for `LM.generate`. Prompt
        i draws from stream seed + i at every threshold.
    progress: shows a bar over the runs.

    Raises: CalibrationError (too few prompts, a loss outside [0, 1], or one that even the texts of other prompts would
    keep, as any text does where the full model answers nothing rightly), PromptError, SettingError, TokenizerError.
    """
    delta, epsilon = DELTA("delta", delta), EPSILON("epsilon", epsilon)
    grid = descending(GRID if grid is None else grid)
    batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
    serving = Decoding(exits=exits, **decoding)
    lm.check(serving.replace(exits=exits.with_threshold(grid[0])))  # before any work
    references = REFERENCES("references", references)
    compare = consistency(loss, references, risk)
    ids = prompt_ids(prompts, lm.text, lm.config)
    if references is not None and len(references) != len(ids):
        raise SettingError(f"{len(references)} references were given for {len(ids)} prompts; "
                           "give one reference per prompt")
    if len(ids) < fewest_losses(delta, epsilon):
        raise CalibrationError(
            f"{len(ids)} prompts show nothing at delta {delta:g} and epsilon {epsilon:g}, even if every loss is 0; "
            f"give at least {fewest_losses(delta, epsilon):.0f}, or a larger delta or epsilon")
    bound = fingerprint(lm, serving)

    def generate(exits: Policy) -> Output:
        return lm.decode(ids, serving.replace(exits=exits), seed=seed, batch_size=batch_size)

    steps = tuple(_steps(generate, exits, grid, compare, delta=delta, epsilon=epsilon, progress=progress))
    return Calibration(
        threshold=last_rejected(steps, epsilon), delta=delta, epsilon=epsilon, loss=compare.name, prompts=len(ids),
        grid=grid, steps=steps, full_depth=lm.config.num_layers, serving=bound, model=lm.name, seed=int(seed),
        batch_size=batch_size, date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"sled-jax": importlib.metadata.version("sled-jax"), **versions()}, hardware=hardware())


def _steps(generate: Callable[[Policy], Output], exits: Policy, grid, compare: Consistency, *, delta: float,
           epsilon: float, progress: bool) -> Iterator[Step]:
    with tqdm(total=1 + len(grid), unit="run", disable=not progress) as bar:
        bar.set_description("all layers")
        full = generate(FULL_DEPTH)
        bar.update()
        _check_sight(compare, full, delta, epsilon)
        early: Output | None = None

        def losses_at(threshold: float):
            nonlocal early
            bar.set_description(f"threshold {threshold:g}")
            early = generate(exits.with_threshold(threshold))
            bar.update()
            return compare.losses(early, full)

        for tested in walk(grid, losses_at, delta=delta, epsilon=epsilon):
            bar.set_postfix_str(f"mean loss {tested.mean_loss:.4f}, p {tested.p_value:.2g}")
            yield Step(*tested, mean_depth=early.stats.mean_depth)
        bar.total = bar.n  # the walk may end before the grid does
        bar.refresh()


def _check_sight(compare: Consistency, full: Output, delta: float, epsilon: float) -> None:
    """Raises CalibrationError where a loss of `delta` would not be seen: not even where each text is another prompt's.

    So it is with risks and functions of one's own where the full model's texts are all wrong, or hold nothing of what
    is compared.
    """
    following = lambda entries: entries and [*entries[1:], entries[0]]  # noqa: E731
    other = dataclasses.replace(full, tokens=following(full.tokens), texts=following(full.texts))
    seen, n = float(compare.losses(other, full).mean()), len(full.tokens)
    if not can_lose(seen, n, delta, epsilon):
        first = shown(full.tokens[0] if full.texts is None else full.texts[0])
        raise CalibrationError(
            f"{n} prompts do not show that a text can lose more than delta {delta:g}: where each text is another "
            f"prompt's, the mean loss ({compare.name}) is {seen:.3g}. So an early exit that answers nothing could be "
            "called safe. Does the full model do what is asked of it? Give prompts that it answers, more of them, a "
            f"smaller delta or another loss; its first text is {first}")
