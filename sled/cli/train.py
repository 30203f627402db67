"""`sled train`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from sled.cli.derived import arguments, dashed, derive, given, given_for, left_out, offer, overrides, sets, settings_of
from sled.cli.devices import ProcessOptions, print_devices
from sled.cli.line import Sets
from sled.cli.options import LongContext, unescape
from sled.cli.values import Layer, NewPath
from sled.errors import SettingError
from sled.models.config import ExitHeads
from sled.models.sharding.mesh import Mesh
from sled.settings.rules import LARGEST
from sled.train.data.packing import Layout
from sled.train.initial_model import NewModel
from sled.train.objective.exit_weights import AllExits, FixedExits, UniformWeights, WeightedExits
from sled.train.objective.layer_dropout import FixedRows, LayerDropout, Masked, WholeBatch, layerskip
from sled.train.recipes import Recipe, named

FIXED = offer(FixedExits, "weights", "initial", "warmup", "course")  # EE-LLM's


@dataclasses.dataclass(frozen=True)
class DataOptions(derive("LayoutFields", *settings_of(offer(Layout, "shape", "too_long", "prompt_weight")))):
    """The data to train on. --text, --messages, --tokens, or --prompt with --completion (or --answers) names the
    columns."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-d"])] = ()
    """"demo" (endless word problems), files (.jsonl, .json, .csv, .parquet, .arrow, .txt), a folder, or a
    hub data set."""
    held_out: tuple[str, ...] = ()
    """The same for data that is only measured on: the loss of every layer. For demo: its held-out problems."""
    text: str | None = None
    """Column of plain text, or a template; every token is learnt."""
    prompt: str | None = None
    """Column of prompts, or a template such as "Question: {question}\\nAnswer:"; not learnt. A backslash and n stands
    for a line break."""
    completion: str | None = None
    """Column or template of what follows the prompt; learnt."""
    messages: str | None = None
    """Column of conversations, lists of messages with role and content, for the model's chat template. The assistant's
    answers are learnt, the token that ends each among them."""
    tokens: str | None = None
    """Column of token ids."""
    answers: Annotated[int | None, Sets(("max_new_tokens",)), left_out("the data's completions are learnt")] = None
    """Learn the model's own answers instead, of at most so many tokens each: --prompt alone, or --messages, names what
    is asked. They are generated once, and kept in the cache; killed, the same command goes on with them."""
    answer_sampling: Literal["greedy", "checkpoint"] = "greedy"
    """greedy: it answers by its likeliest tokens. checkpoint: as its generation_config.json says."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    limit: Annotated[int | None, left_out("all; of demo 20,000")] = None
    """Read at most this many examples."""

    def sources(self):
        """The data, and what is measured on or None. Raises SettingError."""
        from sled.train.data.sources import Source

        if not self.data:
            raise SettingError("--data is missing, so there is nothing to learn; name files, a hub data set, or demo")
        several = lambda names: names[0] if len(names) == 1 else list(names)  # noqa: E731
        typed = {name: text and unescape(text) for name, text in dict(prompt=self.prompt,
                                                                      completion=self.completion).items()}
        if self.answers is not None:
            if beside := next((name for name in ("text", "completion", "tokens") if getattr(self, name)), None):
                raise SettingError(f"--{beside} was given beside --answers, but what is learnt are the model's own "
                                   "answers; name what is asked, by --prompt or --messages alone")
            if not (self.prompt or self.messages or self.data == ("demo",)):
                raise SettingError("--answers was given, but nothing names what is asked; give --prompt, a column or a "
                                   "template, or --messages")
            typed = dict(text=typed["prompt"], prompt=None)  # the whole text is asked
        elif self.answer_sampling != "greedy":
            raise SettingError("--answer-sampling was given without --answers; say of how many tokens answers may be, "
                               "such as --answers 128")
        source = Source(**arguments(self, Source) | typed | dict(data=several(self.data)))
        if not self.held_out:
            return source, None
        others = dict(split="heldout", limit=500) if self.held_out == ("demo",) else dict(limit=None)
        return source, Source(**arguments(self, Source) | typed | dict(data=several(self.held_out), **others))


@dataclasses.dataclass(frozen=True)
class NewModelOptions(derive("NewModelFields", *overrides(
        NewModel, "layers", "width", "heads", "kv_heads", "mlp_width", "positions", "vocabulary"))):
    """A model that begins at random, for --model new: Llama-shaped."""

    tokenizer: Annotated[Path | None, left_out("one made from the data")] = None
    """Take this folder's tokenizer."""
    end_of_text: Annotated[str | None, left_out("<|endoftext|>")] = None
    """Its token that ends a text."""


