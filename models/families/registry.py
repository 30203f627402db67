"""From a folder's `config.json` to a `DecoderConfig` and back, through whichever family it belongs to."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path

from sled.errors import CheckpointError, CheckpointWarning, ConfigError, SettingError, warn
from sled.io import read_object, shorten, shown, write_json
from sled.models.config import DecoderConfig, ExitHeads
from sled.models.families.family import ONE_VALUE, Family, Fields
from sled.models.families.gemma import GEMMA, GEMMA_2, GEMMA_3
from sled.models.families.gpt2 import GPT_2
from sled.models.families.gpt_oss import GPT_OSS
from sled.models.families.llama import LLAMA
from sled.models.families.mistral import MISTRAL
from sled.models.families.mixtral import MIXTRAL
from sled.models.families.olmo import OLMO_2
from sled.models.families.phi import PHI_3
from sled.models.families.qwen import QWEN2, QWEN3
from sled.models.families.qwen_moe import QWEN3_MOE

HEADS_CONFIG = "exit_heads.json"  # beside config.json, whose readers need not know of it
# Classes that hold a decoder among other parts, by `model_type`: its config.json is their 'text_config', and beside it
# the fields of the whole count that follow.
HOLDERS = {"gemma3": "Gemma3ForConditionalGeneration"}
OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
FAMILIES = {family.name: family for family in (
    LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA, GEMMA_2, GEMMA_3, GPT_OSS, GPT_2, OLMO_2, PHI_3)}


def family_of(config: DecoderConfig) -> Family:
    """The family that `config.family` names. Raises ConfigError."""
    if config.family not in FAMILIES:
        raise ConfigError(f"model family {config.family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def read_config(folder: str | Path) -> DecoderConfig:
    """The configuration of a Hugging Face folder: `config.json`, `generation_config.json`, `exit_heads.json`.

    Token ids that end or start a generation come from the second where it has them, as in
    transformers' `generate`; early exits have heads where there is the third. Raises ConfigError for what the file
    says and cannot be obeyed, and CheckpointError for a folder that is no model's. Warns once (CheckpointWarning) of
    what is passed over: fields that transformers' class of this model does not know, so that they cannot matter to it.
    """
    folder = Path(folder)
    path = config_file(folder)
    config = parse_config(read_object(path, ConfigError), str(path))
    path = folder / "generation_config.json"
    if os.path.lexists(path):
        f = Fields(read_object(path, ConfigError), str(path))
        bos, eos, pad = (f.take_ids(f"{name}_token_id", config.vocab_size) for name in ("bos", "eos", "pad"))
        _warn(f, config.family)
        config = dataclasses.replace(
            config,
            bos_id=bos[0] if bos else config.bos_id,
            eos_ids=eos or config.eos_ids,
            pad_id=pad[0] if pad else config.pad_id,
        )
    path = folder / HEADS_CONFIG
    if os.path.lexists(path):
        config = dataclasses.replace(config, exit_heads=_parse_heads(path))
    return config


def config_file(folder: Path) -> Path:
    """The config.json of a model's folder. Raises CheckpointError, with what to give instead, where it has none."""
    path = folder / "config.json"
    if path.exists():
        return path
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter (adapter_config.json), not a model; merge it into its model "
                              "(peft's merge_and_unload), and give the folder that you save then")
    within = sorted(file.parent for file in folder.glob("*/*.safetensors") if (file.parent / path.name).exists())
    remedy = (f"give {within[0]}, which is one" if within else
              "give a Hugging Face folder (sled export makes one of a training run)")
    raise CheckpointError(f"{folder} has no config.json, so it is no model's folder; {remedy}")


def write_heads(heads: ExitHeads, folder: Path) -> None:
    """Puts `exit_heads.json` into a folder."""
    write_json(folder / HEADS_CONFIG, dataclasses.asdict(heads))


