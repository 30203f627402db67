"""The sharding of a model: the axis of the mesh that splits each axis of a parameter.

Parameters name their logical axes where they are made (models/layers), `RULES` maps those names to the mesh.
All shardings follow: of weights in either form, of any optax state (its leaves that are shaped like a parameter lie
like that parameter), of batches and activations. The products then run under `jax.jit`, whose
partitioner (GSPMD, arXiv 2105.04663) inserts the exchanges.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sled.errors import SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import STACKED
from sled.models.sharding.mesh import ROWS, spelled
from sled.models.stored import abstract_stacked, plain_path

RULES = {
    "vocab": ("stage", "tensor"),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": (),  # each is split as an MLP is
    "layers": ("stage",),  # scanned over within one
    "exits": (),
    "positions": (),
    "vector": (),  # norms, and biases of what is summed over the tensor axis: too small to split
}
MAY_STAY_WHOLE = ("vocab", "kv_heads", "layers")  # where they do not divide; for the others that is an error
LARGE = 2**24  # bytes: what is no parameter may be this large and still lie whole on every device


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """One axis' part of a PartitionSpec, as specs without pipelines are written."""
    return names if len(names) > 1 else names[0] if names else None


def is_separate(path: tuple) -> bool:
    """Whether a path leads to a parameter of one layer, or of one head, of the separate form."""
    return path[0] in STACKED and isinstance(path[1], int)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The shardings of all arrays of a model of `config` on `mesh`.

    `mesh` has the axes of `sled.models.sharding.mesh.AXES`; an abstract one serves for planning.
    Raises SettingError where width, heads or feed-forward width do not divide over their mesh axis. Vocabulary,
    key/value heads and layers that do not divide stay whole on that axis; `undivided` says which, and why.
    decoding: a vocabulary that does not divide is filled up with rows of zeros to one that does; stages do not split
        it.
    """

    config: DecoderConfig
    mesh: jax.sharding.Mesh | AbstractMesh
    decoding: bool = False

    def __post_init__(self):
        for axis, reason in self.undivided.items():
            if axis not in MAY_STAY_WHOLE:
                raise SettingError(f"{reason}; choose a mesh whose {RULES[axis][-1]} axis divides it")
        if (stages := self.mesh.shape["stage"]) > self.config.num_layers:
            raise SettingError(f"Mesh.stage is {stages}, but the model has {self.config.num_layers} layers; give at "
                               "most as many stages")

    @functools.cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of the mesh that split each logical axis: of those in `RULES` the last that divide it."""
        c = self.config
        counts = {"vocab": self.vocabulary, "width": c.width, "heads": c.num_heads, "kv_heads": c.num_kv_heads,
                  "mlp": math.gcd(c.mlp_width, c.experts.width) if c.experts else c.mlp_width, "layers": c.num_layers}
        found = {}
        for axis, rule in ((axis, self.rule(axis)) for axis in RULES):
            rest = [rule[begin:] for begin in range(len(rule) + 1)]
            names = next(names for names in rest if not names or counts[axis] % self.ways(names) == 0)
            found[axis] = tuple(name for name in names if name != "stage" or self.mesh.shape[name] > 1)
        return found

    @functools.cached_property
    def undivided(self) -> dict[str, str]:
        """Axes that the rules would split further, but that stay whole: name and reason. To be shown."""
        what = {"vocab": (self.vocabulary, "vocabulary entries"), "width": (self.config.width, "columns of width"),
                "heads": (self.config.num_heads, "query heads"),
                "kv_heads": (self.config.num_kv_heads, "key/value heads"),
                "mlp": (self.config.mlp_width, "columns of feed-forward width"),
                "layers": (self.config.num_layers, "layers")}
        left = {axis: spelled({name: self.mesh.shape[name] for name in self.rule(axis) if name not in self.axes[axis]})
                for axis in what}
        return {axis: f"{count} {words} do not divide over {left[axis]}" for axis, (count, words) in what.items()
                if left[axis]}

    def rule(self, axis: str) -> tuple[str, ...]:
        """The axes of the mesh that are to split a logical axis."""
        return tuple(name for name in RULES[axis] if not (self.decoding and axis == "vocab" and name == "stage"))

    def ways(self, names: tuple[str, ...]) -> int:
        """How many ways these axes of the mesh split."""
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def vocabulary(self) -> int:
        """Rows of a table by tokens."""
        ways = self.ways(self.rule("vocab")) if self.decoding else 1
        return -(-self.config.vocab_size // ways) * ways

    @functools.cached_property
    def parameters(self) -> dict[str, tuple[tuple[int, ...], P]]:
        """Shape and partition of every parameter, by its dotted name in the stacked decoder."""
        found = {}
        for path, leaf in nnx.to_flat_state(nnx.state(abstract_stacked(self.config), nnx.Param)):
            axes = (*([STACKED[path[0]]] if path[0] in STACKED else []), *leaf.get_metadata("axes", ()))
            if len(axes) != len(leaf.shape) or not RULES.keys() >= set(axes):
                raise SettingError(f"the parameter {'.'.join(path)} of shape {leaf.shape} has axes {axes}, but must "
                                   f"name each by one of {', '.join(RULES)}; make it with models.layers.parameter")
            shape = tuple(self.vocabulary if axis == "vocab" else n for axis, n in zip(axes, leaf.shape, strict=True))
            split = self._uneven if axes[0] == "layers" and "layers" in self.undivided else self.axes
            found[".".join(path)] = shape, P(*map(_entry, (split[axis] for axis in axes)))
        return found

    @functools.cached_property
    def _uneven(self) -> dict[str, tuple[str, ...]]:
        """As `axes`, for layers that stages do not divide: their weights are split between stages by width instead."""
        both = (*RULES["width"], *RULES["layers"])
        return self.axes | ({"width": both} if self.config.width % self.ways(both) == 0 else {})

    def slot(self, path: tuple) -> tuple[tuple[int, ...], NamedSharding]:
        """Shape and sharding of the parameter at this path of a decoder in either form."""
        one = is_separate(path)
        shape, spec = self.parameters[".".join(map(str, (path[0], *path[1 + one:])))]
        return shape[one:], NamedSharding(self.mesh, P(*spec[one:]))

    def parameter_at(self, path, shape: tuple[int, ...]) -> str | None:
        """The parameter that the leaf at this key path of some pytree belongs to and is shaped like, or None.

        Of the separate form, where layers have numbers, it is the name that all of them have in the stacked one.
        """
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if parts[-1:] == ["value"]:  # inside an nnx.Variable
            parts.pop()
        for start in range(len(parts)):  # the longest name first
            part, *rest = parts[start:]
            one = part in STACKED and rest and rest[0].isdecimal()  # of a list of layers or heads
            name = ".".join([part, *rest[one:]])
            if name in self.parameters:
                return name if shape == self.parameters[name][0][one:] else None
        return None

    def shardings(self, tree):
        """A sharding for every leaf (array or shape) of weights, of an optimiser's state, or of both in one pytree.

        A leaf is a parameter's if its path ends in the parameter's name and it is shaped like it. All others
        (counters, keys, factored moments) lie whole on every device. Raises SettingError for one above `LARGE` bytes.
        """
        def place(path, leaf):
            if name := self.parameter_at(path, leaf.shape):
                spec = self.parameters[name][1]
                return NamedSharding(self.mesh, P(*spec[len(spec) - leaf.ndim:]))  # of one layer without its axis
            if leaf.size * leaf.dtype.itemsize > LARGE:
                raise SettingError(f"{jax.tree_util.keystr(path)} of shape {leaf.shape} is no parameter of this "
                                   f"{self.config.family} decoder, and would lie whole on all {self.mesh.size} "
                                   "devices; make it a parameter with axes of its own, in the model")
            return NamedSharding(self.mesh, P())

        return jax.tree_util.tree_map_with_path(place, tree)

    def filled_up(self, weights):
        """Weights in the separate form, whose tables are filled up to `vocabulary` rows, where they are to lie."""
        def fill(path, x):
            shape, where = self.slot(plain_path(path))
            if x.shape == shape:
                return x
            return jax.jit(lambda x: jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]),
                           out_shardings=where)(x)

        return jax.tree_util.tree_map_with_path(fill, weights)

    def create(self, make: Callable, *args):
        """`make(*args)` with every leaf of the result made where `shardings` wants it, never whole on one device.

        For an optimiser's state: `create(optimizer.init, weights)`.
        """
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make, *args)))(*args)

    @property
    def rows(self) -> NamedSharding:
        """The sharding of everything whose first axis is the batch."""
        return NamedSharding(self.mesh, P(ROWS))

    def local_rows(self, batch: int) -> slice:
        """The rows of a global batch that this process has to supply.

        Raises SettingError where `batch` does not divide over the mesh, or this process' rows are not neighbours.
        """
        groups = math.prod(self.mesh.shape[axis] for axis in ROWS)
        if batch % groups:
            raise SettingError(f"a batch of {batch} rows does not divide over data x fsdp = {groups} groups of devices;"
                               f" take a multiple of {groups}")
        parts = {index[0].indices(batch)[:2] for index in self.rows.addressable_devices_indices_map((batch,)).values()}
        start, stop = min(start for start, _ in parts), max(stop for _, stop in parts)
        if sum(last - first for first, last in parts) != stop - start:
            raise SettingError(f"this process' devices hold rows {sorted(parts)} of the batch, which are not "
                               "neighbours; order the devices by process")
        return slice(start, stop)

    def batch(self, tree, rows: int):
        """Global arrays of `rows` rows from this process' own rows (`local_rows`), split over data and fsdp."""
        own = self.local_rows(rows)

        def assemble(local):
            local = np.asarray(local)
            if local.shape[:1] != (own.stop - own.start,):
                raise SettingError(f"a batch array has shape {local.shape}, but this process supplies rows "
                                   f"{own.start} to {own.stop} of {rows}; give it exactly these")
            return jax.make_array_from_process_local_data(self.rows, local, (rows, *local.shape[1:]))

        return jax.tree.map(assemble, tree)

    def activations(self, h_BTD, *, in_front: int = 0, in_stage: bool = False):
        """Hidden states of the forward pass, held to their place: rows over data and fsdp, all else whole.

        The partitioner might else split them as it splits the weights, and gather activations instead.
        in_front: axes before the rows. in_stage: within a pipeline's stage, whose mesh is the rest.
        """
        mesh = jax.sharding.get_abstract_mesh() if in_stage else self.mesh
        return jax.lax.with_sharding_constraint(h_BTD, NamedSharding(mesh, P(*[None] * in_front, ROWS)))

    def table(self, w_VD):
        """The embedding or the projection, its rows gathered whole over fsdp as both their uses need them.

        The partitioner would else look up columns of all groups' tokens, and replicate the result to put it right.
        """
        return jax.lax.with_sharding_constraint(w_VD, NamedSharding(self.mesh, P(_entry(self.axes["vocab"]), None)))
