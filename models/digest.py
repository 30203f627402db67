"""The digest of a model's weights, by which answers, calibrations and exports know what they belong to."""

from __future__ import annotations

import hashlib

import numpy as np
from flax import nnx

from sled.io import add_array


def digest_of_weights(params: nnx.State) -> str:
    """SHA-256, in hexadecimal, over the name, type, shape and bytes of every parameter, in the names' order.

    Reads all weights once: for a large model, seconds.
    """
    total = hashlib.sha256()
    named = {"/".join(map(str, path)): array for path, array in nnx.to_flat_state(nnx.as_pure(params))}
    for name in sorted(named):
        total.update(f"{name} ".encode())
        add_array(total, np.asarray(named[name]))
    return total.hexdigest()