def _parse_heads(path: Path) -> ExitHeads:
    f = Fields(read_object(path, ConfigError), str(path))
    given = dict(layers=f.take("layers", list), kind=f.take("kind", str), tied=f.take("tied", bool))
    f.finish()
    try:
        return ExitHeads(**given)
    except SettingError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(values: dict, source: str = "config.json") -> DecoderConfig:
    """The fields of a `config.json` as a `DecoderConfig`; `source` names the file in messages."""
    f = Fields(_decoder_of(values, source), source)
    kind, architectures = f.take("model_type", str, None), f.take("architectures", list, None) or []
    found = [family for family in FAMILIES.values()
             if kind in (None, family.name) and all(family.has(architecture) for architecture in architectures)]
    if len(found) != 1 and isinstance(kind, str) and kind in FAMILIES:
        raise ConfigError(f"{source}: architectures are {shown(architectures, 200)}, but of model_type {kind!r} only "
                          f"{FAMILIES[kind].architecture} is read, which predicts next tokens; use a checkpoint of it")
    if len(found) != 1:
        raise ConfigError(
            f"{source}: model_type {shown(kind, 60)} with architectures {shown(architectures, 200)} is not supported "
            f"(the nearest by name is {_nearest(kind, architectures)}; all: {', '.join(FAMILIES)}); use one of "
            "these, or add the family, as docs/families.md shows")
    try:
        config = DecoderConfig(family=found[0].name, **found[0].read(f))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(source) else f"{source}: {message}") from None
    f.finish(ONE_VALUE)
    _warn(f, config.family)
    return config


def _nearest(kind: str | None, architectures: list) -> str:
    """The name of the family that is spelled most like what a file says."""
    given = " ".join([kind or "", *(one for one in architectures if isinstance(one, str))])[:200].lower()
    ratio = lambda name: difflib.SequenceMatcher(None, given, name.lower()).ratio()  # noqa: E731
    return max(FAMILIES.values(), key=lambda family: ratio(f"{family.name} {family.architecture}")).name


def _decoder_of(values: dict, source: str) -> dict:
    """The fields of the decoder: all, or those that a class with other parts holds of it. Warns of what is left out."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in HOLDERS:
        return values
    text = Fields(values, source).take("text_config", dict)
    left_out = sorted(name.removesuffix("_config") for name in values if name.endswith("_config") and
                      isinstance(values[name], dict) and name != "text_config")
    warn(f"{source}: of this {HOLDERS[kind]} only the text model is read, without its "
         f"{shorten(', '.join(left_out) or 'other', 200)} parts", CheckpointWarning)
    return {name: values[name] for name in OF_THE_WHOLE if name in values} | {"model_type": "gemma3_text"} | text


def _warn(f: Fields, family: str) -> None:
    why = {f"unknown to transformers' {family} models": f.unknown, "no tokens of the vocabulary": f.outside}
    if said := "; ".join(f"{shorten(', '.join(names), 300)} ({reason})" for reason, names in why.items() if names):
        warn(f"{f.source}: passed over {said}", CheckpointWarning)


def format_config(config: DecoderConfig, dtype: str) -> dict:
    """The fields of a `config.json` that transformers 4.4x and 5 both read as this model.

    `dtype` names the stored weights' type, e.g. "bfloat16". Exit heads, which no family has, are left to
    `exit_heads.json`. Raises ConfigError where the family's format cannot express the configuration.
    """
    config = dataclasses.replace(config, exit_heads=None)
    family = family_of(config)
    fields = {"architectures": [family.architecture], "model_type": family.name,
              **family.write(config)}
    read_back = parse_config(fields, f"a {family.name} config.json")
    read_back = read_back.for_long_context() if config.long_context else read_back  # which is no part of the format
    lost = [field.name for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(read_back, field.name)]
    if lost:
        value, other = getattr(config, lost[0]), getattr(read_back, lost[0])
        raise ConfigError(f"{lost[0]} = {value!r} cannot be written as a {family.name} config.json (it would "
                          f"be read as {other!r}); choose a family that has it, of {', '.join(FAMILIES)}")
    return {**fields, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
            "dtype": dtype, "torch_dtype": dtype}
