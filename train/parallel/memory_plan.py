"""What training takes on each device, before there is any device: the plan that `Sharding` makes, in bytes.

Everything here follows from shapes alone (`jax.eval_shape`), so the plan of 70B parameters on 64
devices takes a second on a laptop.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sled.models.sharding.sharding import LARGE, RULES, Sharding
from sled.models.stored import abstract_stacked
from sled.train.objective.exit_heads import partition
from sled.train.recipes import ALL, HEADS


@dataclasses.dataclass(frozen=True)
class Share:
    """One parameter and its optimiser state, in bytes on each device.

    copies: how many devices hold the same part of it. spare: of these, how many the data axis does not account for;
    1 where fsdp and tensor both split it.
    """

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    copies: int
    spare: int
    weights: int
    optimizer: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The share of each parameter. In bytes on each device: `gradients`, and `other`, optimiser state of none of them.

    `undivided` are axes that stay whole because they do not divide, with the reason.
    """

    mesh: dict[str, int]
    shares: list[Share]
    gradients: int
    other: int
    undivided: dict[str, str]

    @property
    def weights(self) -> int:
        """Bytes of weights on each device."""
        return sum(share.weights for share in self.shares)

    @property
    def optimizer(self) -> int:
        """Bytes of optimiser state on each device."""
        return sum(share.optimizer for share in self.shares) + self.other

    def whole(self, least: int = LARGE) -> list[Share]:
        """Parameters that fsdp or tensor leaves whole, although their weights take `least` bytes on each device."""
        return [share for share in self.shares if share.spare > 1 and share.weights >= least]

    def text(self) -> str:
        """A table with a line for each parameter, the sums, and what was left whole."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        head = ("parameter", "shape", "split by", "copies", "weights", "optimizer")
        body = [(share.name, " x ".join(map(str, share.shape)), _spell(share.spec, self.mesh), str(share.copies),
                 _size(share.weights), _size(share.optimizer)) for share in self.shares]
        body.append(("all", "", "", "", _size(self.weights), _size(self.optimizer)))
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [f"On each of {math.prod(self.mesh.values())} devices ({mesh}):"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in (head, *body)]
        lines.append(f"During a step gradients take {_size(self.gradients)} more, and activations come besides.")
        lines += [f"Left whole over {RULES[axis]}: {reason}." for axis, reason in self.undivided.items()]
        return "\n".join(lines)


def plan(sharding: Sharding, optimizer: optax.GradientTransformation, *, dtype=jnp.float32, learns: str = ALL) -> Plan:
    """Bytes on each device of the weights in `dtype` and of `optimizer`'s state for them. Allocates nothing.

    learns: as in the recipe; for what does not learn there are neither gradients nor optimiser state.
    """
    shapes = nnx.state(abstract_stacked(sharding.config), nnx.Param)
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    own = partition(weights)[0] if learns == HEADS else weights
    state = jax.eval_shape(optimizer.init, own)
    taken = {name: [0, 0, 0] for name in sharding.parameters}
    other = 0
    for kind, tree in enumerate((weights, state, own)):
        shardings = jax.tree.leaves(sharding.shardings(tree))
        for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(tree), shardings, strict=True):
            size = math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            name = sharding.parameter_at(path, leaf.shape)
            if name:
                taken[name][kind] += size
            else:
                other += size
    return Plan(dict(sharding.mesh.shape), [_share(sharding, name, *taken[name][:2]) for name in taken],
                sum(gradients for *_, gradients in taken.values()), other, sharding.undivided)


def _share(sharding: Sharding, name: str, weights: int, optimizer: int) -> Share:
    shape, spec = sharding.parameters[name]
    parts = math.prod(shape) // math.prod(NamedSharding(sharding.mesh, spec).shard_shape(shape))
    copies = sharding.mesh.size // parts
    return Share(name, shape, spec, copies, copies // sharding.mesh.shape["data"], weights, optimizer)


def _spell(spec: PartitionSpec, mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {mesh[axis]}" if mesh.get(axis, 1) > 1 else "-" for axis in spec)


def _size(count: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1."""
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
