"""A state's arrays under their names, which is how checkpoints hold and compare them.

A name is the path through the pytree, as in `weights/layers/mlp/up/weight/value`. Typed random keys stand as their
data, which is all that is stored of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sled.errors import SettingError


def named(tree) -> dict[str, jax.Array]:
    """The leaves of a pytree by name: arrays, or whatever else has a shape and a type. Raises SettingError for others.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise SettingError(f"the state's {name} is {leaf!r}, but only arrays are saved with it; make it a jax "
                               "array, or put it into the host state")
        found[name] = _plain(leaf)
    return found


def rebuilt(like, arrays: Mapping[str, jax.Array]):
    """The pytree of `like` with the arrays of these names; typed keys are keys again."""
    leaves, tree = jax.tree.flatten(like)
    plain = (arrays[name] for name in named(like))
    return jax.tree.unflatten(tree, [
        jax.random.wrap_key_data(array, impl=_implementation(leaf)) if _is_key(leaf) else array
        for leaf, array in zip(leaves, plain, strict=True)])


def targets(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]:
    """Shape, type and sharding with which each array is to come back, and the sharding of what is whole everywhere.

    What has no sharding is for the default device. Where some arrays lie on a mesh, the rest, such as a step count
    that was never placed, comes back whole on each of its devices, as one jitted function takes them together.
    """
    given = {name: getattr(leaf, "sharding", None) for name, leaf in arrays.items()}
    widest = max((sharding for sharding in given.values() if sharding is not None),
                 key=lambda sharding: len(sharding.device_set),
                 default=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    whole = NamedSharding(widest.mesh, PartitionSpec()) if isinstance(widest, NamedSharding) else widest
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=given[name] if given[name] is not None and
                                       given[name].device_set == whole.device_set else whole)
            for name, leaf in arrays.items()}, whole


def mismatch(there: Mapping[str, jax.ShapeDtypeStruct], here: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """The first few differences of two sets of named arrays, in words; empty where they agree."""
    words = []
    for name in dict.fromkeys([*here, *there]):
        if name not in there or name not in here:
            words.append(f"{name} is only {'here' if name in here else 'there'}")
        elif (then := _kind(there[name])) != (now := _kind(here[name])):
            words.append(f"{name} is {then} there and {now} here")
    more = [f"and {len(words) - 3} more"] if len(words) > 3 else []
    return ", ".join(words[:3] + more)


def checksums(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A checksum per array [number of arrays], uint32, in the order of the names; the same on every mesh.

    The sum over an array's words, each times an odd number that its place gives: one changed word always shows, since
    odd numbers have inverses modulo 2^32. Orbax checks its own files' headers so, but not the arrays' values.
    One array after the other: on a CPU each sum takes as many bytes again as its array.
    """
    return jax.jit(jnp.stack)([_checksum(arrays[name]).block_until_ready() for name in sorted(arrays)])


@jax.jit
def _checksum(array) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    width = min(4, array.dtype.itemsize)
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _plain(leaf):
    """A key's data in its place, abstract where the key is."""
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(key):
    """The implementation of a random key, which may be abstract: then only a trace knows it."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _kind(leaf) -> str:
    return f"{jnp.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"
