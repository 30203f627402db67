"""The digest of a model's weights, by which answers, calibrations and exports know what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather

from sled.io import add_array


def digest_of_weights(params: nnx.State, shapes: Mapping[tuple, tuple[int, ...]] | None = None) -> str:
    """SHA-256, in hexadecimal, over the name, type, shape and bytes of every parameter, in the names' order.

    Reads all weights once: for a large model, seconds. shapes: to which parameters are cut, by path, where some are
    filled up over a mesh. Of a mesh over several processes all of them call this together.
    """
    total = hashlib.sha256()
    named = {"/".join(map(str, path)): (path, array) for path, array in nnx.to_flat_state(nnx.as_pure(params))}
    for name in sorted(named):
        path, array = named[name]
        here = process_allgather(array, tiled=True) if is_spread(array) else np.asarray(array)
        total.update(f"{name} ".encode())
        add_array(total, here if shapes is None else here[tuple(map(slice, shapes[path]))])
    return total.hexdigest()


def is_spread(array) -> bool:
    """Whether an array lies on devices of other processes, too."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable
