"""Text to token ids and back, by a checkpoint's own `tokenizer.json`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from sled.errors import TokenizerError
from sled.io import first_line, read_text
from sled.text.chat import Chat, ChatTemplates
from sled.text.tokenizer_class import tokenizer_of
from sled.text.watch import in_time, may_run_away

REMEDIES = {"text": "give whole characters (no lone surrogates) in a string, or token ids",
            "ids": "give ids of its vocabulary"}


class Tokenizer:
    """A checkpoint's tokenizer, or the lack of one: every use then raises TokenizerError."""

    def __init__(self, tokenizer: tokenizers.Tokenizer | None, source: str, folder: Path | None = None, *,
                 watched: bool = False):
        self._tokenizer = tokenizer
        self._watched = watched  # whether a limit holds for the time that a text takes
        self._source = source
        self.folder = folder  # where the tokenizer's own settings lie, its chat template among them

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        path = folder / "tokenizer.json"
        if not os.path.lexists(path):
            return cls(None, str(folder), folder)
        text = read_text(path, TokenizerError)
        with _naming(f"{path} cannot be read as a tokenizer", "fetch it again, or give token ids"):
            tokenizer = tokenizer_of(folder, text)
        tokenizer.no_truncation()  # the file may hold what it was last used with
        tokenizer.no_padding()
        return cls(tokenizer, str(folder), folder, watched=may_run_away(text))

    @functools.cached_property
    def chats(self) -> ChatTemplates:
        """The chat templates of the folder. Raises TemplateError and TokenizerError where they cannot be read."""
        return ChatTemplates.read(self.folder)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens (such as a leading BOS) that the tokenizer adds, or without."""
        with self._naming("text"):
            if self._watched:
                [found] = self._encode_batch([text], special)
                return found.ids
            return self._get().encode(text, add_special_tokens=special).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, for many texts, on all cores."""
        with self._naming("text"):
            return [encoding.ids for encoding in self._encode_batch(list(texts), True)]

    def _encode_batch(self, texts: list[str], special: bool, *, offsets: bool = False) -> list[tokenizers.Encoding]:
        of_all = self._get().encode_batch if offsets else self._get().encode_batch_fast
        encode = functools.partial(of_all, texts, add_special_tokens=special)
        return in_time(encode, sum(map(len, texts))) if self._watched else encode()

    def encode_continuation(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both parts of one text; a token that straddles the boundary belongs to the continuation.

        White space that ends the prompt moves to the continuation. Both parts are tokenised as one text, and so
        is the prompt alone; the cut lies where these two first differ. Where the prompt's tokens begin the whole
        text's, as they nearly always do, this is `_encode_pair` of lm-evaluation-harness (special tokens aside:
        here they are the tokenizer's own). Where they do not, the harness puts the prompt's own tokens before
        what the whole text has beyond as many, and scores a text that nobody wrote: of "How m" + "any" nothing is
        left, for "How many" has no more tokens. Here the pair is always the tokens of the whole text, and the
        score is that of " many" after "How".

        The prompt's part is empty where its first token straddles the boundary, or where it is white space alone.
        """
        return _cut(self.encode(prompt + continuation), self.encode(prompt.rstrip()))

    def encode_chat(self, chat: Chat, answer: str = "") -> tuple[list[int], list[int]]:
        """Ids of a conversation, which has the special tokens that its template writes, and of an answer to it.

        Both are tokenised as one text; a token that straddles the boundary belongs to the answer.
        """
        text = self.chats.prompt(chat.messages, chat.variables)
        asked = self.encode(text, special=False)
        return _cut(self.encode(text + answer, special=False), asked) if answer else (asked, [])

    def encode_written(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of texts that have their special tokens, and the characters from and to which each stands, on all
        cores."""
        with self._naming("text"):
            return [(encoding.ids, encoding.offsets)
                    for encoding in self._encode_batch(list(texts), False, offsets=True)]

    def encode_continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """As `encode_continuation`, for many prompts with their continuations, on all cores."""
        wholes = self.encode_all([prompt + continuation for prompt, continuation in pairs])
        alones = self.encode_all([prompt.rstrip() for prompt, _ in pairs])
        return [_cut(whole, alone) for whole, alone in zip(wholes, alones, strict=True)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the ids, special tokens left out, or written out."""
        with self._naming("ids"):
            return self._get().decode(list(ids), skip_special_tokens=not special)

    def spelling(self, token_id: int) -> str:
        """How the text of one token reads where special tokens are written out."""
        return self.decode([token_id], special=True)

    def holds_special(self, text: str) -> bool:
        """Whether a special token's spelling is in the text."""
        return any(token.special and token.content in text for token in self._get().get_added_tokens_decoder().values())

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, special or not, or None."""
        return self._get().token_to_id(token)

    @property
    def vocabulary(self) -> int:
        """How many ids a model needs for it: the largest, and one more."""
        return 1 + max(self._get().get_vocab().values())

    def token(self, token_id: int) -> str:
        """One token as a person should see it: its text, or its name if it has none of its own."""
        alone = self.spelling(token_id)
        return alone if alone and "\ufffd" not in alone else self._get().id_to_token(token_id) or f"<{token_id}>"

    @property
    def available(self) -> bool:
        return self._tokenizer is not None

    def write(self, path: Path) -> None:
        """Writes it as a `tokenizer.json` that needs no files beside it."""
        path.write_text(self._get().to_str(), encoding="utf-8")

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer: what was made with another one has another digest."""
        return hashlib.sha256(self._get().to_str().encode()).hexdigest()

    def _naming(self, what: str):
        return _naming(f"the tokenizer of {self._source} fails on this input", REMEDIES[what])

    def _get(self) -> tokenizers.Tokenizer:
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self._source} has no tokenizer.json, so text cannot be read or written; "
                "give prompts as lists of token ids and read `.tokens`, or put a tokenizer.json into the folder")
        return self._tokenizer


@contextlib.contextmanager
def _naming(what: str, remedy: str) -> Iterator[None]:
    """Makes a TokenizerError of whatever the library raises: bare Exceptions, and panics, which are none."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as reason:
        raise TokenizerError(f"{what} ({first_line(reason)}); {remedy}") from reason


def _cut(whole: list[int], alone: list[int]) -> tuple[list[int], list[int]]:
    """`whole` in two, where it first differs from `alone`."""
    cut = next((n for n, pair in enumerate(zip(whole, alone, strict=False)) if pair[0] != pair[1]),
               min(len(whole), len(alone)))
    return whole[:cut], whole[cut:]
