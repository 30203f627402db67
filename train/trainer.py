"""`train`: a whole run, from model and data to a Hugging Face folder; killed at any moment, it goes on where it was.

The files that it leaves are described in `sled.train.run.folder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
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
from sled.models.sharding.mesh import ROWS, Mesh
from sled.models.sharding.sharding import Sharding
from sled.settings.decorator import setting, settings
from sled.settings.describe import describe
from sled.settings.rules import Flag, Instance, OrNone, Whole
from sled.train.data.batches import Batches, some_batches
from sled.train.data.packing import Layout
from sled.train.data.rows import TrainingBatch, TrainingRows, read_rows
from sled.train.data.sources import Source
from sled.train.initial_model import InitialModel, NewModel, prepare_initial_model
from sled.train.objective.exit_weights import LastOnly, exit_counter
from sled.train.objective.layer_dropout import LayerDropout
from sled.train.objective.train_step import (
    LayerSums,
    StepMetrics,
    TrainState,
    init_state,
    make_evaluation,
    make_train_step,
    static_exits,
)
from sled.train.optimizers import make_optimizer, rate_schedule
from sled.train.parallel.distributed import check_same_everywhere
from sled.train.parallel.pipeline import PER_STAGE, STAGE, bubble, check_microbatches, layers_of_stages
from sled.train.recipes import ALL, HEADS, Recipe
from sled.train.run.checkpoint import Checkpoints, check_format
from sled.train.run.folder import RunFolder
from sled.train.run.memory import peak_memory
from sled.train.run.metrics import HELD_OUT, Metrics, draw, progress_bar, progress_line
from sled.train.run.preemption import leave, preemption
from sled.train.run.resume import anything, same_rates
from sled.train.run.throughput import Throughput, flops_per_token

SHOWN = ("loss", "tokens_per_second", HELD_OUT)  # behind the progress bar
STRETCH = 1000  # steps for which a compilation pays that leaves dropped rows out, at least
# A difference that follows from another is not named besides: see `sled.train.run.resume`.
FOLLOW = {"model": ("config", "data", "held_out"), "recipe.context": ("config", "data", "held_out"),
          "data.shape": ("held_out.shape",), "data.too_long": ("held_out.too_long",),
          "recipe.steps": ("recipe.exits", "recipe.dropout")}
_SOURCE = Instance(Source, traced=False, hint="give sled.train.data.sources.Source(...)")


@settings
class TrainingRun:
    """The model, the data, the recipe, and the folder for all that the run leaves.

    The folder is new or empty; given again with the same settings, the run goes on from its last checkpoint. shape,
    too_long and prompt_weight are explained in `sled.train.data.packing.Layout`. The held-out losses of all layers are
    measured before the first step, and as often as checkpoints are saved.
    """

    folder: Path = setting(lambda name, value: Path(value))
    model: str | Path | NewModel = setting(help='"demo", a Hugging Face folder or a hub id; or NewModel(...)')
    source: Source = setting(_SOURCE, help="the data")
    recipe: Recipe = setting(Instance(Recipe, traced=False, hint="give sled.train.recipes.named(...)"))
    held_out: Source | None = setting(OrNone(_SOURCE), default=None, help="data that is only measured on")
    shape: str = setting(default="packed")
    too_long: str = setting(default="skip")
    prompt_weight: float = setting(default=0.0)
    heads: ExitHeads | None = setting(
        OrNone(Instance(ExitHeads, traced=False, hint="give sled.models.ExitHeads(...)")), default=None,
        help="new exit heads for the model; None keeps those it has, if any")
    long_context: bool = setting(Flag(hint="True loads a model for its long texts"), default=False,
                                 help="as for sled.load: the way in which the model computes positions")
    mesh: Mesh = setting(Instance(Mesh, traced=False, hint="give sled.models.sharding.mesh.Mesh(...)"), default=Mesh(),
                         help="the devices, where there are more than one")
    microbatches: int | None = setting(
        OrNone(Whole(1, hint="with more of them stages wait less, and each product is smaller"),
               f"the most, up to {PER_STAGE} a stage, that divide the rows"), default=None,
        help="parts in which a pipeline's stages work off the rows of each group of devices")
    save_every: int = setting(Whole(1, hint="it counts the steps between two checkpoints"), default=500,
                              help="steps between two checkpoints; held-out losses are measured as often")
    keep: int = setting(Whole(1, hint="it counts checkpoints"), default=3,
                        help="how many of the latest checkpoints stay")
    log_every: int = setting(Whole(1, hint="it counts the steps between two lines of metrics"), default=10,
                             help="steps between two lines of metrics.jsonl")
    held_out_rows: int = setting(Whole(1, hint="it counts rows"), default=256, help="rows to measure on, at most")
    tensorboard: bool = setting(Flag(hint="True needs tensorboardX"), default=False, help="also write for TensorBoard")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that the loop of `train` needs, except for the state that the steps change.

    part: rows that are worked off at a time. settings: all that decides what the run computes, as JSON has it.
    sizes: parameters of the model without exit heads, and of these. early_exits: how many of them learn at the steps
    from one to before another, on average.
    """

    run: TrainingRun
    folder: RunFolder
    model: InitialModel
    sharding: Sharding | None
    part: int
    rows: TrainingRows
    held_out: TrainingRows | None
    settings: dict[str, Any]
    batches: Batches
    graph: nnx.GraphDef
    sizes: tuple[int, int]
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    evaluation: Callable[..., LayerSums]
    early_exits: Callable[[int, int], float]

    @property
    def placed(self) -> Sharding:
        """The places of the parameters, on one device too."""
        return self.sharding or Sharding(self.model.config, self.run.mesh.build())

    @property
    def stages(self) -> int:
        """Of the pipeline; 1 where there is none."""
        return self.placed.mesh.shape[STAGE]

    @property
    def pipeline(self) -> str | None:
        """Its stages and microbatches in words, if there are any."""
        if self.stages == 1:
            return None
        stages, depth = self.stages, self.model.config.num_layers
        count = check_microbatches(self.run.microbatches, self.part // self.placed.ways(ROWS), stages)
        moved = (f" or on padding; the layers' weights move between stages at each step, which a divisor of {depth} "
                 "would spare") if depth % stages else ""
        return (f"{stages} stages of {' + '.join(map(str, layers_of_stages(stages, depth)))} layers, {count} "
                f"microbatches: {bubble(stages, count, depth):.1%} of the stages' time is idle{moved}")

    def on_devices(self, batch: TrainingBatch, rows: int) -> TrainingBatch:
        """The batch of `rows` rows, of which this process supplies its own."""
        return batch if self.sharding is None else self.sharding.batch(batch, rows)

    def dropout(self, step: int) -> LayerDropout | None:
        """The layer dropout of a step. What work it saves is static in long stretches, each of which may compile once;
        a pipeline's stages, which are compiled alike, save no single rows.
        """
        recipe = self.run.recipe
        if recipe.dropout is None or self.stages > 1:
            return recipe.dropout
        stretch = max(recipe.steps // 8, STRETCH)
        first = (step - 1) // stretch * stretch
        return recipe.dropout.saving(self.part, self.model.config.num_layers, first, first + stretch - 1)

    def evaluate(self, weights: nnx.State) -> dict[str, list[float]]:
        """Held-out loss and accuracy of the layers 1..L."""
        chosen = some_batches(self.held_out, self.run.held_out_rows, self.part, seed=self.run.recipe.seed,
                              **share_of(self.part, self.sharding))
        sums = [jax.device_get(self.evaluation(weights, self.on_devices(batch, self.part))) for batch in chosen]
        nll_L, correct_L, targets = (np.sum(parts, axis=0, dtype=np.float64) for parts in zip(*sums, strict=True))
        return {HELD_OUT: (nll_L / targets).tolist(), "held_out_accuracy": (correct_L / targets).tolist()}

    def checkpoints(self) -> Checkpoints:
        recipe = self.run.recipe
        may_change = {"recipe.steps": same_rates(_rates(recipe)), "recipe.remat": anything}
        if recipe.dropout is None:  # which draws for each part on its own
            may_change["recipe.accumulate"] = anything
        return Checkpoints(self.folder.checkpoints, self.settings, save_every=self.run.save_every, keep=self.run.keep,
                           may_change=may_change, follow=FOLLOW)


def train(run: TrainingRun, *, optimizer: optax.GradientTransformation | None = None) -> Path:
    """Trains to the end of the recipe, and returns the folder of the trained model.

    optimizer: of one's own, in place of the recipe's; it is not among the settings that a resumed run compares.

    Raises SettingError, DataError, CheckpointError, TrainingError where a loss is not finite, and whatever reading the
    model raises. SIGTERM or Ctrl-C ends the process in order, with exit code 75, after a checkpoint; a second Ctrl-C at
    once.
    """
    recipe, folder = run.recipe, RunFolder(run.folder)
    with folder.claimed():
        prepared, state = prepare(run, folder, optimizer or optimizer_of(recipe))
        with preemption() as reached, prepared.checkpoints() as checkpoints:
            begun, state = _resume(checkpoints, prepared, state)
            _announce(prepared)
            flops = flops_per_token(prepared.model.config, *prepared.sizes, prepared.model.context)
            throughput, logged_at = Throughput(flops if recipe.trainable == ALL else None), begun
            board = folder.tensorboard if run.tensorboard else None
            with (_saying_how_to_go_on(checkpoints),
                  Metrics(folder.metrics, resumed_from=begun or -1, tensorboard=board) as metrics,
                  progress_bar(recipe.steps, begun) as bar):

                def evaluate(weights: nnx.State) -> dict[str, list[float]]:
                    bar.set_postfix_str("measuring")
                    with throughput.paused():
                        return prepared.evaluate(weights)

                if not begun and prepared.held_out is not None:
                    metrics.write(0, evaluate(state.weights))
                for step in range(begun + 1, recipe.steps + 1):
                    batch = next(prepared.batches)
                    state, measured = prepared.train_step(state, prepared.on_devices(batch, recipe.batch_size),
                                                          prepared.dropout(step))
                    throughput.count(np.count_nonzero(batch.segments_BT)
                                     * (recipe.batch_size // len(batch.segments_BT)))
                    last = step == recipe.steps
                    save = last or step % run.save_every == 0
                    if save or step % run.log_every == 0:
                        line = _line(run, step, measured) | throughput.read(
                            lambda: prepared.early_exits(logged_at, step))  # noqa: B023
                        logged_at = step
                        if save and prepared.held_out is not None:
                            line |= evaluate(state.weights)
                        metrics.write(step, line)
                        bar.set_postfix_str(progress_line({name: line[name] for name in SHOWN if name in line}))
                    bar.update()
                    preempted = reached(step)
                    if preempted:
                        _check_finite(run, step, measured)
                    checkpoints.save(step, state, {"data": prepared.batches.get_state()}, force=preempted or last)
                    if preempted and not last:
                        checkpoints.wait()
                        leave(step, checkpoints.folder)
        if prepared.held_out is not None and jax.process_index() == 0:
            draw(folder.metrics, folder.picture)
        decoder = nnx.merge(prepared.graph, state.weights)
        del state  # the optimiser's part makes room
        saved = save_folder(decoder, folder.model, tokenizer_from=folder.model_config)
        if (taken := peak_memory()) is not None:
            _say(f"memory: {taken}")
        return saved


def prepare(run: TrainingRun, folder: RunFolder,
            optimizer: optax.GradientTransformation) -> tuple[Prepared, TrainState]:
    """Reads the model and the data, checks that they, the recipe and the devices fit each other, and makes the state
    before the first step.

    The model's configuration is put down when reading went well. All processes call this together.
    """
    recipe, part, steps = run.recipe, run.recipe.batch_size // run.recipe.accumulate, folder.steps
    check_same_everywhere({
        "--save-every": run.save_every, "--keep": run.keep, "--log-every": run.log_every,
        "--held-out-rows": run.held_out_rows, "the mesh": describe(run.mesh), "--microbatches": run.microbatches,
        "the list of checkpoints in --out": steps})
    refuse_no_model(folder.model)
    if steps:
        check_format(folder.checkpoints)
    mesh = run.mesh.build()
    with contextlib.nullcontext(folder.model_config) if steps else folder.new_model_config() as model_config:
        model = _initial_model(run, model_config, resumed=bool(steps), writes=folder.writes)
        sharding = Sharding(model.config, mesh) if mesh.size > 1 else None
        if sharding is not None:
            sharding.local_rows(part)  # raises where a part does not divide
            check_microbatches(run.microbatches, part // sharding.ways(ROWS), sharding.mesh.shape[STAGE])
        layout = Layout(model.context, shape=run.shape, too_long=run.too_long, prompt_weight=run.prompt_weight)
        rows, held_out = (source and read_rows(source, model.text, model.config, layout)
                          for source in (run.source, run.held_out))
    decisive = _decisive_settings(run, model, rows, held_out)
    check_same_everywhere(decisive)
    batches = Batches(rows, recipe.batch_size, seed=recipe.seed, **share_of(recipe.batch_size, sharding))
    decoder = model.decoder(recipe.seed, sharding)
    graph, weights = nnx.split(decoder)
    prepared = Prepared(run, folder, model, sharding, part, rows, held_out, decisive, batches, graph, _sizes(weights),
                        make_train_step(decoder, recipe, optimizer, sharding, microbatches=run.microbatches),
                        make_evaluation(decoder, recipe, sharding), exit_counter(recipe.exits, model.config.num_layers))
    return prepared, init_state(weights, optimizer, sharding, trainable=recipe.trainable)


def _initial_model(run: TrainingRun, folder: Path, **how: bool) -> InitialModel:
    model = prepare_initial_model(run.model, run.source, run.recipe.context, folder, heads=run.heads,
                                  long_context=run.long_context, **how)
    if run.recipe.trainable == HEADS and model.config.exit_heads is None:
        raise SettingError("the recipe tunes exit heads alone, but the model has none; give it some as heads "
                           "(--exit-heads 2 4), or take another recipe")
    static_exits(model.config, run.recipe)  # raises where they do not fit the model
    return model


def _decisive_settings(run: TrainingRun, model: InitialModel, rows: TrainingRows,
                       held_out: TrainingRows | None) -> dict[str, Any]:
    """All that decides what the run computes, as JSON has it."""

    def data(source: Source | None, rows: TrainingRows | None):
        return source and dict(name=source.name, digest=rows.digest, **source.how, context=model.context,
                               shape=run.shape, too_long=run.too_long)

    return dict(recipe=describe(run.recipe), config=describe(model.config), model=model.origin,
                data=data(run.source, rows), prompt_weight=run.prompt_weight, held_out=data(run.held_out, held_out))


def _rates(recipe: Recipe) -> Callable[[int], optax.Schedule]:
    return rate_schedule(recipe.schedule, recipe.learning_rate, recipe.warmup)


def optimizer_of(recipe: Recipe) -> optax.GradientTransformation:
    return make_optimizer(recipe.optimizer, _rates(recipe)(recipe.steps), clip=recipe.clip,
                          weight_decay=recipe.weight_decay, beta2=recipe.beta2)


def share_of(rows: int, sharding: Sharding | None) -> dict[str, int]:
    """The part of a batch of `rows` rows that is this process', and the number of parts."""
    if sharding is None:
        return dict(process_index=0, process_count=1)
    own = sharding.local_rows(rows)
    count = own.stop - own.start
    return dict(process_index=own.start // count, process_count=rows // count)


def _resume(checkpoints: Checkpoints, prepared: Prepared, state: TrainState) -> tuple[int, TrainState]:
    """The number of steps that were taken, and the state after them; the data goes on from there."""
    if not checkpoints.steps:
        return 0, state
    restored = checkpoints.restore(state)
    prepared.batches.set_state(restored.host["data"])
    _say(f"going on from the checkpoint of step {restored.step} in {checkpoints.folder}")
    return restored.step, restored.state


def _sizes(weights: nnx.State) -> tuple[int, int]:
    """Parameters of the model without exit heads, and of these."""
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    heads = size(weights["exit_heads"]) if "exit_heads" in weights else 0
    return size(weights) - heads, heads


def _announce(prepared: Prepared) -> None:
    recipe, config, model = prepared.run.recipe, prepared.model.config, prepared.run.model
    _say(f"{sum(prepared.sizes):,} parameters on {jax.device_count()} "
         f"{jax.devices()[0].device_kind}; data: {prepared.rows.report}")
    _say(dataclasses.replace(recipe, context=prepared.model.context).text())
    if prepared.pipeline:
        _say(f"a pipeline of {prepared.pipeline}")
    if recipe.trainable == ALL and recipe.exits != LastOnly():
        early = prepared.early_exits(0, recipe.steps)
        _say(f"early exits that learn at a step, on average: {early:.2f}" if early else
             "warning: no early exit learns with this recipe in this model")
    if isinstance(model, NewModel) and model.tokenizer is None and config.vocab_size < model.vocabulary:
        _say(f"warning: the tokenizer has {config.vocab_size} tokens, not {model.vocabulary}: the data gives no more")
    if recipe.steps <= recipe.warmup:
        _say(f"warning: the learning rate rises over {recipe.warmup} steps, but the run has {recipe.steps}; give a "
             "shorter warm-up")


def _line(run: TrainingRun, step: int, measured: StepMetrics) -> dict[str, Any]:
    """A step's line in the metrics file. Raises TrainingError where its numbers are not finite."""
    _check_finite(run, step, measured)
    loss, layers_E, nll_E, accuracy, norm = jax.device_get(measured)
    counts_E = np.isfinite(nll_E)  # an exit of weight 0 has none
    return dict(loss=loss, exits=layers_E[counts_E], exit_losses=nll_E[counts_E], accuracy=accuracy, gradient_norm=norm)


def _check_finite(run: TrainingRun, step: int, measured: StepMetrics) -> None:
    """Before a step is logged or saved. Weights that are not finite, of whichever step, give no finite loss."""
    loss, norm = float(measured.loss), float(measured.gradient_norm)
    if not np.isfinite([loss, norm]).all():
        raise TrainingError(f"step {step} has loss {loss:g} and a gradient of norm {norm:g}; look at the data, or "
                            f"train in another folder with a lower learning rate than {run.recipe.learning_rate:g}; "
                            f"what was saved before stays in {RunFolder(run.folder).checkpoints}")


@contextlib.contextmanager
def _saying_how_to_go_on(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = (f"the checkpoint of step {checkpoints.steps[-1]} in {checkpoints.folder} is kept" if checkpoints.steps
                else "no checkpoint had been saved")
        _say(f"stopped at once; {kept}; run the same command to go on")
        raise


def _say(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)
