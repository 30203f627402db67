"""`sled bench`: measurements, side by side in one run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

from sled.cli.derived import arguments, left_out
from sled.cli.devices import print_devices
from sled.cli.question_options import QuestionOptions
from sled.cli.values import NewPath
from sled.demo import MAX_NEW_TOKENS
from sled.io import replace_text, writable
from sled.models.config import WEIGHT_TYPES


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One of the measurements of `sled bench`."""

    json: NewPath | None = None
    """Also write the report to this file."""

    def run(self) -> None:
        """Class X is measured by `run_x_bench` of `sled.bench.x`, which takes the options by their names."""
        if self.json:
            writable("--json", self.json)
        print_devices()
        name = type(self).__name__.lower()
        measure = getattr(importlib.import_module(f"sled.bench.{name}"), f"run_{name}_bench")
        report = measure(**self.settings(measure))
        print(report.markdown())
        if self.json:
            replace_text("--json", self.json, report.json() + "\n")

    def settings(self, measure: Callable) -> dict[str, Any]:
        """What the measurement is given, by name."""
        return arguments(self, measure)


@dataclasses.dataclass(frozen=True)
class Fusion(Measurement):
    """The fused SLED step against the released algorithm in torch, and against the projections it cannot avoid.

    Needs the `parity` extra for the torch side; without it the rest is measured. About three minutes.
    """


@dataclasses.dataclass(frozen=True)
class Decode(Measurement):
    """Decoding, against transformers' generate on the same weights.

    sled bench decode --model HuggingFaceTB/SmolLM2-135M-Instruct

    Greedy, greedy in caches of 1,024 positions, and SLED, batch 1 and 8, float32; time to first token and compile
    time. Beside them the least that a step takes: its matrix products alone, and one reading of the weights. Needs the
    `parity` extra for the transformers side; without it the rest is measured. A few minutes.
    """

    model: Annotated[str | None, left_out("random weights of 134M parameters", "-m", metavar="MODEL")] = None
    """"demo" (bundled), a Hugging Face folder, or a hub id; in float32."""
    new_tokens: int = 64
    """Tokens per row and run."""
    rounds: int = 4
    """Interleaved rounds; ratios are taken between the fastest."""
    profile: Annotated[NewPath | None, left_out("none")] = None
    """Also write a trace of one run each into this folder, for TensorBoard's profiler or Perfetto."""


