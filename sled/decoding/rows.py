"""How prompts become the rows of runs: in shapes of few kinds, so that other numbers of prompts compile nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sled.decoding.batch import Generation
from sled.decoding.groups import even, stages_of
from sled.decoding.network import Build
from sled.decoding.options import Decoding
from sled.decoding.staged import StagedGeneration
from sled.decoding.state import bucket

Run = Generation | StagedGeneration


class Shape(NamedTuple):
    """Of a run: rows of a batch, idle ones included, and how many such batches follow each other through stages."""

    height: int
    following: int


def batch_height(prompts: int) -> int:
    """The rows of a batch of so many prompts: 1, 2, 3, 4, 6, 8, 12, 16, ..., so that other numbers compile nothing."""
    return bucket(prompts, least=2) if prompts > 1 else 1


def shape_of_runs(build: Build, prompts: int, decoding: Decoding, *, batch_size: int) -> Shape:
    """The shape of all runs of so many prompts.

    Over stages prompts that would fill one batch are one where tokens may leave early, so that none waits for another's
    turn, and else spread over as many as there are stages.
    """
    stages, rows = stages_of(build.mesh), prompts
    following = min(stages, -(-prompts // batch_size))
    if stages > 1 and len(decoding.exits.exits(build.outline.num_layers)) == 1:
        following = min(stages, prompts)
        rows = -(-min(prompts, stages * batch_size) // following)
    return Shape(even(min(batch_size, batch_height(rows)), build.mesh), following)


def begin(build: Build, params: Any, ids: Sequence[np.ndarray], rows: Sequence[int], decoding: Decoding, shape: Shape,
          *, context: int, seed: int, stop_ids: tuple[int, ...]) -> Run:
    """A run of the prompts number `rows` of `ids`, and of idle rows, so that it has the shape.

    Settings with an entry per prompt follow their prompts, which draw from stream seed + number; an idle row repeats
    the first one's. context: positions of a row at most.
    """
    idle = shape.height * shape.following - len(rows)
    limits = [min(decoding.max_new_tokens, context - len(ids[i])) for i in rows] + [0] * idle
    rows = [*rows, *[rows[0]] * idle]
    settings = dict(limits=limits, seeds=[seed + i for i in rows], stop_ids=stop_ids)
    prompts, decoding = [ids[i] for i in rows], decoding.take_rows(rows)
    if stages_of(build.mesh) > 1:
        return StagedGeneration(build, params, prompts, decoding, microbatches=shape.following, **settings)
    return Generation(build, params, prompts, decoding, **settings)
