"""The memory of training on each device, before there is any device: the plan that `Sharding` makes, in bytes.

It follows from shapes alone: the plan of 70B parameters on 64 devices takes a second on a laptop.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sled.io import size_in_words
from sled.models.sharding.mesh import spelled
from sled.models.sharding.sharding import RULES, Sharding
from sled.models.stored import abstract_stacked
from sled.train.objective.exit_heads import partition
from sled.train.recipes import ALL, HEADS


@dataclasses.dataclass(frozen=True)
class ParameterBytes:
    """One parameter and its optimiser state, in bytes on each device.

    copies: how many devices hold the same part of it.
    """

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    copies: int
    weights: int
    optimizer: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory of each parameter, and of all: bytes on each device. `other` is optimiser state of no parameter.

    `undivided` are axes that stay whole because they do not divide, with the reason.
    """

    mesh: dict[str, int]
    shares: list[ParameterBytes]
    gradients: int
    other: int
    undivided: dict[str, str]

    @property
    def weights(self) -> int:
        return sum(share.weights for share in self.shares)

    @property
    def optimizer(self) -> int:
        return sum(share.optimizer for share in self.shares) + self.other

    @property
    def state(self) -> int:
        """Weights and optimiser, which a checkpoint holds."""
        return self.weights + self.optimizer

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    def text(self) -> str:
        """A table with a line for each parameter, the sums, and what was left whole."""
        head = ("parameter", "shape", "split by", "copies", "weights", "optimizer")
        body = [(share.name, " x ".join(map(str, share.shape)), _spell(share.spec, self.mesh), str(share.copies),
                 size_in_words(share.weights), size_in_words(share.optimizer)) for share in self.shares]
        body.append(("all", "", "", "", size_in_words(self.weights), size_in_words(self.optimizer)))
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [f"On each of {self.devices} devices ({spelled(self.mesh)}):"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in (head, *body)]
        lines.append(f"During a step gradients take {size_in_words(self.gradients)} more, and activations besides.")
        lines.append(f"Together that is at least {size_in_words(self.state + self.gradients)}.")
        lines += [f"Left whole over {' x '.join(RULES[axis])}: {reason}." if axis != "layers" else
                  f"Layers' weights move between stages at each step: {reason}."
                  for axis, reason in self.undivided.items()]
        return "\n".join(lines)


def memory_plan(sharding: Sharding, optimizer: optax.GradientTransformation, *, trainable: str = ALL) -> MemoryPlan:
    """Bytes on each device of float32 weights and of `optimizer`'s state for them. Allocates nothing.

    trainable: as in the recipe; for what does not learn there are neither gradients nor optimiser state.
    """
    shapes = nnx.state(abstract_stacked(sharding.config), nnx.Param)
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)
    own = partition(weights)[0] if trainable == HEADS else weights
    of_weights, of_state, of_gradients = (
        _taken(sharding, tree) for tree in (weights, jax.eval_shape(optimizer.init, own), own))
    shares = []
    for name, (shape, spec) in sharding.parameters.items():
        parts = math.prod(shape) // math.prod(NamedSharding(sharding.mesh, spec).shard_shape(shape))
        shares.append(ParameterBytes(name, shape, spec, sharding.mesh.size // parts, of_weights[name], of_state[name]))
    return MemoryPlan(dict(sharding.mesh.shape), shares, of_gradients.total(), of_state[None], sharding.undivided)


def _taken(sharding: Sharding, tree) -> Counter[str | None]:
    """Bytes of the arrays of each parameter, and under None of those of none."""
    taken = Counter()
    places = jax.tree.leaves(sharding.shardings(tree))
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(tree), places, strict=True):
        name = sharding.parameter_at(path, leaf.shape)
        taken[name] += math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return taken


def _spell(spec: PartitionSpec, mesh: dict[str, int]) -> str:
    def one(axes) -> str:
        return spelled({axis: mesh[axis] for axis in ([axes] if isinstance(axes, str) else axes or ())}) or "-"

    return ", ".join(map(one, spec))