@dataclasses.dataclass(frozen=True)
class Exits(Measurement):
    """Early exit and self-speculation on held-out word problems, against plain decoding.

    sled bench exits --problems 8 --rounds 3

    Exits after the two layers that promise most by sled layers. A model that was not trained for exits gains nothing.
    Batch 1: self-speculation, with and without SLED, and transformers' assisted_early_exit on the same weights
    (needs the `parity` extra). Batch 8: early exit by threshold, schedule and K/V. About five minutes.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """"demo" (bundled), a Hugging Face folder, or a hub id; in float32."""
    problems: int = 24
    """Problems solved at batch 8; a third of them at batch 1."""
    rounds: int = 7
    """Interleaved rounds; ratios are taken between the fastest."""
    picture: NewPath | None = None
    """Also draw speed, depth and agreement over the thresholds into this file (.png, .svg or .pdf)."""


@dataclasses.dataclass(frozen=True)
class Engine(Measurement):
    """Continuous batching on the bundled model's held-out problems, against batches that wait for their slowest row.

    Without early exit and with self-speculation. About a minute.
    """

    requests: int = 64
    """Problems, all waiting from the start."""
    slots: int = 8
    """Requests served at a time."""
    rounds: int = 5
    """Interleaved rounds; ratios are taken between the fastest."""


@dataclasses.dataclass(frozen=True)
class Loss(Measurement):
    """The training loss of twelve exits with its gradient, against its plain form: time and memory.

    Holds seven gigabytes for the plain form. About four minutes.
    """

    rounds: int = 2
    """Interleaved rounds; ratios are taken between the fastest."""


@dataclasses.dataclass(frozen=True)
class Layers(Measurement):
    """The predictions of each layer on held-out word problems, of one or several models side by side.

    sled bench layers --model demo twin/model --picture layers.png

    A table of loss, accuracy, agreement with the last layer and problems solved by each layer. No timing.
    """

    model: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-m"], metavar="MODEL [MODEL ...]")] = ("demo",)
    """Up to four of "demo" (bundled), Hugging Face folders and hub ids."""
    problems: int = 200
    """Held-out problems."""
    picture: NewPath | None = None
    """Also draw the layers into this file (.png, .svg or .pdf)."""


@dataclasses.dataclass(frozen=True)
class Claims(Measurement):
    """What popular accounts of early exit claim, measured: each with its figures, intervals and a verdict.

    sled bench claims --json claims.json

    sled bench claims -m HuggingFaceTB/SmolLM2-135M-Instruct --data mine.jsonl --answer answer
    --prompt "Question: {question}\\nAnswer:" --num-fewshot 4 --problems 84 -n 64

    Speed and quality at thresholds, self-speculation and its memory, SLED's answers and speed, rows of a batch that
    leave at layers of their own, what a moved threshold does to a served model, and what time tells of a text. Exits,
    drafts and one threshold are chosen on questions that are not asked otherwise. Verdicts follow from figures and
    intervals by a rule that the report states. About four minutes for the bundled model, on two cores.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """"demo" (bundled), a Hugging Face folder, or a hub id; in float32."""
    question_options: QuestionOptions = dataclasses.field(default_factory=QuestionOptions)
    problems: int = 192
    """Questions to ask; before them come those that choose settings, two for three, at most 128. All asked are
    timed one by one in two ways, the first 24 in all; the first 64 in batches of 8."""
    new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = MAX_NEW_TOKENS
    """The most tokens of an answer."""
    rounds: int = 3
    """Interleaved rounds; of every text and way the fastest counts."""

    def settings(self, measure: Callable) -> dict[str, Any]:
        from sled.bench.claims import with_aside

        questions = self.question_options.read(self.model, with_aside(self.problems), 0)
        return {**super().settings(measure), "questions": questions}


@dataclasses.dataclass(frozen=True)
class Exactness(Measurement):
    """The share of texts that batches, streams, the engine, early exit at threshold 1 and self-speculation leave equal.

    sled bench exactness --model HuggingFaceTB/SmolLM2-135M-Instruct --dtype bfloat16

    In float32 they all give plain decoding's tokens; in a narrower type rounding decides near ties. A table of shares,
    and of the gap between the two logits at the first difference of each text. A few minutes; no timing.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """"demo" (bundled), a Hugging Face folder, or a hub id; with a tokenizer."""
    dtype: Literal[WEIGHT_TYPES] = "bfloat16"
    """Type of the weights."""
    texts: int = 16
    """Held-out word problems."""
    new_tokens: int = 64
    """Tokens per text at most."""
    batch_size: int = 4
    """Texts decoded together."""
    exit_layer: Annotated[int | None, left_out("a quarter of the layers", metavar="LAYER")] = None
    """After which layer drafts are made."""
    draft: int = 6
    """Tokens drafted before they are verified."""
    picture: NewPath | None = None
    """Also draw the gaps into this file (.png, .svg or .pdf)."""


@dataclasses.dataclass(frozen=True)
class Stages(Measurement):
    """The steps that texts take over the stages of a pipeline, one batch after another and following each other.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu sled bench stages

    Every device is a stage, and tokens may leave wherever one ends. Steps are counted and texts compared with one
    device's; no timing. A minute or two.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """"demo" (bundled), a Hugging Face folder, or a hub id; in float32, with a tokenizer."""
    batch_size: int = 12
    """Held-out word problems of a batch; there are as many batches as stages."""
    new_tokens: int = MAX_NEW_TOKENS
    """The most tokens of a text."""
