"""`generation_config.json`: how a checkpoint's authors have it generate, as transformers' `generate` reads the file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sled.errors import ConfigError
from sled.io import read_object

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # where do_sample is true; what absent means
PENALTY = {"repetition_penalty": 1.0}
# What changes tokens or their probabilities in transformers and is not to be had here, with the values under which it
# does nothing (null apart). tests/test_generation_config.py sees transformers read these fields.
ONLY_DRAWING: Mapping[str, tuple] = {"top_h": (), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
ALWAYS: Mapping[str, tuple] = {
    "bad_words_ids": (), "begin_suppress_tokens": ([],), "constraints": (), "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "exponential_decay_length_penalty": (),
    "force_words_ids": (), "forced_bos_token_id": (), "forced_eos_token_id": (), "guidance_scale": (1,),
    "min_length": (0,), "min_new_tokens": (0,), "no_repeat_ngram_size": (0,), "num_beam_groups": (1,),
    "num_beams": (1,), "penalty_alpha": (0,), "sequence_bias": (), "suppress_tokens": ([],), "token_healing": (False,),
    "watermarking_config": ()}
_OF_THE_FILE = ("_from_model_config", "transformers_version")


def read_generation(folder: Path) -> dict[str, Any]:
    """The settings in a folder's `generation_config.json`, besides token ids; null ones are left out.

    Where there is no such file, those settings that old checkpoints have in `config.json`, as transformers does. Raises
    ConfigError for a file that is no JSON object or holds a number that is not finite.
    """
    own = os.path.lexists(folder / FILE)
    path = folder / (FILE if own else "config.json")
    if not own and not path.exists():
        return {}
    known = {"do_sample", *DRAWING, *PENALTY, *ONLY_DRAWING, *ALWAYS}
    found = {name: value for name, value in read_object(path, ConfigError).items() if value is not None
             and (name not in (*IDS, *_OF_THE_FILE) if own else name in known)}
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise ConfigError(f"{path} holds a number that is not finite; correct the file") from None
    return found


def acting(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `read_generation` found, the settings that change how tokens are chosen, without the defaults."""
    draws = fields.get("do_sample", False) is not False
    idle = {name: (value,) for name, value in (DRAWING | PENALTY).items()} | dict(ALWAYS) | dict(ONLY_DRAWING)
    drawing = {"do_sample", *DRAWING, *ONLY_DRAWING}
    return {name: value for name, value in fields.items()
            if (name in idle or name == "do_sample") and (draws or name not in drawing)
            and (name == "do_sample" or not any(value == one for one in idle[name]))}
