"""Tokens that stand only in files beside `tokenizer.json`, added to it as transformers' AutoTokenizer adds them.

Without them their texts are split like any others, and every later token differs from what the model was made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from sled.errors import TokenizerError
from sled.io import read_object

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def add_tokens_beside(tokenizer: Tokenizer, folder: Path, own: Mapping[int, AddedToken],
                      roles: Mapping[str, str], *, bare: bool) -> str | None:
    """Adds what `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` have besides.

    Returns the text of the BOS token, or None.

    The last two count only where the first has no `added_tokens_decoder`. This, and which flags win where several files
    name a token, follows transformers 5 (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend`).
    own: the tokens that `tokenizer.json` adds itself, which `tokenizer` need not have yet. roles: special tokens where
    these files name none. bare: what is named as special has no other flag, whatever its entry says.
    Raises TokenizerError for files that cannot be read, and for a token that would not get the id that they give it.
    """
    config = {**roles, **read_if_there(folder / "tokenizer_config.json")}
    there = tokenizer.get_added_tokens_decoder()
    whole = "added_tokens_decoder" in config
    older = {} if whole else read_if_there(folder / "special_tokens_map.json")
    try:
        named, others, late = _special_tokens(config, older)
        with_role = _by_text(named)
        if whole:
            listed = {int(at): AddedToken(**token) for at, token in config["added_tokens_decoder"].items()}
        else:
            # Not roles with a "__type": transformers looks these up before it has made tokens of them.
            texts = [token for token in map({**config, **older}.get, NAMED_TOKENS) if "__type" not in (token or ())]
            special = _by_text([*texts, *others])
            listed = {at: AddedToken(text, normalized=text not in special, special=text in special)
                      for text, at in read_if_there(folder / "added_tokens.json").items()} | dict(own)
        tokens = dict(sorted(listed.items()))
        for token in tokens.values():
            token.special = token.special or token.content in with_role
        known = {token.content for token in (*there.values(), *tokens.values())}
        more = _by_text({repr(token): token for token in (*named, *others, *late)}.values())
        tokenizer.add_tokens([*tokens.values(), *(token for text, token in more.items() if text not in known)])
        if bare:
            tokenizer.add_tokens([AddedToken(text, special=True) for text in more])
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as reason:
        raise TokenizerError(f"{folder}: the tokens beside tokenizer.json cannot be read ({reason}); fetch "
                             "tokenizer_config.json, special_tokens_map.json and added_tokens.json again") from reason
    given = {token.content for token in there.values()}
    for at, token in tokens.items():
        got = tokenizer.token_to_id(token.content)
        if token.content not in given and got != at:
            raise TokenizerError(f"{folder}: the token {token.content!r} is given the id {at}, but the next one after "
                                 f"the vocabulary of tokenizer.json is {got}; write the tokenizer anew with "
                                 "save_pretrained, or correct the file that names it")
    begin = {**config, **older}.get("bos_token")
    return begin["content"] if isinstance(begin, dict) else begin or None


def _special_tokens(config: dict[str, Any], older: dict[str, Any]) -> tuple[list[Any], ...]:
    """The special tokens: those with a role of their own, others, and others that only the `older` settings have."""
    both = {**config, **older}
    named = [*map(both.get, NAMED_TOKENS),
             *(token for role, token in both.items() if role.endswith("_token") and role not in NAMED_TOKENS)]
    first, second = (one.get("additional_special_tokens") for one in (config, older))
    new = config.get("extra_special_tokens")
    if isinstance(new, dict):
        return [*named, *new.values()], second or first or [], []
    if new is None and first is None:
        return named, [], second or []
    return named, new or first or [], []


def _by_text(tokens: Iterable[Any]) -> dict[str, AddedToken]:
    """Of tokens with the same text the last one counts."""
    found = {}
    for token in tokens:
        if isinstance(token, dict):
            flags = {name: value for name, value in token.items() if name not in ("__type", "special")}
            found[token["content"]] = AddedToken(**flags, special=True)
        elif isinstance(token, str) and token:
            found[token] = AddedToken(token, special=True)
    return found


def read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path, TokenizerError) if path.exists() else {}
