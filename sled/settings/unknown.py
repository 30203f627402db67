"""Names that a function, a class of settings or a command does not have, and which known one was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping

from sled.errors import SettingError

# What transformers, vLLM, lm-evaluation-harness and the authors' code call what has another name here.
ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("alpha", "evolution_rate"), ("rate",)),
    **dict.fromkeys(("k", "evolution_scale"), ("scale",)),
    "evolution_lower_bound": ("lower_bound",),
    **dict.fromkeys(("early_exit_layers", "candidate_premature_layers", "exit_layer", "exit_layers"),
                    ("layers", "layer", "exits")),
    "dola_layers": ("fusion",),
    **dict.fromkeys(("assistant_early_exit", "assistant_model", "early_exit"), ("exits",)),
    **dict.fromkeys(("num_assistant_tokens", "num_speculations", "num_speculative_tokens"), ("draft", "exits")),
    **dict.fromkeys(("lambda", "confidence", "confidence_threshold", "exit_threshold"), ("threshold",)),
    **dict.fromkeys(("max_tokens", "max_length", "max_gen_toks", "num_tokens"), ("max_new_tokens",)),
    **dict.fromkeys(("do_sample", "generation_config"), ("sampling", "temperature")),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), ("stop",)),
    **dict.fromkeys(("inputs", "input_ids", "prompt", "text", "texts"), ("prompts", "prompt")),
    **dict.fromkeys(("torch_dtype", "precision"), ("dtype",)),
    **dict.fromkeys(("model", "model_id", "pretrained_model_name_or_path"), ("source", "model")),
    **dict.fromkeys(("bs", "per_device_train_batch_size", "per_device_eval_batch_size"), ("batch_size",)),
    **dict.fromkeys(("o", "output", "output_dir", "output_path", "save_dir"), ("out",)),
    **dict.fromkeys(("lr",), ("learning_rate",)),
    **dict.fromkeys(("max_steps", "num_train_steps"), ("steps",)),
}


def nearest(unknown: str, known: Collection[str]) -> str | None:
    """The known name that was meant: what is called so elsewhere, what begins so, or what is spelled nearly so."""
    meant = (*(name for name in ELSEWHERE.get(unknown, ()) if name in known),
             *(name for name in known if len(unknown) > 2 and name.startswith(unknown)),
             *difflib.get_close_matches(unknown, known, 1))
    return next(iter(meant), None)


def naming_unknown(function: Callable, name: str = "", *, within: Mapping[str, Collection[type]] = {}) -> Callable:
    """The function, which raises SettingError for an argument by a name that it does not have.

    name: whose arguments they are, in messages. within: classes of settings that arguments take, by argument: where
    one of them has what was given, the message shows how it is given.
    """
    known = [own for own in inspect.signature(function).parameters if own != "self"]
    within = {argument: kinds for argument, kinds in within.items() if argument in known}
    name = name or function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args, **given):
        if unknown := next((own for own in given if own not in known), None):
            raise SettingError(f"{name} has no argument {unknown!r}; "
                               f"{_remedy(unknown, known, within)}")
        return function(*args, **given)

    return checked


def _remedy(unknown: str, known: Collection[str], within: Mapping[str, Collection[type]]) -> str:
    if unknown not in ELSEWHERE or not any(name in known for name in ELSEWHERE[unknown]):
        for argument, kinds in within.items():
            for kind in kinds:
                for name in (unknown, *ELSEWHERE.get(unknown, ())):
                    if name in kind.__dataclass_fields__:
                        return f"it belongs to what {argument} takes: give {argument}=sled.{kind.__name__}({name}=...)"
    if meant := nearest(unknown, known):
        return f"did you mean {meant}?"
    return f"it has {', '.join(known)}"
