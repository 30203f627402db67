"""`train`: a whole run, from model and data to a Hugging Face folder; killed at any moment, it goes on where it was.

What it leaves is described in `sled.train.run.folder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from sled.errors import SettingError, TrainingError
from sled.models import save_folder
from sled.models.config import ExitHeads
from sled.models.huggingface import refuse_no_model
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.sharding import Sharding
from sled.settings.describe import describe
from sled.settings.rules import Instance, OrNone, Whole, settle
from sled.train.data.batches import Batches, some_batches
from sled.train.data.packing import Layout
from sled.train.data.rows import Batch, Rows, read
from sled.train.data.sources import Source
from sled.train.initial_model import Beginning, NewModel, begin, first_decoder
from sled.train.objective.exit_weights import LastOnly, exit_counter
from sled.train.objective.train_step import StepMetrics, init_state, make_evaluation, make_train_step, static_exits
from sled.train.optimizers import make_optimizer, rate_schedule
from sled.train.parallel.distributed import check_alike
from sled.train.parallel.memory_plan import Plan, plan
from sled.train.recipes import ALL, HEADS, Recipe
from sled.train.run.checkpoint import Checkpoints
from sled.train.run.folder import RunFolder
from sled.train.run.metrics import HELD_OUT, Metrics, progress_bar, progress_line
from sled.train.run.picture import draw
from sled.train.run.preemption import Preemption, leave
from sled.train.run.resume import anything, same_rates
from sled.train.run.throughput import Throughput, flops_per_token

STRETCH = 1000  # steps for which a compilation pays that leaves dropped rows out, at least
# What differs because something else does is not told besides: see `sled.train.run.resume`.
FOLLOW = {"model": ("config", "data", "held_out"), "recipe.context": ("config", "data", "held_out"),
          "data.shape": ("held_out.shape",), "data.too_long": ("held_out.too_long",),
          "recipe.steps": ("recipe.exits", "recipe.dropout")}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained on what, how, and where it is written.

    folder: for all that the run leaves, new or empty; given again with the same settings, the run goes on from its
        last checkpoint.
    model: "demo", a Hugging Face folder or a hub id; or `NewModel(...)`.
    source, held_out: the data, and what the layers' held-out losses are measured on (None: not measured).
    shape, too_long, prompt_weight: see `sled.train.data.packing.Layout`.
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
               source=Instance(Source, traced=False, hint="give sled.train.data.sources.Source(...)"),
               heads=OrNone(Instance(ExitHeads, traced=False, hint="give sled.models.ExitHeads(...)")),
               mesh=Instance(Mesh, traced=False, hint="give sled.models.sharding.mesh.Mesh(...)"),
               every=Whole(1, hint="it counts the steps between two checkpoints"),
               keep=Whole(1, hint="it counts checkpoints"),
               tell=Whole(1, hint="it counts the steps between two lines of metrics"),
               held_out_rows=Whole(1, hint="it counts rows"),
               held_out=OrNone(Instance(Source, traced=False, hint="give sled.train.data.sources.Source(...)")))
        object.__setattr__(self, "folder", Path(self.folder))


def train(run: Run, *, optimizer: optax.GradientTransformation | None = None) -> Path:
    """Trains to the end of the recipe, and returns the folder of the trained model.

    optimizer: of one's own, in place of the recipe's; it is not among the settings that a resumed run compares.

    Raises SettingError, DataError, CheckpointError, TrainingError where a loss is not finite, and whatever reading the
    model raises. SIGTERM ends the process in order, with exit code 75, after a checkpoint.
    """
    with RunFolder(run.folder).claimed():
        return _Training(run, optimizer).finish()


def plan_of(run: Run) -> Plan:
    """What each device would hold, from shapes alone. Raises as `train` does."""
    with tempfile.TemporaryDirectory() as form:
        config = _begin(run, Path(form), begun=False).config
    return plan(Sharding(config, run.mesh.build()), _optimizer(run.recipe), learns=run.recipe.learns)


def _begin(run: Run, form: Path, *, begun: bool) -> Beginning:
    beginning = begin(run.model, run.source, run.recipe.context, form, heads=run.heads, begun=begun)
    if run.recipe.learns == HEADS and beginning.config.exit_heads is None:
        raise SettingError("the recipe tunes exit heads alone, but the model has none; give it some as heads "
                           "(--exit-heads 2 4), or take another recipe")
    static_exits(beginning.config, run.recipe)  # raises where they do not fit the model
    return beginning


def _rates(recipe: Recipe) -> Callable[[int], optax.Schedule]:
    return rate_schedule(recipe.schedule, recipe.rate, recipe.warmup)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    return make_optimizer(recipe.optimizer, _rates(recipe)(recipe.steps), clip=recipe.clip,
                          weight_decay=recipe.weight_decay, beta2=recipe.beta2)


def _sizes(weights: nnx.State) -> tuple[int, int]:
    """Parameters of the model without exit heads, and of these."""
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    heads = size(weights["exit_heads"]) if "exit_heads" in weights else 0
    return size(weights) - heads, heads


class _Training:
    """A run in flight."""

    def __init__(self, run: Run, optimizer: optax.GradientTransformation | None):
        self.run, recipe = run, run.recipe
        self.folder = RunFolder(run.folder)
        steps = self.folder.steps
        check_alike({"--every": run.every, "--keep": run.keep, "--tell": run.tell,
                     "--held-out-rows": run.held_out_rows, "the mesh": describe(run.mesh),
                     "the list of checkpoints in --out": steps})
        refuse_no_model(self.folder.model)
        mesh = run.mesh.build()
        self.part = recipe.batch // recipe.accumulate
        begun = bool(steps)
        with contextlib.nullcontext(self.folder.form) if begun else self.folder.new_form() as form:
            self.beginning = _begin(run, form, begun=begun)
            self.sharding = Sharding(self.beginning.config, mesh) if mesh.size > 1 else None
            if self.sharding is not None:
                self.sharding.local_rows(self.part)  # raises where a part does not divide
            self.rows = self._read(run.source)
            self.held_out = None if run.held_out is None else self._read(run.held_out)
        self.settings = self._settings()
        check_alike(self.settings)
        self.optimizer = optimizer or _optimizer(recipe)
        self.batches = Batches(self.rows, recipe.batch, seed=recipe.seed, **self._who(recipe.batch))
        decoder = first_decoder(self.beginning, recipe.seed, self.sharding)
        self.graph, weights = nnx.split(decoder)
        self.state = init_state(weights, self.optimizer, self.sharding, learns=recipe.learns)
        self.train_step = make_train_step(decoder, recipe, self.optimizer, self.sharding)
        self.evaluate = make_evaluation(decoder, recipe, self.sharding)
        self.may_change = {"recipe.steps": same_rates(_rates(recipe)), "recipe.remat": anything}
        if recipe.dropout is None:  # which draws for each part on its own
            self.may_change["recipe.accumulate"] = anything

    def finish(self) -> Path:
        run, recipe = self.run, self.run.recipe
        with Preemption() as preemption, Checkpoints(
                self.folder.checkpoints, self.settings, every=run.every, keep=run.keep, may_change=self.may_change,
                follow=FOLLOW) as checkpoints:
            begun = self._resume(checkpoints)
            self._announce()
            with self._metrics(begun) as metrics, progress_bar(recipe.steps, begun) as bar:
                for step, told, made in self._steps(begun, metrics):
                    last = step == recipe.steps
                    if told:
                        shown = ("loss", "tokens_per_second", HELD_OUT)
                        bar.set_postfix_str(progress_line({name: told[name] for name in shown if name in told}))
                    bar.update(step - bar.n)
                    stop = preemption.reached(step)
                    if stop:
                        self._check(step, made)
                    checkpoints.save(step, self.state, {"data": self.batches.get_state()}, force=stop or last)
                    if stop and not last:
                        checkpoints.wait()
                        leave(step, checkpoints.folder)
        if self.held_out is not None and jax.process_index() == 0:
            draw(self.folder.metrics, self.folder.picture)
        return save_folder(nnx.merge(self.graph, self.state.weights), self.folder.model,
                           tokenizer_from=self.folder.form)

    def _announce(self) -> None:
        model, recipe, vocabulary = self.run.model, self.run.recipe, self.beginning.config.vocab_size
        self._say(f"{sum(_sizes(self.state.weights)):,} parameters on {jax.device_count()} "
                  f"{jax.devices()[0].device_kind}; data: {self.rows.report}")
        self._say(f"recipe: {recipe}")
        if recipe.learns == ALL and recipe.exits != LastOnly():
            early = exit_counter(recipe.exits, self.beginning.config.num_layers)(0, recipe.steps)
            self._say(f"early exits that learn at a step, on average: {early:.2f}" if early else
                      "warning: no early exit learns with this recipe in this model")
        if isinstance(model, NewModel) and model.tokenizer is None and vocabulary < model.vocabulary:
            self._say(f"warning: the tokenizer has {vocabulary} tokens, not {model.vocabulary}: the data gives no more")
        if recipe.steps <= recipe.warmup:
            self._say(f"warning: the learning rate rises over {recipe.warmup} steps, but the run has {recipe.steps}; "
                      "give a shorter warm-up")

    def _steps(self, begun: int, metrics: Metrics) -> Iterator[tuple[int, dict[str, Any], StepMetrics]]:
        """Takes the steps after `begun`; yields each with what was told of it, most often nothing, and its metrics."""
        run, recipe = self.run, self.run.recipe
        flops = flops_per_token(self.beginning.config, *_sizes(self.state.weights), self.beginning.context)
        throughput = Throughput(flops if recipe.learns == ALL else None)  # the count is of a whole model's training
        exits, read = exit_counter(recipe.exits, self.beginning.config.num_layers), begun
        for step in range(begun + 1, recipe.steps + 1):
            batch = next(self.batches)
            self.state, made = self.train_step(self.state, self._global(batch, recipe.batch), self._dropout(step - 1))
            throughput.count(np.count_nonzero(batch.segments_BT) * (recipe.batch // len(batch.segments_BT)))
            due = step % run.every == 0 or step == recipe.steps
            told: dict[str, Any] = {}
            if due or step % run.tell == 0:
                told = self._told(step, made) | throughput.read(lambda: exits(read, step))  # noqa: B023
                read = step
            if due and self.held_out is not None:
                with throughput.paused():
                    told |= self._measure()
            if told:
                metrics.write(step, told)
            yield step, told, made

    def _told(self, step: int, made: StepMetrics) -> dict[str, Any]:
        """What the metrics file has of a step. Raises TrainingError where its numbers are not finite."""
        self._check(step, made)
        counts_E = np.isfinite(made.nll_E)  # an exit of weight 0 has none
        arrays = dict(exits=np.asarray(made.layers_E)[counts_E], exit_losses=np.asarray(made.nll_E)[counts_E],
                      accuracy=np.asarray(made.accuracy))
        return dict(loss=float(made.loss), **{name: value.tolist() for name, value in arrays.items()},
                    gradient_norm=float(made.gradient_norm))

    def _check(self, step: int, made: StepMetrics) -> None:
        """Before a step is told or saved. Weights that are not finite, of whichever step, give no finite loss."""
        loss, norm = float(made.loss), float(made.gradient_norm)
        if not np.isfinite([loss, norm]).all():
            raise TrainingError(f"step {step} has loss {loss:g} and a gradient of norm {norm:g}; look at the data, or "
                                f"train in another folder with a lower rate than {self.run.recipe.rate:g}; what was "
                                f"saved before stays in {self.folder.checkpoints}")

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
        some = some_batches(self.held_out, self.run.held_out_rows, self.part, seed=self.run.recipe.seed,
                            **self._who(self.part))
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

    def _who(self, size: int) -> dict[str, int]:
        """Whose part of a batch of `size` rows this process has, and of how many."""
        if self.sharding is None:
            return dict(process_index=0, process_count=1)
        own = self.sharding.local_rows(size)
        count = own.stop - own.start
        return dict(process_index=own.start // count, process_count=size // count)

    def _global(self, batch: Batch, rows: int) -> Batch:
        return batch if self.sharding is None else self.sharding.batch(batch, rows)

    def _metrics(self, begun: int) -> Metrics:
        return Metrics(self.folder.metrics, resumed_from=begun,
                       tensorboard=self.folder.tensorboard if self.run.tensorboard else None)

    def _settings(self) -> dict[str, Any]:
        """All that decides what the run computes, as JSON has it."""
        run, context = self.run, self.beginning.context

        def told(source: Source | None, rows: Rows | None):
            return source and dict(name=source.name, digest=rows.digest, **source.how, context=context, shape=run.shape,
                                   too_long=run.too_long)

        return dict(recipe=describe(run.recipe), config=describe(self.beginning.config), model=self.beginning.origin,
                    data=told(run.source, self.rows), prompt_weight=run.prompt_weight,
                    held_out=told(run.held_out, self.held_out))

    @staticmethod
    def _say(line: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stderr)
