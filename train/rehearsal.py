"""A rehearsal of a run (`sled train --dry-run`): what `train` does before its first step, and a step, in no folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
import time

import jax
import optax

from sled.io import shorten, size_in_words
from sled.text.tokenizer import Tokenizer
from sled.train.data.batches import some_batches
from sled.train.data.rows import DataReport, TrainingBatch
from sled.train.parallel.memory_plan import MemoryPlan, memory_plan
from sled.train.recipes import Recipe
from sled.train.run.folder import RunFolder
from sled.train.run.memory import Peak, peak_memory
from sled.train.trainer import TrainingRun, optimizer_of, prepare, share_of


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a run will be: its recipe with the context that the model gave, the data, seconds and bytes.

    pipeline: its stages in words, if there are any. example: the first document of the first batch, what is learnt of
    it in brackets. epochs: passes over the data. step_seconds, measuring_seconds: of one step, and of measuring the
    held-out losses once, told by one batch, both without compilation (`compile_seconds`). measurings, saves: how often.
    step_bytes, measuring_bytes, saving_bytes: the most that a device holds of arrays at a step, while held-out losses
    are measured (None without such data), and while a checkpoint is saved, as the compiled programs say.
    peak: the most that was taken while the model was read, a step taken and a batch measured, as the devices count it,
    or on a CPU the system: the whole process, with libraries and programs.
    """

    recipe: Recipe
    parameters: int
    data: DataReport
    held_out: DataReport | None
    pipeline: str | None
    example: str
    epochs: float
    compile_seconds: float
    step_seconds: float
    measuring_seconds: float
    measurings: int
    saves: int
    plan: MemoryPlan
    step_bytes: int
    measuring_bytes: int | None
    saving_bytes: int
    peak: Peak | None

    def text(self) -> str:
        """An aligned table, a line for each thing; of several devices the share of every parameter besides."""
        steps, measuring = self.step_seconds * self.recipe.steps, self.measuring_seconds * self.measurings
        size = size_in_words
        lines = [("parameters", f"{self.parameters:,}"), ("data", str(self.data)),
                 *([] if self.pipeline is None else [("pipeline", self.pipeline)]), ("example", self.example)]
        if self.held_out is not None:
            lines.append(("held out", str(self.held_out)))
        lines += [("epochs", f"{self.epochs:.2f} in {self.recipe.steps:,} steps"),
                  ("time", f"about {_duration(steps + measuring)}, and {self.compile_seconds:.0f} s of compilation "
                           "before:"),
                  ("  steps", f"{_duration(steps)}, {self.step_seconds:.3g} s each, by one")]
        if self.held_out is not None:
            lines.append(("  measuring", f"{_duration(measuring)}, {self.measuring_seconds:.3g} s each of "
                                         f"{self.measurings:,} times, by one batch"))
        lines += [("  saving", f"not included: {self.saves:,} times {size(self.plan.state)} to write"),
                  ("memory", "the most on each device, by the compiled programs, their own code not included:"),
                  ("  weights", size(self.plan.weights)), ("  optimizer", size(self.plan.optimizer)),
                  ("  a step", f"{size(self.step_bytes)} with these, gradients and activations")]
        if self.measuring_bytes is not None:
            lines.append(("  measuring", size(self.measuring_bytes)))
        elsewhere = "" if jax.default_backend() == "cpu" else f", and {size(self.plan.state)} of the host's memory"
        lines.append(("  saving", size(self.saving_bytes) + elsewhere))
        if self.peak is not None:
            lines.append(("  measured", f"{self.peak}, while this read the model, took a step and measured"))
        width = max(len(name) for name, _ in lines)
        table = [self.recipe.text(), "", *(f"  {name:<{width}}  {value}" for name, value in lines)]
        return "\n".join([*table, "", self.plan.text()] if self.plan.devices > 1 else table)


def rehearse(run: TrainingRun, *, optimizer: optax.GradientTransformation | None = None) -> Rehearsal:
    """Reads the model and all data, tokenised and cached as for `train`, compiles, and takes one step; writes nothing
    into the run's folder. All processes call this together. Raises as `train` does."""
    recipe, optimizer = run.recipe, optimizer or optimizer_of(run.recipe)
    with tempfile.TemporaryDirectory() as folder:
        prepared, state = prepare(run, RunFolder(folder, shared=False), optimizer)
        first, rows = next(prepared.batches), prepared.part
        example = _example(first, prepared.model.text)
        arguments = [state, prepared.on_devices(first, recipe.batch_size), prepared.dropout(1)]
        largest = max(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                      for leaf in jax.tree.leaves(state))
        began = time.perf_counter()
        step = prepared.train_step.lower(*arguments).compile()
        if prepared.held_out is not None:
            share = share_of(rows, prepared.sharding)
            held_out = prepared.on_devices(
                next(some_batches(prepared.held_out, run.held_out_rows, rows, seed=recipe.seed, **share)), rows)
            measure = prepared.evaluation.lower(state.weights, held_out).compile()
        compiled = time.perf_counter()
        state, _ = jax.block_until_ready(step(*arguments))
        taken = time.perf_counter() - compiled
        measuring_seconds, measuring_bytes = 0.0, None
        plan = memory_plan(prepared.placed, optimizer, trainable=recipe.trainable)
        if prepared.held_out is not None:
            began_measuring = time.perf_counter()
            jax.block_until_ready(measure(state.weights, held_out))
            measuring_seconds = (time.perf_counter() - began_measuring) * -(
                -min(run.held_out_rows, len(prepared.held_out)) // rows)
            measuring_bytes = plan.state - plan.weights + _most(measure)
    saves = -(-recipe.steps // run.save_every)
    return Rehearsal(
        dataclasses.replace(recipe, context=prepared.model.context), sum(prepared.sizes), prepared.rows.report,
        prepared.held_out and prepared.held_out.report, prepared.pipeline, example,
        recipe.steps / prepared.batches.per_epoch, compiled - began, taken, measuring_seconds, saves + 1, saves, plan,
        _most(step), measuring_bytes, plan.state + (largest if jax.default_backend() == "cpu" else 0), peak_memory())


def _example(batch: TrainingBatch, text: Tokenizer) -> str:
    """The first document, spelled as JSON has it: [what is learnt], with how much where that is not 1."""
    own_T, said = batch.segments_BT[0] == 1, []
    for weight, run in itertools.groupby(zip(batch.tokens_BT[0, own_T].tolist(), batch.weights_BT[0, own_T].tolist(),
                                             strict=True), key=lambda pair: pair[1]):
        words = shorten(text.decode([token for token, _ in run], special=True), 300)
        words = json.dumps(words, ensure_ascii=False)[1:-1]  # line breaks as \n
        said.append(f"[{words}]" + ("" if weight == 1 else f" x {weight:g} ") if weight else words)
    return "".join(said)


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _most(program) -> int:
    """The bytes that a compiled program holds at once: what it is given, makes and needs in between."""
    of = program.memory_analysis()
    return (of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes + of.temp_size_in_bytes)
