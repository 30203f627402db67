"""Stages of a pipeline: the steps of the clock that texts take, one batch after another and following each other.

Steps are counted, not timed: what one takes depends on the devices.
"""

from __future__ import annotations

import dataclasses
from statistics import fmean

import jax
from tqdm import tqdm

import sled
from sled.bench.report import BenchReport, column
from sled.decoding.options import Decoding
from sled.decoding.rows import RunShape, begin_run
from sled.decoding.staged import StagedGeneration
from sled.demo import MAX_NEW_TOKENS
from sled.eval.questions import demo_questions
from sled.lm import LM
from sled.settings.rules import Whole
from sled.text.prompts import prompt_ids

THRESHOLDS = (0.0, 0.5, 0.9, 1.0)


@dataclasses.dataclass
class StageRow:
    """Exits wherever a stage ends, at one threshold.

    steps_per_token: of a row, in a batch by itself. after_another, following: steps until all texts have ended, of as
    many batches as there are stages. times_fewer: the first over the second. in_use: of the rows that a stage works
    on in all steps, the share that hold a token, batches following each other; texts that ended hold none.
    """

    threshold: float = column("threshold")
    layers: float = column("mean depth")
    steps_per_token: float = column("steps per token", decimals=3)
    after_another: int = column("steps, one batch after another")
    following: int = column("steps, following each other")
    times_fewer: float = column("times fewer")
    in_use: float = column("rows in use")
    equal: float = column("texts as one device's")


def run_stages_bench(*, model: str = "demo", batch_size: int = 12, new_tokens: int = MAX_NEW_TOKENS) -> BenchReport:
    """Decodes held-out word problems over all devices, a stage each, and once more on one.

    batch_size: problems of a batch; there are as many batches as stages. Raises SettingError for a number out of range
    or a single device, and what loading onto stages raises.
    """
    batch_size = Whole(1, hint="it counts the problems of a batch")("batch_size", batch_size)
    stages = Whole(2, hint="each device is a stage; XLA_FLAGS=--xla_force_host_platform_device_count=4 makes four of a "
                           "CPU")("the number of devices", jax.device_count())
    one = sled.load(model, dtype="float32")
    split = sled.load(model, dtype="float32", mesh=sled.Mesh(fsdp=1, stage=stages))
    ids = prompt_ids(demo_questions(stages * batch_size).prompts, one.text, one.config)
    new_tokens = Whole(1, one.config.context - max(map(len, ids)), hint="prompts and new tokens lie in the model's "
                       "context")("new_tokens", new_tokens)
    per = one.config.num_layers // stages
    ends = tuple(per * (s + 1) for s in range(stages - 1))
    rows = []
    for threshold in tqdm(THRESHOLDS, desc="sled bench stages", unit="threshold"):
        exits = sled.EarlyExit(ends, threshold)
        expected = one.generate(ids, exits=exits, max_new_tokens=new_tokens, batch_size=len(ids)).tokens
        alone = [_run(split, ids[at:at + batch_size], exits, new_tokens) for at in range(0, len(ids), batch_size)]
        together = _run(split, ids, exits, new_tokens, microbatches=stages)
        texts = [run.emitted(row) for run in alone for row in range(batch_size)]
        tokens, steps = sum(len(text.tokens) for text in texts), max(together.steps)
        after_another = sum(max(run.steps) for run in alone)
        equal = fmean(first.tokens == second == together.emitted(i).tokens
                      for i, (first, second) in enumerate(zip(texts, expected, strict=True)))
        rows.append(StageRow(
            threshold=threshold, layers=fmean(layer for text in texts for layer in text.exit_layers),
            steps_per_token=sum(sum(run.steps) for run in alone) / tokens, after_another=after_another, following=steps,
            times_fewer=after_another / steps, in_use=tokens / (steps * batch_size), equal=equal))
    title = (f"{stages} stages of {per} layers, {one.name}, float32: {stages} batches of {batch_size} held-out "
             "problems; steps of the clock")
    return BenchReport(title, {"model": one.name, "stages": stages, "batch_size": batch_size}, rows, [])


def _run(lm: LM, ids, exits, new_tokens: int, microbatches: int = 1) -> StagedGeneration:
    shape = RunShape(len(ids) // microbatches, microbatches, len(ids))
    run = begin_run(lm.build, lm.params, ids, range(len(ids)), Decoding(exits=exits, max_new_tokens=new_tokens), shape,
                    context=lm.config.context, seed=0, stop_ids=lm.config.eos_ids)
    run.advance()
    return run
