"""Tokens that stand only in files beside `tokenizer.json`, added to it as transformers' AutoTokenizer adds them.

Without them their texts are split like any others, and every later token differs from what the model was made for. The
rest of `tokenizer.json` is used as it stands, whatever `tokenizer_class` says: some classes of transformers 5 put
another normaliser or splitter in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from sled.errors import TokenizerError
from sled.io import read_object

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def add_tokens_beside(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds what `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` have besides.

    The last two count only where the first has no `added_tokens_decoder`, as in transformers.
    Raises TokenizerError for files that cannot be read, and for a token that would not get the id that they give it.
    """
    config = _read(folder / "tokenizer_config.json")
    own = tokenizer.get_added_tokens_decoder()
    try:
        if "added_tokens_decoder" in config:
            listed = {int(at): AddedToken(**token) for at, token in config["added_tokens_decoder"].items()}
            special = dict(_special_tokens(config))
        else:
            special = dict(_special_tokens({**config, **_read(folder / "special_tokens_map.json")}))
            listed = {at: AddedToken(text, normalized=text not in special, special=text in special)
                      for text, at in _read(folder / "added_tokens.json").items() if at not in own}
        known = {repr(token) for token in own.values()}
        tokens = {at: token for at, token in sorted(listed.items()) if repr(token) not in known}
        there = {token.content for token in (*own.values(), *tokens.values())}
        for token in tokens.values():
            token.special = token.special or token.content in special
        tokenizer.add_tokens([*tokens.values(), *(token for text, token in special.items() if text not in there)])
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as reason:
        raise TokenizerError(f"{folder}: the tokens beside tokenizer.json cannot be read ({reason}); fetch "
                             "tokenizer_config.json, special_tokens_map.json and added_tokens.json again") from reason
    given = {token.content for token in own.values()}
    for at, token in tokens.items():
        got = tokenizer.token_to_id(token.content)
        if token.content not in given and got != at:
            raise TokenizerError(f"{folder}: the token {token.content!r} is given the id {at}, but the next one after "
                                 f"the vocabulary of tokenizer.json is {got}; write the tokenizer anew with "
                                 "save_pretrained, or correct the file that names it")


def _special_tokens(config: dict[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    """The special tokens of these settings, by their text: those with a role of their own, then the others."""
    roles = [*NAMED_TOKENS, *(name for name in config if name.endswith("_token") and name not in NAMED_TOKENS)]
    others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for one in (*map(config.get, roles), *(others.values() if isinstance(others, dict) else others)):
        if isinstance(one, dict):
            flags = {name: value for name, value in one.items() if name not in ("__type", "special")}
            yield one["content"], AddedToken(**flags, special=True)
        elif isinstance(one, str) and one:
            yield one, AddedToken(one, special=True)


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, TokenizerError) if path.exists() else {}
