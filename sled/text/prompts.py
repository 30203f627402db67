"""Prompts as users give them, to checked arrays of token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

import numpy as np

from sled.errors import PromptError
from sled.io import shown
from sled.models import DecoderConfig
from sled.text.chat import Chat
from sled.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Chat
Prompts = Prompt | Sequence[Prompt]


def is_one(prompts: Prompts, what: str = "a prompt") -> bool:
    """Whether this is a single prompt (a string, one list of token ids, or a `Chat`). Raises PromptError for what is no
    list."""
    if isinstance(prompts, str | Chat):
        return True
    entries = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # arrays of any library
    if not isinstance(entries, Collection) or isinstance(entries, Mapping | Set):
        raise PromptError(f"{what} must be a string, a list of token ids, a sled.Chat, or a list of these, but "
                          f"{shown(prompts, 60)} was given; of a generator give list(...), of what a tokenizer "
                          "returned its input_ids")
    return len(entries) > 0 and all(isinstance(x, int | np.integer) for x in entries)


def prompt_ids(prompts: Prompts, text: Tokenizer, config: DecoderConfig) -> list[np.ndarray]:
    """Token ids [T] of each prompt. Raises PromptError for one that cannot be continued."""
    several = [prompts] if is_one(prompts) else prompts
    if len(several) == 0:
        raise PromptError("no prompt was given; give a string, a list of token ids, a sled.Chat, or a list of these")
    ids = [text.encode(p) if isinstance(p, str) else text.encode_chat(p)[0] if isinstance(p, Chat) else p
           for p in several]
    return [check_ids(x, config, f"prompt {i}" if len(ids) > 1 else "the prompt") for i, x in enumerate(ids)]


def pair_ids(prompt: Prompt, continuation: Prompt, text: Tokenizer, config: DecoderConfig):
    """Token ids of a prompt and its continuation, for scoring."""
    if isinstance(prompt, Chat):
        written = isinstance(continuation, str)
        prompt, scored = text.encode_chat(prompt, continuation if written else "")
        continuation = scored if written else continuation
    if isinstance(prompt, str) != isinstance(continuation, str):
        raise PromptError("a prompt and its continuation must both be strings or both lists of token ids; after a "
                          "sled.Chat either will do")
    if isinstance(prompt, str):
        before, scored = text.encode_continuation(prompt, continuation)
        if prompt and not before:
            raise PromptError(f"no token of the prompt {prompt[-40:]!r} stands before the continuation "
                              f"{continuation[:40]!r}: they share one, or the prompt is white space; "
                              "give a longer prompt")
        prompt, continuation = before, scored
    prompt = _valid_ids(prompt, config, "the prompt")
    continuation = _valid_ids(continuation, config, "the continuation",
                              empty="there is nothing to score; give at least one token")
    both = len(prompt) + len(continuation)
    if both > config.context + 1:  # the last token is only predicted: it takes no place
        raise PromptError(f"prompt and continuation are {both} tokens long, but the model's context holds "
                          f"{config.context}, and one more is predicted; shorten the prompt{_or_else(config)}")
    return prompt, continuation


def check_ids(ids: Sequence[int], config: DecoderConfig, what: str) -> np.ndarray:
    """int32 [T], or PromptError: empty, not whole numbers, outside the vocabulary, no room to go on."""
    ids = _valid_ids(ids, config, what)
    if len(ids) >= config.context:
        raise PromptError(f"{what} is {len(ids)} tokens long, but the model's context holds "
                          f"{config.context}, the new tokens included; shorten it{_or_else(config)}")
    return ids


def check_room(ids: Sequence[np.ndarray], new: int, config: DecoderConfig) -> None:
    """Raises PromptError where a text could end at the context though the model can be loaded for a longer one."""
    longest = max(map(len, ids))
    if config.context < config.max_positions and longest + new > config.context:
        raise PromptError(f"a prompt is {longest} tokens long and {new} new ones may follow, but the model's context "
                          f"holds {config.context} as it is loaded; ask for at most {config.context - longest} new "
                          f"ones{_or_else(config)}")


def _or_else(config: DecoderConfig) -> str:
    return config.beyond and f" ({config.beyond})"


def _valid_ids(ids: Sequence[int], config: DecoderConfig, what: str, *, empty: str = (
        "there is no token to start from; give at least one (the model's BOS token, if it has one)")) -> np.ndarray:
    """As `check_ids`, whatever room there is."""
    try:
        ids = np.asarray(ids)
    except ValueError:  # lists of several lengths within one another
        ids = np.asarray(ids, object)
    if ids.size == 0:
        raise PromptError(f"{what} is empty: {empty}")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"{what} is neither a string nor a list of token ids: {shown(ids.tolist(), 60)}; "
                          "give text, whole numbers, or sled.Chat(messages)")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise PromptError(f"{what} has token id {outside[0]}, but the model's vocabulary is 0 to "
                          f"{config.vocab_size - 1}; is the text tokenised for another model?")
    return ids.astype(np.int32)
