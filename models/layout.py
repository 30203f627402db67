"""Where each parameter lies in a Hugging Face folder: a tensor of its own, a part of one, or one tensor per expert."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sled.models.config import DecoderConfig
from sled.models.families.registry import family_of

ALL = slice(None)


class Stored(NamedTuple):
    """Where one parameter lies.

    names: of its tensor, or of one tensor for each entry of its first axis (each expert has its own).
    shape: of the parameter, without that axis.
    swapped: whether its last two axes are stored the other way round, as most checkpoints' [out, in].
    columns: which columns (entries of the last axis, once those that are swapped are put right) of the tensor are the
        parameter's, with start and step; other parameters have the others. `total`: how many the tensor has.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    swapped: bool
    columns: slice
    total: int
    per_expert: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor as it is stored."""
        shape = (*self.shape[:-1], self.total)
        return (*shape[:-2], shape[-1], shape[-2]) if self.swapped else shape

    def read(self, tensor: Callable[[str, tuple[slice, ...]], np.ndarray], index: Sequence[slice] = ()) -> np.ndarray:
        """The parameter, or the part of it that `index` (a slice for each axis) selects.

        tensor: reads a part of a stored tensor, by name and index, of which one slice may have a step. Where axes are
        swapped, the result is a view of what is read."""
        if not self.per_expert:
            return self._read(self.names[0], tensor, index)
        experts, *inside = index or (ALL,)
        return np.stack([self._read(name, tensor, inside) for name in self.names[experts]])

    def _read(self, name: str, tensor, index: Sequence[slice]) -> np.ndarray:
        *index, last = index or (ALL,) * len(self.shape)
        first, end, _ = last.indices(self.shape[-1])
        start, step = self.columns.start, self.columns.step
        index = [*index, slice(start + first * step, min(start + end * step, self.total), step)]
        if self.swapped:
            index[-2:] = reversed(index[-2:])
        found = tensor(name, tuple(index))
        return found.swapaxes(-1, -2) if self.swapped else found

    def put(self, own: np.ndarray, whole: np.ndarray) -> None:
        """Writes the parameter, or one expert of it, into its place in a tensor as it is to be stored."""
        (whole.swapaxes(-1, -2) if self.swapped else whole)[..., self.columns] = own


def layout(config: DecoderConfig, shapes: Mapping[tuple, tuple[int, ...]]) -> dict[tuple, Stored]:
    """Where every parameter lies, by its path in the separate form. shapes: of the parameters."""
    family, sharing = family_of(config), collections.defaultdict(list)
    for path in shapes:
        sharing[_name(config, path)].append(path)
    order = {name: place for place, name in enumerate(family.modules)}
    found = {}
    for name, paths in sharing.items():
        paths.sort(key=lambda path: order.get(family.key(path), 0))
        total, begin = sum(shapes[path][-1] for path in paths), 0
        for turn, path in enumerate(paths):
            shape, key = shapes[path], family.key(path)
            per_expert = "*" in name
            names = [name.replace("*", str(expert)) for expert in range(shape[0])] if per_expert else [name]
            columns = slice(begin, begin + shape[-1], 1)
            if key in family.interleaved:
                columns = slice(turn, total, len(paths))
            swapped = path[0] == "layers" and path[-1] == "weight" and len(shape) > 1 and key not in family.in_out
            found[path] = Stored(
                tuple(names), shape[1:] if per_expert else shape, swapped, columns, total, per_expert)
            begin += shape[-1]
    return found


def tensor_shapes(tensors: Mapping[tuple, Stored]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that is stored."""
    return {name: where.stored_shape for where in tensors.values() for name in where.names}


def _name(config: DecoderConfig, path: tuple) -> str:
    """The stored name of the parameter at `path`: the family's, or an exit head's by its layer. `*` is the expert."""
    if path[0] == "exit_heads":
        return ".".join(("exit_heads", str(config.exit_heads.layers[path[1]]), *path[2:]))
    return family_of(config).stored_name(path)
