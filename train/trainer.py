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
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sled.checks import Instance, OrNone, Whole, settle
from sled.describe import describe
from sled.errors import SettingError, TrainingError
from sled.models import save_folder
from sled.models.config import ExitHeads
from sled.models.hub import folder_of
from sled.train.batches import Batches
from sled.train.begin import Beginning, NewModel, begin, first_decoder
from sled.train.checkpoint import Checkpoints, complete_steps
from sled.train.memory import Plan, plan
from sled.train.mesh import Mesh
from sled.train.metrics import HELD_OUT, Metrics, progress_bar, progress_line
from sled.train.optimizers import make_optimizer, rate_schedule
from sled.train.packing import Layout
from sled.train.picture import draw
from sled.train.placing import Placing
from sled.train.preemption import Preemption, leave
from sled.train.recipes import ALL, HEADS, Recipe
from sled.train.rows import Batch, Rows, read
from sled.train.same_run import anything, same_rates
from sled.train.sources import Source
from sled.train.steps import StepMetrics, init_state, make_evaluation, make_train_step
from sled.train.throughput import Throughput, flops_per_token

FORM, CHECKPOINTS, MODEL = "form", "checkpoints", "model"
STRETCH = 1000  # steps for which a compilation pays that leaves dropped rows out, at least


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained on what, how, and where it is written.

    folder: for all that the run leaves; given again with the same settings, the run goes on from its last checkpoint.
    model: "demo", a Hugging Face folder or a hub id; or `NewModel(...)`.
    source, held_out: the data, and what the layers' held-out losses are measured on (None: not measured).
    shape, too_long, prompt_weight: see `sled.train.packing.Layout`.
    heads: new exit heads for the model, which it then has; None: those it has, if any.
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
    heads: ExitHeads | None = None
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    every: int = 500
    keep: int = 3
    tell: int = 10
    held_out_rows: int = 256
    tensorboard: bool = False

    def __post_init__(self):
        settle(self, recipe=Instance(Recipe, traced=False, hint="give sled.train.recipes.named(...)"),
               source=Instance(Source, traced=False, hint="give sled.train.sources.Source(...)"),
               heads=OrNone(Instance(ExitHeads, traced=False, hint="give sled.models.ExitHeads(...)")),
               mesh=Instance(Mesh, traced=False, hint="give sled.train.mesh.Mesh(...)"),
               every=Whole(1, hint="it counts the steps between two checkpoints"),
               keep=Whole(1, hint="it counts checkpoints"),
               tell=Whole(1, hint="it counts the steps between two lines of metrics"),
               held_out_rows=Whole(1, hint="it counts rows"),
               held_out=OrNone(Instance(Source, traced=False, hint="give sled.train.sources.Source(...)")))
        object.__setattr__(self, "folder", Path(self.folder))


def train(run: Run, *, optimizer: optax.GradientTransformation | None = None) -> Path:
    """Trains to the end of the recipe, and returns the folder of the trained model.

    optimizer: of one's own, in place of the recipe's; it is not among the settings that a resumed run compares.

    Raises SettingError, DataError, CheckpointError, TrainingError where a loss is not finite, and whatever reading the
    model raises. SIGTERM ends the process in order, with exit code 75, after a checkpoint.
    """
    return _Training(run, optimizer).finish()


def plan_of(run: Run) -> Plan:
    """What each device would hold, from shapes alone. Raises as `train` does."""
    with tempfile.TemporaryDirectory() as form:
        config = _begin(run, Path(form), begun=False).config
    return plan(Placing(config, run.mesh.build()), _optimizer(run.recipe), learns=run.recipe.learns)


def _begin(run: Run, form: Path, *, begun: bool) -> Beginning:
    model = run.model if isinstance(run.model, NewModel) else folder_of(run.model)
    beginning = begin(model, run.source, run.recipe.context, form, heads=run.heads, begun=begun)
    if run.recipe.learns == HEADS and beginning.config.exit_heads is None:
        raise SettingError("the recipe tunes exit heads alone, but the model has none; give it some as heads "
                           "(--exit-heads 2 4), or take another recipe")
    return beginning


def _rates(recipe: Recipe) -> Callable[[int], optax.Schedule]:
    return rate_schedule(recipe.schedule, recipe.rate, recipe.warmup)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    return make_optimizer(recipe.optimizer, _rates(recipe)(recipe.steps), clip=recipe.clip,
                          weight_decay=recipe.weight_decay, beta2=recipe.beta2)


