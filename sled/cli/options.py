"""Options that several subcommands share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

import sled
from sled.cli.derived import (
    build,
    choice,
    dashed,
    derive,
    explained,
    given,
    given_for,
    left_out,
    offer,
    offers,
    overrides,
    refuse_others,
    sets,
    settings_by_choice,
)
from sled.cli.devices import first_process, mesh_of, print_devices
from sled.cli.line import Sets
from sled.decoding.options import GREEDY
from sled.errors import DataError, PromptError, SettingError, SledError
from sled.fusion import FUSIONS
from sled.models.config import WEIGHT_TYPES
from sled.models.hub import local_folder
from sled.models.sharding.mesh import Mesh, spelled
from sled.settings.rules import Whole
from sled.text.prompts import Prompt

OFFERS = offers(FUSIONS)
SAMPLING = offer(sled.Sampling)
FEW_PROMPTS, FEW_TOKENS = 8, 64  # on which layers are chosen


# Strings that end a text: one each time, so that a prompt may follow.
Stop = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(
    help="A string that ends a text; for several, give the option again. A backslash and n stands for a line break.",
    help_behavior_hint="(default: none)")]


LongContext = Annotated[bool, tyro.conf.arg(
    help="Load a model that has two ways to compute positions (longrope, as Phi-3-mini-128k) for long texts.")]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "demo"
    """"demo" (bundled), a Hugging Face folder, or a hub id."""
    dtype: Annotated[Literal[WEIGHT_TYPES] | None,
                     left_out("the checkpoint's; on a CPU float32")] = None
    """Type of the weights."""
    revision: Annotated[str | None, left_out("the newest")] = None
    """Branch, tag or commit of a hub id."""
    long_context: LongContext = False
    tensor_parallel: Annotated[int | None, sets(Mesh, "tensor"), left_out("1")] = None
    """Devices that share one copy of the model: weights, keys and values. It must divide the heads."""
    data_parallel: Annotated[int | None, sets(Mesh, "data"), left_out("as many as --tensor-parallel leaves; 1")] = None
    """Copies of the model, each of which decodes rows of its own."""

    @property
    def _stages(self) -> int | None:
        return None

    def load(self, *, advise: bool = True) -> sled.LM:
        """advise: says how to use several devices, where one is used."""
        local_folder(self.model)  # for its error, before the devices are looked for
        print_devices()
        mesh = mesh_of(data=self.data_parallel, tensor=self.tensor_parallel, stage=self._stages)
        if advise and mesh is None and (devices := jax.device_count()) > 1:
            print(f"one of these is used; --data-parallel {devices} uses all", file=sys.stderr)
        lm = sled.load(self.model, dtype=self.dtype, revision=self.revision, long_context=self.long_context, mesh=mesh)
        if mesh is not None and lm.mesh.size > 1 and first_process():
            print(f"split over {spelled(lm.mesh.shape)}", file=sys.stderr)
        return lm


@dataclasses.dataclass(frozen=True)
class TextModelOptions(ModelOptions):
    """Which model, to generate texts."""

    pipeline_parallel: Annotated[int | None, sets(Mesh, "stage"), left_out("1")] = None
    """Stages of a pipeline, with some of the layers each; there is no self-speculation then, and --data-parallel is 1.
    """

    @property
    def _stages(self) -> int | None:
        return self.pipeline_parallel


@dataclasses.dataclass(frozen=True)
class FusionOptions(derive(
        "Fusion", choice("fusion", FUSIONS, default="final",
                         help=f"{explained(FUSIONS)}\nFor scores, dola needs a finite --lower-bound, such as -1000."),
        *settings_by_choice(OFFERS))):
    """The fusion of the layers' predictions. A setting left out keeps the method's own default."""

    def strategy(self):
        """The chosen strategy. Raises SettingError for a setting that it does not have."""
        chosen = OFFERS[self.fusion]
        refuse_others(self, "fusion", chosen.options)
        return build(self, chosen)


@dataclasses.dataclass(frozen=True)
class SamplingOptions(derive("Draw", *overrides(sled.Sampling, *SAMPLING.options.values()))):
    """The draw of the next token; greedy unless a temperature is given."""

    sampling: Annotated[Literal["checkpoint"] | None, left_out("as the options here say")] = None
    """checkpoint: as the model's generation_config.json has it; the options here take the place of its numbers."""
    seed: int = 0
    """Random seed; prompt i uses seed + i."""

    def check(self) -> None:
        """Raises SettingError for a number out of its range, before a model is loaded."""
        build(self, SAMPLING)

    def chosen(self, lm: sled.LM) -> sled.Sampling:
        """The sampling for this model. Raises SettingError where its own cannot be had."""
        if self.sampling is None:
            # The very default where nothing was given: so the model may tell that it has a sampling of its own.
            return build(self, SAMPLING) if given_for(self, SAMPLING) else GREEDY
        sampling = dataclasses.replace(lm.checkpoint_sampling, **given_for(self, SAMPLING))
        print(f"sampling as {lm.name} has it: {sampling}", file=sys.stderr)
        return sampling


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Prompts as what a user says in a chat, for models that were tuned for chats."""

    chat: bool = False
    """Put each prompt, as a user's message, into the model's chat template; the text is the assistant's answer."""
    system: str | None = None
    """--chat: a system message before it."""
    chat_variables: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], left_out("none", metavar="NAME=VALUE")] = ()
    """--chat: a further variable of the template, such as enable_thinking=false; for several, give the option again."""

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Prompts for texts. Raises SettingError for options that need --chat, and values that are none."""
        if not self.chat:
            if idle := given(self):
                raise SettingError(f"{dashed(next(iter(idle)))} has no meaning without --chat; leave it out, or give "
                                   "--chat too")
            return list(texts)
        variables = dict(named_value("--chat-variables", each) for each in self.chat_variables)
        return [sled.Chat(text, self.system and unescape(self.system), variables) for text in texts]

    def hint(self, lm: sled.LM) -> None:
        """Says on standard error that a model has a chat template, as most made for chats do, where it is prompted
        without."""
        with contextlib.suppress(SledError):  # a broken template is no matter to those who do not use it
            if not self.chat and lm.text.available and lm.text.chats.templates:
                print(f"note: {lm.name} has a chat template; if it was tuned for chats, --chat asks so",
                      file=sys.stderr)


def named_value(option: str, text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON, or else the text as it is. Raises SettingError."""
    name, mark, value = text.partition("=")
    if not name or not mark:
        raise SettingError(f"{option} is {text!r}, but must be NAME=VALUE, such as limit=200")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def unescape(text: str) -> str:
    """A backslash and n, as one types it in a shell, is a line break."""
    return text.replace("\\n", "\n")


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Prompts from a file."""

    file: Path | None = None
    """Read one prompt per line from this text file (-: standard input)."""
    data: Annotated[str | None, left_out("none", metavar="PATH")] = None
    """Read a prompt from each row of this file (.jsonl, .json, .csv, .parquet, ...), folder or hub data set."""
    prompt: Annotated[str | None, Sets(("Source.text",)), left_out("prompt")] = None
    """--data: the column of prompts, or a template such as "Question: {question}\\nAnswer:"."""
    limit: Annotated[int | None, left_out("all")] = None
    """--data: read so many rows, the first."""

    def read(self, written: Sequence[str] = ()) -> list[str]:
        """The prompts that were `written` behind the command, those of the file or of the rows, or none. Raises
        PromptError, DataError, SettingError."""
        given = [name for name, there in (("as arguments", written), ("by --file", self.file), ("by --data", self.data))
                 if there]
        if len(given) > 1:
            raise PromptError(f"prompts were given {' and '.join(given)}; give one of them")
        if self.data is None:
            for option in ("prompt", "limit"):
                if getattr(self, option) is not None:
                    raise PromptError(f"{dashed(option)} is for --data, which was not given; name a file by --data")
            return _lines(self.file) if self.file else [unescape(text) for text in written]
        from sled.train.data.sources import Source

        source = Source(self.data, text=unescape(self.prompt or "prompt"), limit=self.limit)
        return [example.body for example in whole_rows(source, "prompt")]


def _lines(file: Path) -> list[str]:
    from sled.train.data.file_rows import READERS

    if file.suffix.lower() in READERS and file.suffix.lower() != ".txt":
        raise PromptError(f"{file} holds rows, not a prompt per line; give it by --data, and by --prompt its column of "
                          "prompts, or a template")
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise PromptError(f"the prompts' file {file} cannot be read ({reason}); name a text file") from reason
    lines = [unescape(line) for line in text.split("\n") if line.strip()]  # no other character ends one
    if not lines:
        raise PromptError(f"{file} holds no prompts; write one per line")
    return lines


def whole_rows(source, last: str) -> list:
    """The examples of a `Source`, at least one. Raises DataError for a row that lacks something, which training may
    take for empty. last: what their bodies are, in words."""
    examples = list(source.open())
    for example in examples:
        if example.lacks:
            raise DataError(f"{example.place} has no value in its column {example.lacks[0]!r}; fill it in, or leave "
                            "the row out")
        if not example.body:
            raise DataError(f"{example.place} has an empty {last}; fill it in, or leave the row out")
    if not examples:
        raise DataError(f"{source.name} holds no rows; give one per {last}")
    return examples


def begin(command, usual: int) -> tuple[sled.LM, list[Prompt], dict[str, Any]]:
    """For `sled calibrate` and `sled tune`: the model, prompts to try it on, and how all their texts are made.

    What can be refused without the model is refused before it is loaded. usual: as of `begin_prompts`.
    """
    fusion = command.fusion_options.strategy()
    command.sampling_options.check()
    lm, prompts = begin_prompts(command, usual)
    return lm, prompts, dict(fusion=fusion, sampling=command.sampling_options.chosen(lm),
                             seed=command.sampling_options.seed, max_new_tokens=command.max_new_tokens,
                             stop=[unescape(s) for s in command.stop])


def begin_prompts(command, usual: int) -> tuple[sled.LM, list[Prompt]]:
    """The model, and prompts to try it on; usual: how many problems of the demo model to take where none were given."""
    given = command.prompt_options
    if command.problems is not None and (given.file or given.data):
        raise PromptError("--problems was given beside --file or --data; give one of them")
    prompts = command.chat_options.prompts(given.read() or _problems(command, usual))
    lm = command.model_options.load()
    command.chat_options.hint(lm)
    return lm, prompts


def layers_to_try(lm: sled.LM, prompts: Sequence[Prompt], most: int, max_new_tokens: int) -> tuple[int, ...]:
    """The layers after which leaving early promises most, by `sled.layers` on a few of the prompts, without timing."""
    survey = sled.layers(lm, prompts[:FEW_PROMPTS], max_new_tokens=min(max_new_tokens, FEW_TOKENS), profile=False)
    layers = survey.speaking_layers(most)
    print(f"sled layers: to leave after {', '.join(map(str, layers))} promises most", file=sys.stderr)
    return layers


def _problems(command, usual: int) -> list[str]:
    """Training problems of the demo model, as prompts: as many as --problems says, or the usual number."""
    if command.model_options.model != "demo":
        raise PromptError(f"no prompts were given for {command.model_options.model}: only the demo model comes with "
                          "some of its own; name a file of prompts by --file or --data")
    from sled.demo.problems import problems, prompt

    count = Whole(1, hint="it counts the problems")(
        "--problems", usual if command.problems is None else command.problems)
    return [prompt(problem.question) for problem in problems("train", count)]
