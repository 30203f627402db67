"""What decoding takes of each device, before there is any: from a model's configuration alone."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from sled.decoding.groups import even, groups_of
from sled.decoding.memory import batch_bytes
from sled.decoding.state import PREFILL_BLOCK
from sled.models.config import DecoderConfig
from sled.models.sharding.mesh import check_decodes
from sled.models.sharding.sharding import Sharding
from sled.models.sharding.stages import check_stages
from sled.models.stored import abstract

FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """Bytes on each device. rows: of a batch, idle ones included; context: positions of each, prompt and text.

    batches: so many of these, which follow each other through the stages of a pipeline. weights, kv: of the type asked
    for, kv of all batches. prompt: what a block of prompt tokens takes while it runs: attention scores of one layer in
    float32, hidden states and the widest product. logits: of one token of each row, for one layer. undivided: what lies
    whole on devices that might share it, with the reason.
    """

    rows: int
    batches: int
    context: int
    weights: int
    kv: int
    prompt: int
    logits: int
    undivided: dict[str, str]

    @property
    def copied(self) -> int:
        """The K/V of one batch, which every step over stages copies; 0 without."""
        return self.kv // self.batches if self.batches > 1 else 0

    @property
    def total(self) -> int:
        """With what is there at a time: a prompt's block, or logits."""
        return self.weights + self.kv + self.copied + max(self.prompt, self.logits)


def decoding_plan(config: DecoderConfig, mesh: AbstractMesh, *, rows: int, context: int, dtype: str) -> DecodingPlan:
    """For plain decoding of `rows` rows of `context` positions. Early exits and drafts take little more (hidden states
    of tokens that wait, and verified blocks in place of tokens). Allocates nothing.

    Raises SettingError for stages that `check_stages` refuses, and for those with groups of rows.
    """
    check_decodes(mesh)
    stages, per = mesh.shape["stage"], check_stages(config, mesh.shape["stage"])
    sharding, kind = Sharding(config, mesh, decoding=True), jnp.dtype(dtype)
    graph, shapes = nnx.split(abstract(config))
    outline = nnx.merge(graph, jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), kind), leaf.shape), shapes))
    slots = (sharding.slot(path) for path, _ in nnx.to_flat_state(shapes) if path[0] != "layers" or path[1] < per)
    weights = sum(math.prod(where.shard_shape(shape)) for shape, where in slots) * kind.itemsize
    rows, ways, tensor = even(rows, mesh), dict(mesh.shape), mesh.shape["tensor"]
    own = rows // groups_of(mesh) if rows % groups_of(mesh) == 0 else rows
    taken = batch_bytes(outline, ways, window=1, buffers=0, block_heads=(), rows=rows, capacity=context)
    kv = taken.kv * stages  # a stage has its part of each batch's
    block = min(PREFILL_BLOCK, context)
    widest = max(config.mlp_width, config.num_heads * config.head_dim) // tensor
    return DecodingPlan(
        rows=rows, batches=stages, context=context, weights=weights, kv=kv,
        prompt=own * block * FLOAT32 * (config.num_heads // tensor * context + 3 * config.width + 2 * widest),
        logits=own * sharding.vocabulary // sharding.ways(sharding.rule("vocab")) * FLOAT32,
        undivided=sharding.undivided)
