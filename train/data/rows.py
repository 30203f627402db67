"""Rows of training data: from a source to arrays, with a report of what became of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sled.errors import DataError, SettingError
from sled.io import json_digest, written_whole
from sled.models.config import DecoderConfig
from sled.text.tokenizer import Tokenizer
from sled.train.data.documents import DAMAGED, Documents, tokenise
from sled.train.data.packing import Arrangement, Layout, arrange, bucket_lengths
from sled.train.data.sources import Source


class TrainingBatch(NamedTuple):
    """Rows of tokens, all arrays [B, T]; beyond a row's documents everything is 0, but tokens are padding.

    weights: how much a token counts as a target, predicted from those before it. The first of a document never
        does.
    segments: 1 for the row's first document, 2 for the second, ...; attention stays within one.
    """

    tokens_BT: np.ndarray  # int32
    weights_BT: np.ndarray  # float32
    segments_BT: np.ndarray  # int32


@dataclasses.dataclass(frozen=True)
class DataReport:
    """The fate of a source's examples.

    examples: those in the rows, of which `truncated` are not whole. skipped: the others, by reason.
    tokens: in the rows, with the ends of text.
    fill: the share of the rows' positions that hold a token (padded: each row in its own bucket).
    """

    examples: int
    tokens: int
    rows: int
    fill: float
    truncated: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        return (f"{self.examples:,} examples of {self.tokens:,} tokens in {self.rows:,} rows, {self.fill:.1%} full; "
                f"truncated: {self.truncated:,}; skipped: {_reasons(self.skipped)}")


def read_rows(source: Source, text: Tokenizer, config: DecoderConfig, layout: Layout, *,
              cache: str | Path | None = None, progress: bool = True) -> TrainingRows:
    """The rows of `source` for a model: tokenised and arranged once, then taken from the folder `cache`.

    cache: by default `sled.io.cache_folder("data")`. Raises DataError, DownloadError, SettingError,
    TokenizerError.
    """
    if layout.context > config.context:
        raise SettingError(f"Layout.context is {layout.context}, but the model's context holds {config.context}; "
                           "give that or less" + (config.beyond and f" ({config.beyond})"))
    documents = tokenise(source, text, config, cache=cache, progress=progress)
    return TrainingRows(documents, layout, config.pad_id or 0)


class TrainingRows:
    """R rows of documents; `batch` makes arrays of some. Raises DataError where there is none.

    lengths_R: tokens in each. buckets: the lengths to which they are padded, ascending. report: what became of the
    source. digest: SHA-256 of the documents and which of them make each row.
    """

    def __init__(self, documents: Documents, layout: Layout, pad_id: int):
        self._documents, self._layout, self._pad_id = documents, layout, pad_id
        decisive = [layout.context, layout.shape, layout.too_long]
        name = json_digest(decisive)[:16]
        self.digest = json_digest([documents.digest, name])
        lengths_N = np.diff(documents.starts_N)
        a = self._arrangement = _kept(documents.folder / f"{name}.npz",
                                      lambda: arrange(lengths_N, documents.prompts_N, layout))
        skipped = documents.skipped | {reason: count for reason, count in (
            ("too long", int(a.too_long)), ("without a target in the context", int(a.no_target))) if count}
        if len(a.order_K) == 0:
            longer = ("truncate those that are too long (--too-long truncate), or give a larger context"
                      if a.too_long or a.no_target else "give other examples")
            raise DataError(f"no example is left (skipped: {_reasons(skipped)}); {longer}")
        lengths_K = np.minimum(lengths_N[a.order_K], layout.context)
        self.lengths_R = np.add.reduceat(lengths_K, a.starts_R[:-1])
        packed = layout.shape == "packed"
        self.buckets = (layout.context,) if packed else bucket_lengths(self.lengths_R, layout.context, layout.buckets)
        buckets_R = np.asarray(self.buckets)[np.searchsorted(self.buckets, self.lengths_R)]
        tokens = int(self.lengths_R.sum())
        self.report = DataReport(examples=len(a.order_K), tokens=tokens, rows=len(self),
                                 fill=tokens / int(buckets_R.sum()), truncated=int(a.truncated), skipped=skipped)

    def __len__(self) -> int:
        return len(self._arrangement.starts_R) - 1

    def batch(self, numbers, size: int, length: int) -> TrainingBatch:
        """The rows of these numbers, padded to `length` tokens, and empty ones up to `size` rows."""
        batch = TrainingBatch(*(np.full((size, length), value, dtype) for value, dtype in (
            (self._pad_id, np.int32), (0, np.float32), (0, np.int32))))
        documents, starts_R = self._documents, self._arrangement.starts_R
        for number, tokens_T, weights_T, segments_T in zip(numbers, *batch, strict=False):
            at = 0
            for segment, n in enumerate(self._arrangement.order_K[starts_R[number]:starts_R[number + 1]], 1):
                start = documents.starts_N[n]
                count = min(documents.starts_N[n + 1] - start, self._layout.context)
                here = slice(at, at + count)
                tokens_T[here] = documents.tokens_M[start:start + count]
                weights_T[here] = 1
                weights_T[at:at + documents.prompts_N[n]] = self._layout.prompt_weight
                first, last = np.searchsorted(documents.gaps_G2[:, 0], [start, start + count])
                for begin, end in at - start + documents.gaps_G2[first:last]:
                    weights_T[begin:min(end, at + count)] = self._layout.prompt_weight
                weights_T[at] = 0
                segments_T[here] = segment
                at += count
        return batch


def _kept(path: Path, make) -> Arrangement:
    """The arrangement in the file at `path`; where there is none, or no whole one, it is made and put there."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return Arrangement(**arrays)
    except DAMAGED:
        made = make()
    with written_whole(path) as beside, open(beside, "wb") as file:
        np.savez(file, **made._asdict())
    return made


def _reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "none"
