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


class RunShape(NamedTuple):
    """height: rows of a batch, idle ones included. microbatches: how many such batches follow each other through the
    stages of a pipeline; without stages 1. prompts: how many of all a run takes."""

    height: int
    microbatches: int
    prompts: int


def batch_height(prompts: int) -> int:
    """The rows of a batch of so many prompts: 1, 2, 3, 4, 6, 8, 12, 16, ..., so that other numbers compile nothing."""
    return bucket(prompts, least=2) if prompts > 1 else 1


def shape_of_runs(build: Build, prompts: int, decoding: Decoding, *, batch_size: int) -> RunShape:
    """The shape of all runs of so many prompts, `batch_size` or fewer in a batch.

    Over stages, with early exits, prompts that fit into one batch stay one, so that no token waits for another batch's
    turn; without, they are spread over as many batches as there are stages.
    """
    early = len(decoding.exits.exits(build.outline.num_layers)) > 1
    microbatches = min(stages_of(build.mesh), -(-prompts // batch_size) if early else prompts)
    rows = -(-min(prompts, microbatches * batch_size) // microbatches)
    height = min(batch_size, batch_height(rows))
    return RunShape(even(height, build.mesh), microbatches, height * microbatches)


def begin_run(build: Build, params: Any, ids: Sequence[np.ndarray], rows: Sequence[int], decoding: Decoding,
              shape: RunShape, *, context: int, seed: int, stop_ids: tuple[int, ...]) -> Generation:
    """A run of the prompts number `rows` of `ids`, and of idle rows, so that it has the shape.

    Settings with an entry per prompt follow their prompts, which draw from stream seed + number; an idle row repeats
    the first one's. context: positions of a row at most.
    """
    idle = shape.height * shape.microbatches - len(rows)
    limits = [min(decoding.max_new_tokens, context - len(ids[i])) for i in rows] + [0] * idle
    rows = [*rows, *[rows[0]] * idle]
    settings = dict(limits=limits, seeds=[seed + i for i in rows], stop_ids=stop_ids)
    prompts, decoding = [ids[i] for i in rows], decoding.take_rows(rows)
    if stages_of(build.mesh) > 1:
        return StagedGeneration(build, params, prompts, decoding, microbatches=shape.microbatches, **settings)
    return Generation(build, params, prompts, decoding, **settings)
