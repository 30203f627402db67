"""`train`: a whole run, from model and data to a Hugging Face folder; killed at any moment, it goes on where it was.

What a run leaves in its folder:

    form/          config.json and tokenizer of its model
    checkpoints/   the latest states, each whole
    metrics.jsonl  a line for every step that was told, each once
    layers.png     held-out loss of every layer
    model/         the trained model, when the run has reached its end
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sled.checks import Instance, Whole, settle
from sled.describe import describe
from sled.errors import SettingError
from sled.models import save_folder
from sled.models.hub import folder_of
from sled.train.batches import Batches
from sled.train.begin import NewModel, first_decoder, write_form
from sled.train.checkpoint import Checkpoints
from sled.train.memory import Plan, plan
from sled.train.mesh import Mesh
from sled.train.metrics import HELD_OUT, Metrics, progress_bar, progress_line
from sled.train.optimizers import make_optimizer, rate_schedule
from sled.train.packing import Layout
from sled.train.picture import draw
from sled.train.placing import Placing
from sled.train.preemption import Preemption, leave
from sled.train.recipes import Recipe
from sled.train.rows import Batch, Rows, read
from sled.train.same_run import anything, same_rates
from sled.train.sources import Source
from sled.train.steps import init_state, make_evaluation, make_train_step
from sled.train.throughput import Throughput, flops_per_token


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained on what, how, and where it is written.

    folder: for all that the run leaves; given again with the same settings, the run goes on from its last checkpoint.
    model: "demo", a Hugging Face folder or a hub id; or `NewModel(...)`.
    source, held_out: the data, and what the layers' held-out losses are measured on (None: not measured).
    shape, too_long, prompt_weight: see `sled.train.packing.Layout`.
    mesh: how many ways to split, where there is more than one device.
    every: steps between two checkpoints, and two measurements. keep: checkpoints that stay. tell: steps between two
        lines of metrics. held_out_rows: rows measured, at most.
    tensorboard: also write what TensorBoard reads.

    Raises SettingError for a value out of range.
    """

    folder: Path
    model: str | Path | NewModel
    source: Source
    recipe: Recipe
    held_out: Source | None = None
    shape: str = "packed"
    too_long: str = "skip"
    prompt_weight: float = 0.0
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    every: int = 500
    keep: int = 3
    tell: int = 10
    held_out_rows: int = 256
    tensorboard: bool = False

    def __post_init__(self):
        settle(self, recipe=Instance(Recipe, traced=False, hint="give sled.train.recipes.named(...)"),
               source=Instance(Source, traced=False, hint="give sled.train.sources.Source(...)"),
               mesh=Instance(Mesh, traced=False, hint="give sled.train.mesh.Mesh(...)"),
               every=Whole(1, hint="it counts the steps between two checkpoints"),
               keep=Whole(1, hint="it counts checkpoints"),
               tell=Whole(1, hint="it counts the steps between two lines of metrics"),
               held_out_rows=Whole(1, hint="it counts rows"))
        if self.held_out is not None:
            settle(self, held_out=Instance(Source, traced=False, hint="give sled.train.sources.Source(...)"))
        object.__setattr__(self, "folder", Path(self.folder))


def train(run: Run, *, optimizer: optax.GradientTransformation | None = None) -> Path:
    """Trains to the end of the recipe, and returns the folder of the trained model.

    optimizer: of one's own, in place of the recipe's; it is not among the settings that a resumed run compares.

    Raises SettingError, DataError, CheckpointError and whatever reading the model raises. SIGTERM ends the process in
    order, with exit code 75, after a checkpoint.
    """
    return _Training(run, optimizer).finish()


def plan_of(run: Run) -> Plan:
    """What each device would hold, from shapes alone. Raises as `train` does."""
    recipe = run.recipe
    model = run.model if isinstance(run.model, NewModel) else folder_of(run.model)
    with tempfile.TemporaryDirectory() as form:
        config = write_form(model, run.source, recipe.context, Path(form)).config
    return plan(Placing(config, run.mesh.build()), _optimizer(recipe))


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    rates = rate_schedule(recipe.schedule, recipe.rate, recipe.warmup)
    return make_optimizer(recipe.optimizer, rates(recipe.steps), clip=recipe.clip, weight_decay=recipe.weight_decay,
                          beta2=recipe.beta2)


