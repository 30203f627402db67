"""The whole training state in one file, written so that a kill at any moment loses nothing older."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np

from sled.errors import CheckpointError


def save_state(state, path: str | Path) -> None:
    """Write the leaves of a pytree as an .npz; an older file is replaced only once this one is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, *[np.asarray(leaf) for leaf in jax.tree.leaves(state)])
    os.replace(partial, path)


def restore_state(like, path: str | Path):
    """The pytree saved at `path`, in the structure of `like`. Raises CheckpointError on a mismatch."""
    leaves, tree = jax.tree.flatten(like)
    with np.load(path) as file:
        saved = [file[f"arr_{i}"] for i in range(len(file.files))]
    shapes = [[np.shape(leaf) for leaf in side] for side in (leaves, saved)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{path} holds the state of another model or optimiser; "
                              "give the settings it was made with, or another folder")
    return jax.tree.unflatten(tree, [jax.numpy.asarray(leaf) for leaf in saved])