class _Training:
    """A run in flight."""

    def __init__(self, run: Run, optimizer: optax.GradientTransformation | None):
        self.run, recipe = run, run.recipe
        mesh = run.mesh.build()
        self.beginning = _begin(run, run.folder / FORM, begun=bool(complete_steps(run.folder / CHECKPOINTS)))
        self.placing = Placing(self.beginning.config, mesh) if mesh.size > 1 else None
        self.part = recipe.batch // recipe.accumulate
        if self.placing is not None:
            self.placing.local_rows(self.part)  # raises where a part does not divide
        self.rows = self._read(run.source)
        self.held_out = None if run.held_out is None else self._read(run.held_out)
        self.optimizer = optimizer or _optimizer(recipe)
        self.batches = self._batches(self.rows, recipe.batch)
        decoder = first_decoder(self.beginning, recipe.seed, self.placing)
        self.graph, weights = nnx.split(decoder)
        self.state = init_state(weights, self.optimizer, self.placing, learns=recipe.learns)
        self.train_step = make_train_step(decoder, recipe, self.optimizer, self.placing)
        self.evaluate = make_evaluation(decoder, recipe, self.placing)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
        self.settings = self._settings()
        self.may_change = {"recipe.steps": same_rates(_rates(recipe)), "recipe.remat": anything}
        if recipe.dropout is None:  # which draws for each part on its own
            self.may_change["recipe.accumulate"] = anything

    def finish(self) -> Path:
        run, recipe = self.run, self.run.recipe
        with Preemption() as preemption, Checkpoints(
                run.folder / CHECKPOINTS, self.settings, every=run.every, keep=run.keep,
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
        return save_folder(nnx.merge(self.graph, self.state.weights), run.folder / MODEL,
                           tokenizer_from=run.folder / FORM)

    def _steps(self, begun: int, metrics: Metrics) -> Iterator[tuple[int, dict[str, Any]]]:
        """Takes the steps after `begun`; yields each with what was told of it, most often nothing."""
        run, recipe, depth = self.run, self.run.recipe, self.beginning.config.num_layers
        exits = recipe.exits.exits_at(0, depth)[0].size - 1
        flops = flops_per_token(self.beginning.config, self.parameters, self.beginning.context, exits)
        throughput = Throughput(flops if recipe.learns == ALL else None)  # the count is of a whole model's training
        for step in range(begun + 1, recipe.steps + 1):
            batch = next(self.batches)
            self.state, made = self.train_step(self.state, self._global(batch, recipe.batch), self._dropout(step - 1))
            throughput.count(np.count_nonzero(batch.segments_BT) * (recipe.batch // len(batch.segments_BT)))
            due = step % run.every == 0 or step == recipe.steps
            told: dict[str, Any] = {}
            if due or step % run.tell == 0:
                told = self._told(step, made) | throughput.read()
            if due and self.held_out is not None:
                with throughput.paused():
                    told |= self._measure()
            if told:
                metrics.write(step, told)
            yield step, told

    def _told(self, step: int, made: StepMetrics) -> dict[str, Any]:
        """What the metrics file has of a step. Raises TrainingError where its numbers are not finite."""
        loss, norm = float(made.loss), float(made.gradient_norm)
        if not np.isfinite([loss, norm]).all():
            raise TrainingError(f"step {step} has loss {loss:g} and a gradient of norm {norm:g}; the checkpoints "
                                f"before it are whole: take a lower rate than {self.run.recipe.rate:g}, or look at the "
                                "data")
        arrays = dict(exits=made.layers_E, exit_losses=made.nll_E, accuracy=made.accuracy)
        return dict(loss=loss, **{name: np.asarray(value).tolist() for name, value in arrays.items()},
                    gradient_norm=norm)

    def _dropout(self, step: int):
        """Layer dropout that leaves out work, told how much in long stretches: each may compile once."""
        recipe = self.run.recipe
        if recipe.dropout is None:
            return None
        stretch = max(recipe.steps // 8, STRETCH)
        first = step // stretch * stretch
        return recipe.dropout.saving(self.part, self.beginning.config.num_layers, first, first + stretch - 1)

    def _measure(self) -> dict[str, list[float]]:
        """Held-out loss and accuracy of the layers 1..L."""
        batches = self._batches(self.held_out, self.part, epochs=1)
        some = itertools.islice(batches, -(-self.run.held_out_rows // self.part))
        sums = [jax.device_get(self.evaluate(self.state.weights, self._global(batch, self.part))) for batch in some]
        nll_L, correct_L, targets = (np.sum(parts, axis=0, dtype=np.float64) for parts in zip(*sums, strict=True))
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
        layout = Layout(self.beginning.context, shape=run.shape, too_long=run.too_long, prompt_weight=run.prompt_weight)
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
        return dict(recipe=describe(run.recipe), config=describe(self.beginning.config), model=self.beginning.origin,
                    data=self.rows.digest, shape=run.shape, prompt_weight=run.prompt_weight,
                    held_out=self.held_out and self.held_out.digest)

    @staticmethod
    def _say(line: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stderr)
