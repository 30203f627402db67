"""Examples to token ids, once: tokenised documents on disk, found again by what they were made of.

A document is an example's tokens with an end of text; a conversation may make several. A folder of the cache holds one
source's documents under the digest of data, columns, tokenizer, chat template and end of text; it appears there whole
or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from sled.errors import DataError, PromptError, TemplateError
from sled.io import cache_folder, folder_written_whole, json_digest, unfinished_folder
from sled.models.config import DecoderConfig
from sled.text.tokenizer import Tokenizer
from sled.train.data.conversations import tokenised, written
from sled.train.data.sources import Example, Reading, Source

DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)  # what numpy and json raise
FORMAT = 3  # of the folders, and of how files are read; another one is not found
TOGETHER = 1024  # examples that are tokenised at a time, on all cores


class Documents(NamedTuple):
    """Tokenised examples on disk, N documents of M tokens in all."""

    folder: Path
    digest: str  # SHA-256 of the documents: the same wherever and with whatever versions they were made
    tokens_M: np.ndarray  # int32, mapped from the file
    starts_N: np.ndarray  # int64 [N + 1]: where each begins, and the end of the last
    prompts_N: np.ndarray  # int64: tokens of each before the first that is learnt
    gaps_G2: np.ndarray  # int64: from and to which of the M tokens others are not learnt, as what a user says later
    skipped: dict[str, int]  # examples that made no document, by reason


def tokenise(source: Source, text: Tokenizer, config: DecoderConfig, *, cache: str | Path | None = None,
             progress: bool = True) -> Documents:
    """The documents of `source`, from the cache where it has them.

    Prompt and completion are tokenised as one text; a token that straddles them belongs to the completion
    (`Tokenizer.encode_continuation`). Of a conversation the assistant's answers are learnt
    (`sled.train.data.conversations`). `config.eos_ids[0]` ends every document that ends in none of `eos_ids` yet, but
    token ids behind a prompt's.
    Examples without text, completion, tokens or answers are skipped and counted. Processes that ask for the same
    documents at once wait for the first. Raises DataError, DownloadError, TemplateError, TokenizerError.
    """
    if not config.eos_ids:
        raise DataError("the model's configuration names no end-of-text token, which must end every example; put "
                        "eos_token_id into its config.json")
    reading = source.open()
    made_of = dict(format=FORMAT, data=reading.digest(), text=source.text, prompt=source.prompt,
                   completion=source.completion, tokens=source.tokens, limit=source.limit,
                   tokenizer=None if source.tokens else text.digest, eos=config.eos_ids, vocabulary=config.vocab_size)
    if source.messages is not None:
        made_of |= dict(messages=source.messages, template=text.chats.template({}), special=dict(text.chats.tokens))
    root = cache_folder("data") if cache is None else Path(cache).expanduser()
    folder = root / json_digest(made_of)[:32]
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (found := _load(folder)) is None:
            for left in root.glob(unfinished_folder(folder.name)):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with folder_written_whole(folder) as beside:  # a folder that is there is damaged
                _write(beside, reading, text, config, progress=progress)
            found = _load(folder)
    return found


def _load(folder: Path) -> Documents | None:
    """The documents of a folder; None where it is not there, or not whole."""
    try:
        with open(folder / "documents.npz", "rb") as file, np.load(file) as arrays:
            starts_N, prompts_N, gaps_G2 = arrays["starts"], arrays["prompts"], arrays["gaps"]
        about = json.loads((folder / "about.json").read_text())
        digest, skipped = about["digest"], about["skipped"]
        if (folder / "tokens.bin").stat().st_size != 4 * starts_N[-1]:
            return None
    except DAMAGED:
        return None
    # An empty file cannot be mapped.
    tokens_M = np.memmap(folder / "tokens.bin", "<i4", "r") if starts_N[-1] else np.zeros(0, np.int32)
    return Documents(folder, digest, tokens_M, starts_N, prompts_N, gaps_G2, skipped)


def _write(folder: Path, reading: Reading, text: Tokenizer, config: DecoderConfig, *, progress: bool) -> None:
    as_they_are = None not in (reading.source.prompt, reading.source.tokens)
    starts, prompts, gaps, skipped, total = [0], [], [], Counter(), hashlib.sha256()
    with (open(folder / "tokens.bin", "wb") as file,
          tqdm(desc="tokenising", total=reading.total, unit="example", disable=not progress) as bar):
        for example, made in _encode(reading, text, bar.update):
            if isinstance(made, str):
                skipped[made] += 1
                continue
            prompt, ids, later = made
            if ids[-1] not in config.eos_ids and not as_they_are:
                ids.append(config.eos_ids[0])
            if not 0 <= min(ids) <= max(ids) < config.vocab_size:
                wrong = next(x for x in ids if not 0 <= x < config.vocab_size)
                raise DataError(f"{example.place} has token id {wrong}, but the model's vocabulary is 0 to "
                                f"{config.vocab_size - 1}; tokenise it with this model's tokenizer")
            total.update(raw := np.asarray([prompt, len(ids), *ids], "<i4").tobytes())
            file.write(raw[8:])  # the two counts are for the digest alone
            if later:
                total.update(np.asarray(later, "<i4").tobytes())
                gaps += [(starts[-1] + start, starts[-1] + end) for start, end in later]
            starts.append(starts[-1] + len(ids))
            prompts.append(prompt)
    np.savez(folder / "documents.npz", starts=np.asarray(starts, np.int64), prompts=np.asarray(prompts, np.int64),
             gaps=np.asarray(gaps, np.int64).reshape(-1, 2))
    (folder / "about.json").write_text(json.dumps({"digest": total.hexdigest(), "skipped": skipped}))


Made = tuple[int, list[int], list[tuple[int, int]]]  # tokens before what is learnt, all ids, later ones not learnt


def _encode(reading: Reading, text: Tokenizer, count: Callable[[], object]) -> Iterator[tuple[Example, Made | str]]:
    """Each example with what it makes, in order, or with the reason for skipping it. `count` is called for each."""
    source, examples = reading.source, iter(reading)
    blank = "blank completion" if source.text is None else "blank text"
    while together := list(itertools.islice(examples, TOGETHER)):
        if source.messages is not None:
            for example in together:
                count()
                for made in _of_conversation(example, text) or ["no answer"]:
                    yield example, made
            continue
        if source.tokens is not None:
            parts = [(example.prompt, example.body) for example in together]
        elif source.text is not None:
            parts = [([], ids) for ids in text.encode_all([example.body for example in together])]
        else:
            parts = text.encode_continuations([(example.prompt, example.body) for example in together])
        for example, (prompt, body) in zip(together, parts, strict=True):
            count()
            is_blank = isinstance(example.body, str) and not example.body.strip()
            yield example, blank if is_blank else (len(prompt), prompt + body, []) if body else "no tokens"


def _of_conversation(example: Example, text: Tokenizer) -> list[Made]:
    """What a conversation makes: a document, several, or none. Raises DataError, PromptError, TemplateError."""
    try:
        documents = tokenised(written(example.body, text.chats), text)
    except (DataError, PromptError, TemplateError) as reason:
        raise type(reason)(f"{example.place} {reason}") from reason
    made = []
    for ids, learnt_T in documents:
        edges = np.flatnonzero(np.diff(np.asarray([1, *learnt_T, 1], np.int8)))  # where gaps begin and end, in turn
        gaps = [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
        made.append((gaps.pop(0)[1] if gaps and gaps[0][0] == 0 else 0, ids, gaps))
    return made
