"""Rows of a batch over the groups of a mesh's devices: every group decodes its own rows, in a loop of its own.

Along the mesh's `data` axis a program is a map over groups (`jax.shard_map`): nothing passes between them, so that no
group waits for the rows of another, and each takes as many steps as its own rows need. Within a group the partitioner
splits heads, feed-forward width and vocabulary over `tensor`, by where weights and K/V lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sled.errors import SettingError
from sled.settings.per_row import by_row

GROUPS = "data"


def groups_of(mesh: jax.sharding.Mesh | None) -> int:
    """How many groups of devices decode rows of their own."""
    return 1 if mesh is None else mesh.shape[GROUPS]


def stages_of(mesh: jax.sharding.Mesh | None) -> int:
    """Over how many stages of a pipeline the layers lie."""
    return 1 if mesh is None else mesh.shape["stage"]


def even(rows: int, mesh: jax.sharding.Mesh | None) -> int:
    """The number of rows, idle ones included, with which every group has as many; one row alone all groups run."""
    groups = groups_of(mesh)
    return rows if rows == 1 else -(-rows // groups) * groups


def over_groups(function: Callable, *, rows: Collection[str], settings: Collection[str], static: Collection[str]):
    """`function`, each group of the mesh of its argument `build` running it on its own rows.

    rows: names of arguments whose arrays have rows in front, as the results have; settings: of settings that may have
        an entry per row; static: of those that are no arrays. All others every group gets whole. Rows that the groups
        do not divide are whole too: every group then runs them all.
    """
    signature = inspect.signature(function)

    def mapped(*args, **named):
        given = signature.bind(*args, **named).arguments
        mesh = given["build"].mesh
        if mesh is None:
            return function(**given)
        if (stages := stages_of(mesh)) > 1:
            raise SettingError(f"the model lies on {stages} stages of a pipeline, over which it generates texts "
                               "without drafts; for all else load it over tensor and data, or on one device")
        heights = {leaf.shape[0] for name in rows for leaf in jax.tree.leaves(given[name])}
        split = P(GROUPS) if heights and not any(height % groups_of(mesh) for height in heights) else P()
        fixed = {name: value for name, value in given.items() if name in static}
        traced = {name: value for name, value in given.items() if name not in static}
        specs = {name: split if name in rows else by_row(value, split, P()) if name in settings else P()
                 for name, value in traced.items()}
        run = jax.shard_map(lambda traced: function(**fixed, **traced), mesh=mesh, in_specs=(specs,), out_specs=split,
                            axis_names={GROUPS}, check_vma=False)
        return run(traced)

    return mapped


def placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same arrays; over several processes those of the host, which all have alike, whole on each device."""
    if not mesh.is_multi_process:
        return tree

    def place(x):
        if isinstance(x, jax.Array):
            return x
        here = np.asarray(x)
        return jax.make_array_from_callback(here.shape, NamedSharding(mesh, P()), lambda index: here[index])

    return jax.tree.map(place, tree)


def fetched(tree: Any) -> Any:
    """Arrays on this host. Of a mesh over several processes all of them call this together, with arrays of the mesh.
    """
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)):
        return jax.device_get(tree)
    return process_allgather(tree, tiled=True)
