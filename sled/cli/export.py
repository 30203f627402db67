"""`sled export`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import sled
from sled.cli.derived import arguments, dashed, given, left_out, refuse_others
from sled.cli.exit_options import ExitOptions
from sled.cli.line import Sets
from sled.cli.options import FusionOptions, LongContext
from sled.cli.values import NewPath
from sled.errors import SettingError
from sled.models.config import WEIGHT_TYPES

OF_HF = {"heads", "license", "base", "margin", "calibration", "survey", "push", "private"}


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model in a form that runs elsewhere.

    sled export run --out model

    sled export run --out model --license apache-2.0 --calibration calibration.json

    sled export run --out model --push me/model --private

    sled export meta-llama/Llama-3.2-1B --out llama --form orbax

    sled export demo --out program --form program --fusion sled --exits speculate --exit-layers 2

    Forms: hf is a Hugging Face folder with a model card, for sled and transformers (assistant_early_exit included,
    but for GPT-2 and gpt-oss).
    orbax is an Orbax checkpoint with configuration and tokenizer, which sled.load reads too. program is the whole
    generation as a compiled function for CPU, GPU and TPU, its weights beside it, and run.py, which runs it without
    sled. The folder appears when all of it is written, in place of an earlier export, if there was one.
    """

    source: tyro.conf.Positional[str]
    """A run of sled train, its --out (unfinished or still going, if need be), a Hugging Face folder, a hub id,
    "demo", or an Orbax export."""
    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"]), Sets(("to",))]
    """Folder to write: a new one, or an earlier export."""
    form: Literal["hf", "orbax", "program"] = "hf"
    """The form to write: hf, a Hugging Face folder; orbax, a checkpoint; program, a compiled function."""
    step: Annotated[int | None, left_out("the latest")] = None
    """Of a run: which checkpoint."""
    revision: Annotated[str | None, left_out("the newest")] = None
    """Of a hub id: branch, tag or commit."""
    dtype: Annotated[Literal[WEIGHT_TYPES] | None,
                     left_out("the stored one; of a run float32")] = None
    """Type of the written weights."""
    long_context: LongContext = False
    heads: Literal["drop", "beside"] | None = None
    """hf: what becomes of exit heads, which transformers does not have. drop: they are left behind.
    beside: in files that only sled reads. Without it a model with exit heads is refused."""
    license: Annotated[str | None, left_out("unknown")] = None
    """hf: license for the model card, such as apache-2.0."""
    base: str | None = None
    """hf: hub id of the model that this one was trained from, for the card."""
    margin: float = 0.02
    """hf: a layer is a recommended exit where its held-out accuracy is at most this far below the last's.
    Of no matter where --survey is given."""
    calibration: Path | None = None
    """hf: a record that sled calibrate wrote for this model; it is shown in the card and comes along."""
    survey: Path | None = None
    """hf: what sled layers --json wrote for this model: the card shows it, and recommends what it recommends."""
    push: Annotated[str | None, left_out("none", metavar="OWNER/NAME")] = None
    """hf: upload the folder to this repository of the hub, which is made where there is none."""
    private: bool = False
    """--push: only its owner sees a new repository."""
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    exit_options: ExitOptions = dataclasses.field(default_factory=ExitOptions)

    def run(self) -> None:
        if self.form != "hf":
            refuse_others(self, "form", {field.name for field in dataclasses.fields(self)} - OF_HF)
        decoding = {**given(self.fusion_options), **given(self.exit_options)}
        if self.long_context:
            decoding["long_context"] = True
        if self.form != "program" and decoding:
            raise SettingError(f"{dashed(next(iter(decoding)))} has no meaning for --form {self.form}, which holds a "
                               "model and not how to decode with it; leave it out, or choose --form program")
        if self.private and self.push is None:
            raise SettingError("--private has no meaning without --push; leave it out, or name a repository by --push")
        from sled.export import forms
        from sled.export.card import Card

        reading = dict(step=self.step, revision=self.revision, dtype=self.dtype)
        if self.form == "hf":
            options = arguments(self, forms.export_hf) | dict(to=self.out, private=self.private or None)
            pushed = forms.export_hf(**options, card=Card(**arguments(self, Card)), **reading)
            if pushed:
                print(f"pushed: {pushed}", file=sys.stderr)
        elif self.form == "orbax":
            forms.export_orbax(self.source, self.out, **reading)
        else:
            decoding = sled.Decoding(self.fusion_options.strategy(), **self.exit_options.settings())
            forms.export_program(self.source, self.out, decoding, long_context=self.long_context, **reading)
        print(f"the {self.form} export is in {self.out}", file=sys.stderr)
