"""What `LM.calibrate` does: the full model once, then early exit at ever lower thresholds, until one fails."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from sled.calibration.fingerprint import AN_EARLY_EXIT, bind
from sled.calibration.learn_then_test import DELTA, EPSILON, descending, fewest_losses, last_rejected, walk
from sled.calibration.losses import Consistency, consistency
from sled.calibration.record import Calibration, Step
from sled.errors import CalibrationError, SettingError
from sled.exits import EarlyExit
from sled.results import Output
from sled.settings.rules import Whole
from sled.text.prompts import prompt_ids
from sled.timing import hardware, versions

if TYPE_CHECKING:
    from sled.lm import LM

# Dense where most measures have most of their tokens. More thresholds cost time, never the guarantee.
GRID = (0.999, 0.99, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)


def calibrate(lm: LM, prompts, *, exits: EarlyExit, delta: float, epsilon: float, grid: Iterable[float] | None, loss,
              references, risk, seed: int, batch_size: int, progress: bool, **serving) -> Calibration:
    """See `LM.calibrate`. serving: fusion, schedule, sampling, max_new_tokens, stop."""
    delta, epsilon = DELTA("delta", delta), EPSILON("epsilon", epsilon)
    grid = descending(GRID if grid is None else grid)
    batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
    at = lambda threshold: dataclasses.replace(exits, threshold=threshold)  # noqa: E731
    AN_EARLY_EXIT("exits", exits).exits(lm.config.num_layers)  # for its error, before any work
    if references is not None and not isinstance(references, Iterable):
        raise SettingError(f"references is {references!r}, but must be a list; give one reference per prompt")
    references = None if references is None else list(references)
    compare = consistency(loss, references, risk)
    ids = prompt_ids(prompts, lm.text, lm.config)
    if references is not None and len(references) != len(ids):
        raise SettingError(f"{len(references)} references were given for {len(ids)} prompts; "
                           "give one reference per prompt")
    if len(ids) < fewest_losses(delta, epsilon):
        raise CalibrationError(
            f"{len(ids)} prompts show nothing at delta {delta:g} and epsilon {epsilon:g}, even if every loss is 0; "
            f"give at least {fewest_losses(delta, epsilon):.0f}, or a larger delta or epsilon")
    bound = bind(lm, exits=at(grid[0]), **serving)
    settings = dict(serving, seed=seed, batch_size=batch_size)
    steps = tuple(_steps(lm, ids, settings, grid, at, compare, delta=delta, epsilon=epsilon, progress=progress))
    return Calibration(
        threshold=last_rejected(steps, epsilon), delta=delta, epsilon=epsilon, loss=compare.name, prompts=len(ids),
        grid=grid, steps=steps, full_depth=lm.config.num_layers, serving=bound, model=lm.name, seed=int(seed),
        batch_size=batch_size, date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"sled-jax": importlib.metadata.version("sled-jax"), **versions()}, hardware=hardware())


def _steps(lm: LM, ids, settings: dict, grid, at, compare: Consistency, *, delta: float, epsilon: float,
           progress: bool) -> Iterator[Step]:
    with tqdm(total=1 + len(grid), unit="run", disable=not progress) as bar:
        bar.set_description("all layers")
        full = lm.generate(ids, **settings)
        bar.update()
        early: Output | None = None

        def losses_at(threshold: float):
            nonlocal early
            bar.set_description(f"threshold {threshold:g}")
            early = lm.generate(ids, exits=at(threshold), **settings)
            bar.update()
            return compare.losses(early, full)

        for tested in walk(grid, losses_at, delta=delta, epsilon=epsilon):
            bar.set_postfix_str(f"mean loss {tested.mean_loss:.4f}, p {tested.p_value:.2g}")
            yield Step(*tested, mean_depth=early.stats.mean_depth)
        bar.total = bar.n  # the walk may end before the grid does
        bar.refresh()
