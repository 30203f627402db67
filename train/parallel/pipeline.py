"""A pipeline of stages, each of which holds some neighbouring layers and hands its output to the next.

A batch is cut into microbatches, which follow each other: while a stage works on one, the stage below works on the next
(GPipe, arXiv 1811.06965). Stages are the mesh's axis `stage`; a turn is a step of a scan, handing over a `ppermute`.
The backward pass, which differentiation makes of them, is the pipeline the other way round. Hidden states of exits stay
with the stage that holds the exit (EE-LLM, arXiv 2312.04916, section 3.1): nothing travels that the next stage does not
need.

Axes: S stages, M microbatches, b rows of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sled.errors import SettingError

STAGE = "stage"
PER_STAGE = 4  # microbatches to aim at: with so many a fifth of the turns, or less, is a bubble


def bubble(stages: int, microbatches: int, layers: int) -> float:
    """The share of the stages' work that is for nothing: (S - 1) / (M + S - 1), and more where the stages do not divide
    the layers, as the last ones then run padding in place of some."""
    turns = -(-layers // stages) * stages * (microbatches + stages - 1)
    return 1 - layers * microbatches / turns


def layers_of_stages(stages: int, layers: int) -> list[int]:
    """How many layers each stage has."""
    most = -(-layers // stages)
    return [min(max(layers - most * stage, 0), most) for stage in range(stages)]


def check_microbatches(asked: int | None, rows: int, stages: int) -> int:
    """How many to cut the `rows` rows of each group of devices into: so many, or as many as divide them, up to
    `PER_STAGE` a stage. Raises SettingError where those asked for do not divide them."""
    if asked is not None and stages == 1:
        raise SettingError(f"microbatches is {asked}, but there is no pipeline, which alone has some; leave it out, or "
                           "give the mesh stages (--pipeline-parallel)")
    if asked is None:
        return next(count for count in range(min(rows, PER_STAGE * stages), 0, -1) if rows % count == 0)
    if rows % asked:
        raise SettingError(f"microbatches is {asked}, which does not divide the {rows} rows that each group of devices "
                           "has of a batch; give a divisor")
    return asked


def pipeline(run_stage: Callable[[Any, jax.Array, Any, jax.Array], tuple[jax.Array, Any]], mesh: jax.sharding.Mesh,
             stacked: Any, h_MbTD: jax.Array, rows_M: Any) -> Any:
    """What every stage gives beside its output, for each microbatch: arrays [S, M, ...].

    run_stage(layers, h_bTD, rows, stage) -> (h_bTD, given): a stage's layers over a microbatch; stage is its number.
    stacked: arrays with the layers in front, as many for each stage. rows_M: what else is read of a microbatch, with
        these in front.
    """
    stages, count = mesh.shape[STAGE], h_MbTD.shape[0]

    def on_stage(layers, h_MbTD, rows_M):
        stage = jax.lax.axis_index(STAGE)

        def turn(handed_bTD, t):
            # Before its first microbatch and after its last a stage runs on what nobody reads.
            now = jnp.clip(t - stage, 0, count - 1)
            h_bTD = jnp.where(stage == 0, h_MbTD[jnp.clip(t, 0, count - 1)], handed_bTD)
            h_bTD, given = run_stage(layers, h_bTD, jax.tree.map(lambda x: x[now], rows_M), stage)
            handed = jax.lax.ppermute(h_bTD, STAGE, [(s, s + 1) for s in range(stages - 1)])
            return handed, given

        _, given_t = jax.lax.scan(turn, jnp.zeros_like(h_MbTD[0]), jnp.arange(count + stages - 1))
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, stage, count)[None], given_t)

    return jax.shard_map(on_stage, mesh=mesh, in_specs=(P(STAGE), P(), P()), out_specs=P(STAGE), axis_names={STAGE},
                         check_vma=False)(stacked, h_MbTD, rows_M)
