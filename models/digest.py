"""The digest of a model's weights, by which answers, calibrations and exports know what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flax import nnx

from sled.io import add_array
from sled.models.sharding.mesh import gathered


def digest_of_weights(params: nnx.State, shapes: Mapping[tuple, tuple[int, ...]] | None = None) -> str:
    """SHA-256, in hexadecimal, over the name, type, shape and bytes of every parameter, in the names' order.

    Reads all weights once: for a large model, seconds. shapes: to which parameters are cut, by path, where some are
    filled up over a mesh. Of a mesh over several processes all of them call this together.
    """
    total = hashlib.sha256()
    named = {"/".join(map(str, path)): (path, array) for path, array in nnx.to_flat_state(nnx.as_pure(params))}
    for name in sorted(named):
        path, array = named[name]
        here = gathered(array)
        total.update(f"{name} ".encode())
        add_array(total, here if shapes is None else here[tuple(map(slice, shapes[path]))])
    return total.hexdigest()
