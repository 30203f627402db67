"""A model's own answers as training data: what its last layer says, for its early layers to learn.

The answers to a source's prompts are generated once, batch by batch, and kept in a file under the digest of all that
decides them: the model, the prompts, the settings. Killed at any moment, the same call goes on after the last whole
batch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from sled.decoding.options import GREEDY
from sled.decoding.sampling import Sampling
from sled.io import cache_folder, json_digest
from sled.models.decoder import ARITHMETIC
from sled.settings.describe import describe
from sled.settings.rules import Whole
from sled.text.chat import Chat
from sled.train.data.sources import Example, Reading, Source

FORMAT = 1  # of the files; another one is not found


def own_answers(lm: Any, source: Source, *, max_new_tokens: int = 128,
                sampling: Sampling | Literal["checkpoint"] = GREEDY, batch_size: int = 32,
                cache: str | Path | None = None, progress: bool = True) -> Source:
    """The prompts of `source` with the answers of the model in the place of its completions, as token ids.

    lm: an `LM`. source: its prompts, or where it has none its whole texts or token ids; of a conversation what stands
        before the assistant's last message. A prompt that leaves no room for an answer, or is empty, gets none.
    max_new_tokens: of an answer, at most; one that is cut there is not learnt to end.
    sampling: as for `LM.generate`; greedy by default. Prompt i draws from random stream i.
    batch_size: prompts answered together. cache: by default `sled.io.cache_folder("answers")`.

    Processes that ask for the same answers at once wait for the first. Raises DataError, DownloadError, SettingError,
    TemplateError, TokenizerError.
    """
    most = Whole(1, hint="it counts the tokens of an answer")("max_new_tokens", max_new_tokens)
    batch_size = Whole(1, hint="prompts are answered in batches")("batch_size", batch_size)
    sampling, reading = lm.sampling_of(sampling), source.open()
    columns = {name: getattr(source, name) for name in ("text", "prompt", "tokens", "messages", "limit")}
    made_of = dict(format=FORMAT, arithmetic=ARITHMETIC, data=reading.digest(), **columns, most=most,
                   weights=lm.weights_digest(), config=describe(lm.config), sampling=describe(sampling),
                   tokenizer=lm.text.digest if lm.text.available else None,
                   template=None if source.messages is None else lm.text.chats.template({}))
    root = cache_folder("answers") if cache is None else Path(cache).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    file = root / f"{json_digest(made_of)[:32]}.jsonl"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            part = file.with_suffix(".part")
            _answer(lm, reading, part, most, sampling, batch_size, progress)
            part.rename(file)
    return Source(file, prompt="prompt", tokens="answer")


def _answer(lm: Any, reading: Reading, part: Path, most: int, sampling: Sampling, batch_size: int,
            progress: bool) -> None:
    """Writes a row for every example into the file `part`, behind those that are there."""
    with open(part, "a+b") as file:
        done = _whole_rows(file)
        total = reading.total or reading.source.limit
        with tqdm(desc="answering", total=total, initial=done, unit="prompt", disable=not progress) as bar:
            examples = itertools.islice(reading, done, None)
            while together := list(itertools.islice(examples, batch_size)):
                prompts = [_prompt(lm, reading.source, example) for example in together]
                fits = [0 < len(ids) < lm.config.context for ids in prompts]
                asked = [ids if fit else lm.config.eos_ids[:1] for ids, fit in zip(prompts, fits, strict=True)]
                out = lm.generate(asked, max_new_tokens=most, sampling=sampling, seed=done, batch_size=batch_size)
                rows = [{"prompt": np.asarray(ids).tolist(), "answer": answer if fit else []}
                        for ids, answer, fit in zip(prompts, out.tokens, fits, strict=True)]
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                file.flush()
                done += len(together)
                bar.update(len(together))


def _whole_rows(file) -> int:
    """How many rows the file has, which then ends with the last of them: of a killed process part of one may stand
    there."""
    file.seek(0)
    count = end = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        count, end = count + 1, end + len(line)
    file.truncate(end)
    file.seek(end)
    return count


def _prompt(lm: Any, source: Source, example: Example) -> Sequence[int]:
    """The ids that the model is to go on from, none where there is nothing. Raises TemplateError."""
    asked = example.body if source.prompt is None else example.prompt
    if source.messages is not None:
        last = next((i for i in reversed(range(len(asked))) if asked[i]["role"] == "assistant"), len(asked))
        return lm.text.encode_chat(Chat(asked[:last]))[0] if last else []
    return lm.text.encode(asked) if isinstance(asked, str) else asked