class _Training:
    """A run in flight."""

    def __init__(self, run: Run, optimizer: optax.GradientTransformation | None):
        self.run, recipe = run, run.recipe
        model = run.model if isinstance(run.model, NewModel) else folder_of(run.model)
        self.beginning = write_form(model, run.source, recipe.context, run.folder / "form")
        mesh = run.mesh.build()
        self.placing = Placing(self.beginning.config, mesh) if mesh.size > 1 else None
        self.rows = self._read(run.source)
        self.held_out = None if run.held_out is None else self._read(run.held_out)
        self.optimizer = optimizer or _optimizer(recipe)
        self.batches = self._batches(self.rows, recipe.batch)
        decoder = first_decoder(self.beginning, recipe.seed, self.placing)
        self.graph, weights = nnx.split(decoder)
        self.state = init_state(weights, self.optimizer, self.placing)
        self.train_step = make_train_step(decoder, recipe, self.optimizer, self.placing)
        self.evaluate = make_evaluation(decoder, recipe, self.placing)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
        self.settings = self._settings()
        rates = rate_schedule(recipe.schedule, recipe.rate, recipe.warmup)
        self.may_change = {"recipe.steps": same_rates(rates), "recipe.remat": anything, "recipe.accumulate": anything}

    def finish(self) -> Path:
        run, recipe = self.run, self.run.recipe
        with Preemption() as preemption, Checkpoints(
                run.folder / "checkpoints", self.settings, every=run.every, keep=run.keep,
                may_change=self.may_change) as checkpoints:
            begun = self._resume(checkpoints)
            self._say(f"{self.parameters:,} parameters on {jax.device_count()} {jax.devices()[0].device_kind}; "
                      f"data: {self.rows.report}")
            with self._metrics(begun) as metrics, progress_bar(recipe.steps, begun) as bar:
                for step, told in self._steps(begun, metrics):
                    last = step == recipe.steps
                    if told:
                        shown = ("loss", "tokens_per_second", HELD_OUT)
                        bar.set_postfix_str(progress_line({name: told[name] for name in shown if name in told}))
                    bar.update(step - bar.n)
                    stop = preemption.reached(step)
                    checkpoints.save(step, self.state, {"data": self.batches.get_state()}, force=stop or last)
                    if stop and not last:
                        checkpoints.wait()
                        leave(step, checkpoints.folder)
        if self.held_out is not None and jax.process_index() == 0:
            draw(run.folder / "metrics.jsonl", run.folder / "layers.png")
        return save_folder(nnx.merge(self.graph, self.state.weights), run.folder / "model",
                           tokenizer_from=run.folder / "form")

    def _steps(self, begun: int, metrics: Metrics) -> Iterator[tuple[int, dict[str, Any]]]:
        """Takes the steps after `begun`; yields each with what was told of it, most often nothing."""
        run, recipe, depth = self.run, self.run.recipe, self.beginning.config.num_layers
        exits = recipe.exits.exits_at(0, depth)[0].size - 1
        throughput = Throughput(flops_per_token(self.beginning.config, self.parameters, recipe.context, exits))
        rows = recipe.batch // recipe.accumulate
        for step in range(begun + 1, recipe.steps + 1):
            dropout = None if recipe.dropout is None else self._saving(recipe.dropout, step - 1, rows)
            batch = next(self.batches)
            self.state, made = self.train_step(self.state, self._global(batch, recipe.batch), dropout)
            throughput.count(batch.tokens_BT.shape[1] * recipe.batch)
            told: dict[str, Any] = {}
            measured = self.held_out is not None and (step % run.every == 0 or step == recipe.steps)
            if step % run.tell == 0 or step == recipe.steps or measured:
                told = dict(loss=made.loss, exits=made.layers_E, exit_losses=made.nll_E, accuracy=made.accuracy,
                            gradient_norm=made.gradient_norm)
                told = {name: np.asarray(value).tolist() for name, value in told.items()}
                if not np.isfinite(told["loss"]):
                    raise SettingError(f"the loss of step {step} is {told['loss']}; the checkpoints before it are "
                                       f"whole: take a lower rate than {recipe.rate:g}, or look at the data")
                told |= throughput.read()
            if measured:
                with throughput.paused():
                    told |= self._measure()
            if told:
                metrics.write(step, told)
            yield step, told

    def _saving(self, dropout, step: int, rows: int):
        """Layer dropout that leaves out work, in stretches of an eighth of the run: each may compile once."""
        stretch = max(self.run.recipe.steps // 8, 1)
        first = step // stretch * stretch
        return dropout.saving(rows, self.beginning.config.num_layers, first, first + stretch - 1)

    def _measure(self) -> dict[str, list[float]]:
        """Held-out loss and accuracy of the layers 1..L."""
        size = self.run.recipe.batch // self.run.recipe.accumulate
        batches = self._batches(self.held_out, size, epochs=1)
        sums = None
        for batch, _ in zip(batches, range(-(-self.run.held_out_rows // size)), strict=False):
            means = self.evaluate(self.state.weights, self._global(batch, size))
            sums = means if sums is None else jax.tree.map(np.add, sums, means)
        nll_L, correct_L, targets = jax.tree.map(np.asarray, sums)
        return {HELD_OUT: (nll_L / targets).tolist(), "held_out_accuracy": (correct_L / targets).tolist()}

    def _resume(self, checkpoints: Checkpoints) -> int:
        if not checkpoints.steps:
            return 0
        restored = checkpoints.restore(self.state)
        self.state = restored.state
        self.batches.set_state(restored.host["data"])
        self._say(f"going on from the checkpoint of step {restored.step} in {checkpoints.folder}")
        return restored.step

    def _read(self, source: Source) -> Rows:
        run = self.run
        layout = Layout(run.recipe.context, shape=run.shape, too_long=run.too_long, prompt_weight=run.prompt_weight)
        return read(source, self.beginning.text, self.beginning.config, layout)

    def _batches(self, rows: Rows, size: int, epochs: int | None = None) -> Batches:
        who = {}
        if self.placing is not None:
            own = self.placing.local_rows(size)
            count = own.stop - own.start
            who = dict(process_index=own.start // count, process_count=size // count)
        return Batches(rows, size, seed=self.run.recipe.seed, epochs=epochs, **who)

    def _global(self, batch: Batch, rows: int) -> Batch:
        return batch if self.placing is None else self.placing.batch(batch, rows)

    def _metrics(self, begun: int) -> Metrics:
        folder = self.run.folder
        return Metrics(folder / "metrics.jsonl", resumed_from=begun,
                       tensorboard=folder / "tensorboard" if self.run.tensorboard else None)

    def _settings(self) -> dict[str, Any]:
        """All that decides what the run computes, as JSON has it."""
        run = self.run
        return dict(recipe=describe(run.recipe), config=describe(self.beginning.config), data=self.rows.digest,
                    shape=run.shape, prompt_weight=run.prompt_weight,
                    held_out=self.held_out and self.held_out.digest)

    @staticmethod
    def _say(line: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(line)
