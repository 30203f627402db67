"""Options that several subcommands share."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import sled
from sled.errors import PromptError, SettingError

FUSIONS = {"final": "FinalLayer", "sled": "SLED", "dola": "DoLa", "confident": "ConfidentDecoding",
           "average": "LayerAverage", "clamp": "ClampOnly"}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "demo"
    """"demo" (bundled), a Hugging Face folder, or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default the checkpoint's, and float32 on a CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def load(self) -> sled.LM:
        print_devices()
        return sled.load(self.model, dtype=self.dtype, revision=self.revision)


@dataclasses.dataclass(frozen=True)
class FusionOptions:
    """How the layers decide together. A setting left out keeps the method's own default."""

    fusion: Literal["final", "sled", "dola", "confident", "average", "clamp"] = "final"
    """final: the last layer alone; clamp: only its top tokens, the honest baseline of sled."""
    rate: float | None = None
    """sled: evolution rate, 0.5 to 3 for open text."""
    scale: int | None = None
    """sled, clamp: how many of the last layer's top tokens take part (5, 10, 20)."""
    steps: int | None = None
    """sled: evolution steps."""
    relative_top: float | None = None
    """dola: tokens below this fraction of the highest probability are left out."""
    lower_bound: float | None = None
    """sled, clamp, dola: the logit of tokens that are left out. Scores need a finite one (-1000; dola's is -inf)."""
    layers: tuple[int, ...] | None = None
    """Early layers to use (0 = embeddings), for the methods that take them."""
    norm_early: bool | None = None
    """Apply the final norm to early layers before projecting them."""

    def strategy(self):
        """The chosen strategy. Raises SettingError for a setting that it does not have."""
        kind = getattr(sled, FUSIONS[self.fusion])
        has = {field.name for field in dataclasses.fields(kind) if field.init}
        refuse_others(self, "fusion", has)
        return kind(**{name: value for name, value in given(self).items() if name in has})


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn; greedy unless a temperature is given."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the highest probability."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens already seen; 1.01 to 1.05 goes well with sled on open text."""
    seed: int = 0
    """Random seed; prompt i uses seed + i."""

    def sampling(self) -> sled.Sampling:
        return sled.Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
                             repetition_penalty=self.repetition_penalty)


def given(options) -> dict[str, Any]:
    """The options that were given: those that are not at their default."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if getattr(options, field.name) != field.default}


def refuse_others(options, choice: str, has: Collection[str]) -> None:
    """Raises SettingError for an option given that what --`choice` chose does not have (`has`)."""
    for name in given(options):
        if name != choice and name not in has:
            chosen = getattr(options, choice)
            where = f"without --{choice}" if chosen is None else f"for --{choice} {chosen}"
            raise SettingError(f"--{name.replace('_', '-')} has no meaning {where}; "
                               f"leave it out or choose another --{choice}")


def unescape(text: str) -> str:
    """A backslash and n, as one types it in a shell, is a line break."""
    return text.replace("\\n", "\n")


def read_prompts(prompts: tuple[str, ...], file: Path | None) -> list[str]:
    """Prompts from the command line, or one per line of a file ("-": standard input)."""
    if prompts and file:
        raise PromptError("prompts were given both as arguments and by --file; give one of the two")
    if file is None:
        if not prompts:
            raise PromptError("no prompt was given; write it behind the command, or name a file by --file")
        return [unescape(p) for p in prompts]
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as reason:
        raise PromptError(f"the prompts' file {file} cannot be read ({reason}); name a text file") from reason
    lines = [unescape(line) for line in text.splitlines() if line.strip()]
    if not lines:
        raise PromptError(f"{file} holds no prompts; write one per line")
    return lines


def print_devices() -> None:
    """Says on standard error what the work runs on, with a warning when that is only the CPU."""
    import jax

    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    print(f"running on {len(devices)} x {', '.join(kinds)} (jax backend: {jax.default_backend()})", file=sys.stderr)
    if jax.default_backend() == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        print("warning: no accelerator found, so this runs on the CPU; for a GPU or TPU install jax[cuda13] or "
              "jax[tpu] (JAX_PLATFORMS=cpu silences this)", file=sys.stderr)
