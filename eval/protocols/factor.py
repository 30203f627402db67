"""FACTOR: is a true completion of a text more probable than three false ones?

Muhlgay et al., EACL 2024, arXiv 2307.06908; data and code MIT, the news part ODC-By. The prompt and the choice by
the SUM are those of DoLa's and SLED's evaluation; the choice by the MEAN is that of the benchmark's own authors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sled.eval.protocols.choices import first_wins
from sled.eval.protocols.rows import column

SOURCE = "FACTOR's CSV files (https://github.com/AI21Labs/factor, data/)"
COMPLETIONS = ("completion", "contradiction_0", "contradiction_1", "contradiction_2")


def truncated(raw: Mapping, place: str) -> dict:
    """A row with the prefix cut to a model's context, as used of the wiki and expert parts. Raises DataError."""
    return _row(raw, "turncated_prefixes", place)  # spelled so in the data


def full(raw: Mapping, place: str) -> dict:
    """A row with the whole prefix, as used of the news part. Raises DataError."""
    return _row(raw, "full_prefix", place)


def _row(raw: Mapping, prefix: str, place: str) -> dict:
    return dict(prefix=column(raw, prefix, str, place, SOURCE),
                choices=[column(raw, name, str, place, SOURCE) for name in COMPLETIONS])


def results(doc: Mapping, scored: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """acc_sum, and acc_mean where the model's scores say how many tokens they sum (`choices.Scored`).

    A model may count the white space that ends the prefix among the tokens it scores, as the harness has it. It is the
    same for all four completions, so the sum's choice does not change; the mean's can.
    """
    sums = [score[0] for score in scored]
    found = {"acc_sum": float(first_wins(sums))}
    counts = [getattr(score, "tokens", None) for score in scored]
    if all(counts):
        found["acc_mean"] = float(first_wins([total / count for total, count in zip(sums, counts, strict=True)]))
    return found
