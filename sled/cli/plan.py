"""`sled plan`."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from sled.cli.derived import dashed, given, left_out, sets
from sled.cli.devices import mesh_of
from sled.decoding.plan import decoding_plan
from sled.errors import SettingError
from sled.io import size_in_words
from sled.models.config import WEIGHT_TYPES, DecoderConfig
from sled.models.families.registry import read_config
from sled.models.hub import folder_of
from sled.models.sharding.mesh import REST, Mesh, spelled
from sled.models.sharding.sharding import RULES, Sharding
from sled.models.stored import parameter_shapes
from sled.settings.rules import Whole
from sled.train.parallel.memory_plan import memory_plan
from sled.train.recipes import named

USUAL_CONTEXT = 8192


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a model takes of each device, decoding or in training, before there is any device.

    sled plan -m meta-llama/Llama-3.1-8B --devices 8 --tensor-parallel 8 --batch-size 8 --context 8192

    sled plan -m meta-llama/Llama-3.1-70B --devices 64 --tensor-parallel 8 --fsdp 8 --train

    From config.json alone, of which a hub id's is fetched, and no weights. Decoding: weights, keys and values of whole
    contexts (over stages of as many batches), and what a block of a prompt takes while it runs. Training: weights in
    float32, gradients, the optimiser's state, and the share of every parameter; activations come besides, and sled
    train --dry-run measures them.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """"demo" (bundled), a folder with config.json, or a hub id."""
    revision: Annotated[str | None, left_out("the newest")] = None
    """Branch, tag or commit of a hub id."""
    devices: int = 1
    """How many devices there are to be, of all processes."""
    tensor_parallel: Annotated[int, sets(Mesh, "tensor")] = 1
    """Devices that share weights, keys and values, and each layer's products."""
    data_parallel: Annotated[int | None, sets(Mesh, "data"), left_out("what is left; with --train or stages: 1")] = None
    """Groups of devices that hold all weights each."""
    pipeline_parallel: Annotated[int, sets(Mesh, "stage")] = 1
    """Stages of a pipeline, with some of the layers each."""
    batch_size: int = 8
    """Rows of a batch, over all devices; over stages as many batches as stages are in memory."""
    context: Annotated[int | None, left_out(f"the model's, at most {USUAL_CONTEXT}")] = None
    """Positions of a row, prompt and text."""
    dtype: Literal[WEIGHT_TYPES] = "bfloat16"
    """Type of the weights, keys and values, decoding."""
    train: bool = False
    """Plan training instead."""
    fsdp: Annotated[int | None, sets(Mesh, "fsdp"), left_out("what is left")] = None
    """--train: devices over which weights and optimiser are spread."""
    recipe: str = "finetune"
    """--train: the recipe, for its optimiser and what learns."""

    def run(self) -> None:
        devices = Whole(1, hint="it counts devices")("--devices", self.devices)
        rows = Whole(1, hint="it counts rows")("--batch-size", self.batch_size)
        idle = ("batch_size", "context", "dtype") if self.train else ("fsdp", "recipe")
        if wrong := [name for name in given(self) if name in idle]:
            raise SettingError(f"{dashed(wrong[0])} is {getattr(self, wrong[0])}, but has no meaning " + (
                "with --train, which plans weights, gradients and optimiser; leave it out" if self.train else
                "without --train, as decoding is planned over data, stages and tensor; leave it out, or give --train"))
        config = read_config(folder_of(self.model, self.revision, weights=False))
        count = sum(map(math.prod, parameter_shapes(config).values()))
        print(f"{self.model}: {config.family}, {count:,} parameters, {config.num_layers} layers, {config.width} wide, "
              f"{config.num_heads} heads, {config.num_kv_heads} of K/V, {config.vocab_size:,} tokens")
        print(self._training(config, devices) if self.train else self._decoding(config, devices, rows))

    def _training(self, config: DecoderConfig, devices: int) -> str:
        from sled.train.trainer import optimizer_of

        mesh = Mesh(1 if self.data_parallel is None else self.data_parallel, REST if self.fsdp is None else self.fsdp,
                    self.tensor_parallel, self.pipeline_parallel)
        recipe = named(self.recipe)
        return memory_plan(Sharding(config, mesh.abstract(devices)), optimizer_of(recipe),
                           trainable=recipe.trainable).text()

    def _decoding(self, config: DecoderConfig, devices: int, rows: int) -> str:
        context = Whole(1, config.context, hint="it counts positions, within the model's context")(
            "--context", min(config.context, USUAL_CONTEXT) if self.context is None else self.context)
        mesh = mesh_of(data=self.data_parallel, tensor=self.tensor_parallel, stage=self.pipeline_parallel)
        ways = mesh.abstract(devices)
        plan = decoding_plan(config, ways, rows=rows, context=context, dtype=self.dtype)
        several = f", {plan.batches} such batches following each other" if plan.batches > 1 else ""
        copied = [f"  copied at a step {size_in_words(plan.copied)}, a batch's keys and values"] * (plan.batches > 1)
        where = f"each of {devices} devices ({spelled(ways.shape)})" if devices > 1 else "one device"
        idle = f" ({plan.rows - rows} of them idle, so that all groups have as many)" if plan.rows > rows else ""
        written = "1 row" if plan.rows == 1 else f"{plan.rows} rows"
        lines = [
            f"On {where}, {written} of {context:,} positions{idle}, {self.dtype}{several}:",
            f"  weights          {size_in_words(plan.weights)}",
            f"  keys and values  {size_in_words(plan.kv)}",
            *copied,
            f"  a prompt's block {size_in_words(plan.prompt)} while it runs",
            f"  logits           {size_in_words(plan.logits)} of each layer that a fusion reads at once",
            f"  at most          {size_in_words(plan.total)}, and programs and what the compiler keeps besides"]
        return "\n".join([*lines, *(f"Left whole over {' x '.join(RULES[axis])}: {reason}."
                                    for axis, reason in plan.undivided.items())])