_RECIPE = tyro.conf.arg(aliases=["-r"], metavar="RECIPE", help="""plain: no early exit learns.
finetune, continue, pretrain: LayerSkip's early-exit loss and layer dropout.
layerskip-*: the paper's settings of one model; dont-drop-dropout: the later recipe.
tune-exits: the heads of --exit-heads alone, on a frozen model, whose last layer teaches them.
demo: of the bundled model; demo-plain: of its twin without early exits.""")


@dataclasses.dataclass(frozen=True)
class RecipeOptions(derive("RecipeFields", ("recipe", Annotated[str, _RECIPE], "finetune"), *overrides(
        Recipe, "steps", "batch_size", "context", "accumulate", "learning_rate", "optimizer", "schedule", "warmup",
        "weight_decay", "clip", "z_loss", "distill", "temperature", "compute_dtype", "remat", "seed",
        default="the recipe's", batch_size="-b"), *overrides(FixedExits, *FIXED.options.values()))):
    """A recipe by name, and changes to it."""

    exit_layers: Annotated[tuple[Layer, ...], Sets(("AllExits.layers", "FixedExits.layers"))] = ()
    """Early exits that learn at every step, in place of the recipe's, which take turns. They count as --exit-weights
    says, or as the recipe weighs them, with a recipe that has none as much as the last layer."""
    layer_dropout: Annotated[float | None, sets(LayerDropout, "rate"), left_out("the recipe's")] = None
    """Largest probability of dropping a layer; LayerSkip's dropout where the recipe has none. 0 drops none."""
    drop: Annotated[Literal["masked", "fixed", "batch"] | None, left_out("the recipe's")] = None
    """masked: each sequence on its own; saves no work. fixed: as many sequences of a batch as the probability says,
    left out of the computation. batch: a layer for the whole batch at once."""

    def made(self):
        """The recipe. Raises SettingError."""
        recipe = named(self.recipe, **given_for(self, offer(Recipe)))
        return dataclasses.replace(recipe, exits=self._exits(recipe.exits), dropout=self._dropout(recipe.dropout))

    def _exits(self, plan):
        weighed = given_for(self, FIXED)
        if "weights" in weighed:
            return FixedExits(self.exit_layers, **weighed)
        if weighed:
            option = next(name for name, field in FIXED.options.items() if field in weighed)
            raise SettingError(f"{dashed(option)} was given without --exit-weights, on the way to which it is; give "
                               "these too, one for each of --exit-layers")
        if not self.exit_layers:
            return plan
        profile = getattr(plan, "profile", UniformWeights())
        settled = AllExits(self.exit_layers)
        if idle := [n for n in settled.layers if n > 0 and profile.weigh(n, n + 1) == 0]:
            raise SettingError(f"--exit-layers names layer {idle[0]}, which learns nothing with --recipe "
                               f"{self.recipe}: its {type(profile).__name__} weigh it 0; leave it out, or take plain, "
                               "where all exits count alike")
        return WeightedExits(profile, settled)

    def _dropout(self, dropout):
        if self.layer_dropout == 0:
            dropout = None
        elif self.layer_dropout is not None:
            dropout = (layerskip(self.layer_dropout) if dropout is None else
                       dataclasses.replace(dropout, rate=self.layer_dropout))
        if self.drop is None:
            return dropout
        if dropout is None:
            raise SettingError(f"--drop {self.drop} was given, but no layer is dropped; give --layer-dropout too, such "
                               "as 0.1")
        strategy = {"masked": Masked, "fixed": FixedRows, "batch": WholeBatch}[self.drop]
        return dataclasses.replace(dropout, strategy=strategy())


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """Heads of their own for early exits, which read their hidden states better than the last layer's alone."""

    exit_heads: Annotated[tuple[Layer, ...], sets(ExitHeads, "layers")] = ()
    """After which layers: new heads, that begin by changing nothing. With --recipe tune-exits they alone learn; with
    another give --exit-layers too, with the same layers. A model that has heads keeps them without this."""
    head_kind: Annotated[Literal["norm", "affine", "mlp", "block", "projection"], sets(ExitHeads, "kind")] = "norm"
    """norm: a final norm of their own. affine: a linear map before it (tuned lens). mlp: a small network before it.
    block: a whole layer before it, with attention. projection: nothing but a projection of their own."""
    untied_heads: bool = False
    """Each ends in a projection of its own, a whole vocabulary wide."""

    def heads(self):
        """The new heads, or None. Raises SettingError."""
        if not self.exit_heads:
            if wanted := given(self):
                raise SettingError(f"{dashed(next(iter(wanted)))} was given without --exit-heads; say after which "
                                   "layers, such as --exit-heads 2 4")
            return None
        return ExitHeads(self.exit_heads, self.head_kind, tied=not self.untied_heads)


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """The use of several devices; -1 is what is left of them."""

    data_parallel: Annotated[int, sets(Mesh, "data")] = 1
    """Groups of devices that hold all weights each."""
    fsdp: int = -1
    """Devices over which weights and optimiser are spread."""
    pipeline_parallel: Annotated[int, sets(Mesh, "stage")] = 1
    """Stages of a pipeline, each of which holds a part of the layers."""
    tensor_parallel: Annotated[int, sets(Mesh, "tensor")] = 1
    """Devices that share each layer's products."""
    microbatches: Annotated[int | None, left_out("the most, up to 4 a stage, that divide the rows")] = None
    """Parts in which a pipeline's stages work off the rows of each group of devices."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model so that its early layers speak too.

    sled train --model demo --data mine.jsonl --prompt question --completion answer --out run

    sled train --recipe layerskip-llama3.2-1b -m meta-llama/Llama-3.2-1B --data text/ --fsdp 8 --out run

    sled train --recipe tune-exits --exit-heads 2 4 --head-kind block --data mine.jsonl --prompt question --answers 128
    --out run

    sled train --recipe demo --model new --layers 20 --data demo --held-out demo --out run

    Ends with a Hugging Face folder, RUN/model, for sled.load, transformers and every other subcommand. Interrupted or
    killed at any moment, the same command goes on from the last checkpoint, as if nothing had happened.
    """

    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"])]
    """Folder of the run: checkpoints, metrics.jsonl, layers.png, and in the end model/."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """The model to start from: "demo" (bundled), a Hugging Face folder, a hub id, or "new"."""
    long_context: LongContext = False
    data_options: DataOptions = dataclasses.field(default_factory=DataOptions)
    recipe_options: RecipeOptions = dataclasses.field(default_factory=RecipeOptions)
    new_model_options: NewModelOptions = dataclasses.field(default_factory=NewModelOptions)
    head_options: HeadOptions = dataclasses.field(default_factory=HeadOptions)
    mesh_options: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    process_options: ProcessOptions = dataclasses.field(default_factory=ProcessOptions)
    save_every: int = 500
    """Steps between two checkpoints; held-out losses are measured as often."""
    keep: int = 3
    """Number of the latest checkpoints that stay."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    held_out_rows: int = 256
    """Rows to measure on, at most."""
    tensorboard: bool = False
    """Also write for TensorBoard (needs the extra `tensorboard`)."""
    dry_run: bool = False
    """Only read the model and the data and take one step, say what the run would be (recipe, examples, time, memory),
    and stop; --out is left alone."""

    def run(self) -> None:
        self.process_options.join(saves_when_told=True)
        mesh = self.mesh_options
        from sled.train.rehearsal import rehearse
        from sled.train.trainer import TrainingRun, train

        print_devices()
        source, held_out = self._answered(*self.data_options.sources())
        run = TrainingRun(**arguments(self, TrainingRun) | arguments(self.data_options, TrainingRun) | dict(
            folder=self.out, model=self._model(), source=source, held_out=held_out, recipe=self.recipe_options.made(),
            heads=self.head_options.heads(), microbatches=mesh.microbatches,
            mesh=Mesh(mesh.data_parallel, mesh.fsdp, mesh.tensor_parallel, mesh.pipeline_parallel)))
        if self.dry_run:
            told, where = rehearse(run).text(), sys.stdout
        else:
            told, where = f"the trained model is in {train(run)}", sys.stderr
        if jax.process_index() == 0:
            print(told, file=where)

    def _answered(self, source, held_out):
        """The sources, with the model's own answers where these are to be learnt."""
        options = self.data_options
        if options.answers is None:
            return source, held_out
        if self.model == "new":
            raise SettingError("--answers was given, but --model new has none yet; give a model that is trained")
        import sled
        from sled.train.data.answers import own_answers

        lm = sled.load(self.model, long_context=self.long_context)
        sampling = {} if options.answer_sampling == "greedy" else dict(sampling=options.answer_sampling)
        some = held_out and dataclasses.replace(held_out, limit=min(held_out.limit or LARGEST, self.held_out_rows))
        return tuple(of and own_answers(lm, of, max_new_tokens=options.answers, **sampling) for of in (source, some))

    def _model(self) -> Any:
        wanted = given(self.new_model_options)
        if self.model == "new":
            return NewModel(**wanted)
        if wanted:
            raise SettingError(f"{dashed(next(iter(wanted)))} describes a new model, but --model is {self.model}; "
                               "leave it out, or give --model new")
        return self.model
