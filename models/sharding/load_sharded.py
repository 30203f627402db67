"""Hugging Face folders onto a mesh, without any device or process ever holding the whole model.

The way back is `sled.models.save_folder`, which takes a decoder on a mesh as any other.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sled.models.decoder import STACKED, Decoder
from sled.models.sharding.sharding import Sharding, is_separate
from sled.models.stored import StoredWeights, abstract, abstract_stacked, open_weights, progress


def load_onto(path: str | Path, mesh: jax.sharding.Mesh, *, dtype=None, stacked: bool = True) -> Decoder:
    """The model in a Hugging Face folder, every parameter where `Sharding(config, mesh)` puts it.

    Every process calls this, and reads what its own devices hold: of each tensor the rows and columns that some
    device of it needs, once. `dtype` None keeps every weight as it is stored. stacked: the form, for training, else the
    separate one, for decoding.
    Raises what `sled.models.load_folder` and `Sharding` raise; a process checks the values that it reads.
    """
    with open_weights(path) as stored:
        sharding = Sharding(stored.config, mesh, decoding=not stacked)
        graph, state = nnx.split((abstract_stacked if stacked else abstract)(stored.config))
        slots = dict(nnx.to_flat_state(state))
        with progress("Loading", sum(stored.sizes.values())) as bar:
            for at, slot in slots.items():
                slots[at] = slot.replace(read_onto(stored, at, *sharding.slot(at), dtype))
                bar.update(sum(stored.sizes[one] for one in _separate(at, slot.shape)))
    return nnx.merge(graph, nnx.from_flat_state(slots))


def read_onto(stored: StoredWeights, at: tuple, shape: tuple[int, ...], where: jax.sharding.Sharding,
              dtype) -> jax.Array:
    """One parameter in either form, filled up with zeros to this shape; parts that several devices hold are read once.
    """

    @functools.cache
    def part(*bounds: tuple[int, int, int]) -> np.ndarray:
        return _read_part(stored, at, shape, tuple(slice(*bound) for bound in bounds), dtype)

    return jax.make_array_from_callback(
        shape, where, lambda index: part(*(one.indices(size) for one, size in zip(index, shape, strict=True))))


def _read_part(stored: StoredWeights, at: tuple, shape: tuple[int, ...], index: tuple[slice, ...],
               dtype) -> np.ndarray:
    if at[0] in STACKED and not is_separate(at):
        which, *inside = index
        parts = _separate(at, shape)[which]
        return np.stack([_read_part(stored, one, shape[1:], tuple(inside), dtype) for one in parts])
    held = stored.shapes[at]
    weight = stored.read(at, dtype, tuple(slice(min(one.start, n), min(one.stop, n))
                                          for one, n in zip(index, held, strict=True)))
    if shape == held:
        return weight
    return np.pad(weight, [(0, one.stop - one.start - n) for one, n in zip(index, weight.shape, strict=True)])


def _separate(at: tuple, shape: tuple[int, ...]) -> list[tuple]:
    """The paths in the separate form of what lies at `at`, with this shape, in either."""
    return [at] if at[0] not in STACKED or is_separate(at) else [(at[0], i, *at[1:]) for i in range(shape[0])]
