"""A rehearsal of a run (`sled train --dry-run`): what `train` does before its first step, and a step, in no folder."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time

import jax
import optax

from sled.io import size_in_words
from sled.train.data.batches import some_batches
from sled.train.data.rows import DataReport
from sled.train.parallel.memory_plan import MemoryPlan, memory_plan
from sled.train.recipes import Recipe
from sled.train.run.folder import RunFolder
from sled.train.trainer import Prepared, TrainingRun, optimizer_of, prepare, share_of


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a run will be: its recipe with the context that the model gave, the data, seconds and bytes.

    epochs: passes over the data. step_seconds: of one step, without its compilation (`compile_seconds`).
    step_bytes, measuring_bytes, saving_bytes: the most that a device holds of arrays at a step, while held-out losses
    are measured (None without such data), and while a checkpoint is saved; the program itself comes besides.
    """

    recipe: Recipe
    parameters: int
    data: DataReport
    held_out: DataReport | None
    epochs: float
    compile_seconds: float
    step_seconds: float
    plan: MemoryPlan
    step_bytes: int
    measuring_bytes: int | None
    saving_bytes: int

    def text(self) -> str:
        """An aligned table, a line for each thing; of several devices the share of every parameter besides."""
        hours = self.step_seconds * self.recipe.steps / 3600
        whole = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        size = size_in_words
        lines = [("parameters", f"{self.parameters:,}"), ("data", str(self.data))]
        if self.held_out is not None:
            lines.append(("held out", str(self.held_out)))
        lines += [("epochs", f"{self.epochs:.2f} in {self.recipe.steps:,} steps"),
                  ("time", f"{self.step_seconds:.3g} s a step, by one, so about {whole} in all; "
                           f"{self.compile_seconds:.0f} s of compilation before"),
                  ("memory", "the most on each device, without the program itself:"),
                  ("  weights", size(self.plan.weights)), ("  optimizer", size(self.plan.optimizer)),
                  ("  a step", f"{size(self.step_bytes)} with these, gradients and activations")]
        if self.measuring_bytes is not None:
            lines.append(("  measuring", size(self.measuring_bytes)))
        elsewhere = "" if jax.default_backend() == "cpu" else f", and {size(self.plan.state)} of the host's memory"
        lines.append(("  saving", size(self.saving_bytes) + elsewhere))
        width = max(len(name) for name, _ in lines)
        table = [self.recipe.text(), "", *(f"  {name:<{width}}  {value}" for name, value in lines)]
        return "\n".join([*table, "", self.plan.text()] if self.plan.devices > 1 else table)


def rehearse(run: TrainingRun, *, optimizer: optax.GradientTransformation | None = None) -> Rehearsal:
    """Reads the model and all data, tokenised and cached as for `train`, compiles, and takes one step; writes nothing
    into the run's folder. All processes call this together. Raises as `train` does."""
    recipe, optimizer = run.recipe, optimizer or optimizer_of(run.recipe)
    with tempfile.TemporaryDirectory() as folder:
        prepared, state = prepare(run, RunFolder(folder, shared=False), optimizer)
        arguments = (state, prepared.on_devices(next(prepared.batches), recipe.batch), prepared.dropout(1))
        began = time.perf_counter()
        step = prepared.train_step.lower(*arguments).compile()
        measuring = _measuring(prepared, state)
        compiled = time.perf_counter()
        largest = max(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                      for leaf in jax.tree.leaves(state))
        jax.block_until_ready(step(*arguments))
        taken = time.perf_counter() - compiled
    plan = memory_plan(prepared.placed, optimizer, trainable=recipe.trainable)
    return Rehearsal(
        dataclasses.replace(recipe, context=prepared.model.context), sum(prepared.sizes), prepared.rows.report,
        prepared.held_out and prepared.held_out.report, recipe.steps / prepared.batches.per_epoch, compiled - began,
        taken, plan, _most(step), measuring and plan.state - plan.weights + measuring,
        plan.state + (largest if jax.default_backend() == "cpu" else 0))


def _measuring(prepared: Prepared, state) -> int | None:
    """Bytes that the compiled evaluation of one batch takes, weights included; None without data for it."""
    if prepared.held_out is None:
        return None
    rows = prepared.part
    batch = next(some_batches(prepared.held_out, prepared.run.held_out_rows, rows, seed=prepared.run.recipe.seed,
                              **share_of(rows, prepared.sharding)))
    return _most(prepared.evaluation.lower(state.weights, prepared.on_devices(batch, rows)).compile())


def _most(program) -> int:
    """The bytes that a compiled program holds at once: what it is given, makes and needs in between."""
    of = program.memory_analysis()
    return (of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes + of.temp_size_in_bytes)
