"""Memory: what decoding a batch would take, told before any of it is, and one error for where there was too little."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from sled.decoding.network import Build, Network
from sled.decoding.readout import Readout
from sled.errors import OutOfMemoryError, SledError
from sled.io import first_line, size_in_words

LOWER = "lower batch_size, slots, capacity, max_new_tokens, max_draft or max_deferred, or the length of the prompts"
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's own bound


def refuse_too_large(build: Build, window: int, buffers: int, block_heads: tuple[int, ...], *, rows: int,
                     capacity: int, at_once: int | None = None) -> None:
    """Raises OutOfMemoryError where `rows` rows of `capacity` positions are more than a device's whole memory.

    at_once: how many of them the layers run on at a time, their K/V copied; None: all.
    Counted as `BatchBytes` are: what else a step takes comes besides, so that what is let pass may still fail.
    """
    taken, memory = _bytes(build, window, buffers, block_heads, rows, capacity), device_memory()
    needed = sum(taken) if at_once in (None, rows) else taken.kv + sum(taken) * at_once // rows
    if memory is not None and needed > memory:
        raise OutOfMemoryError(f"{rows:,} rows of {capacity:,} positions, {window:,} of which may wait for deeper "
                               f"layers, would take at least {size_in_words(needed)}, but the device has "
                               f"{size_in_words(memory)}; {LOWER}")


class BatchBytes(NamedTuple):
    """What a batch takes of each device, in bytes, as shapes tell it.

    kv: keys and values, those of block heads among them. waiting: hidden states of tokens that wait for deeper layers.
    scores: of the attention of one layer, for as many tokens.
    """

    kv: int
    waiting: int
    scores: int


def batch_bytes(network: Network, ways: Mapping[str, int], *, window: int, buffers: int, block_heads: tuple[int, ...],
                rows: int, capacity: int) -> BatchBytes:
    """ways: how many ways the axes of the mesh split; empty for one device. window: tokens of a row that may wait, each
    with its hidden states after `buffers` layers."""
    caches = jax.tree.leaves(jax.eval_shape(lambda: (
        network.empty_caches(1, capacity, window - 1),
        Readout(network).empty_head_caches(block_heads, 1, capacity, window - 1))))
    groups, tensor, heads = ways.get("data", 1), ways.get("tensor", 1), caches[0].shape[1]
    own, parts = rows // groups if rows % groups == 0 else rows, tensor if heads % tensor == 0 else 1
    width = network.shared_head.w_VD.shape[1]
    kv = own * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in caches)
    return BatchBytes(kv // parts // ways.get("stage", 1),
                      own * buffers * window * width * caches[0].dtype.itemsize,
                      own * heads // parts * window * capacity * 4)


@functools.lru_cache(maxsize=256)
def _bytes(build: Build, window: int, buffers: int, block_heads: tuple[int, ...], rows: int,
           capacity: int) -> BatchBytes:
    return batch_bytes(build.outline, {} if build.mesh is None else build.mesh.shape, window=window, buffers=buffers,
                       block_heads=block_heads, rows=rows, capacity=capacity)


@functools.cache  # files are read, and every call of a user asks
def device_memory() -> int | None:
    """Bytes of the default device's memory, or of the host's where that is the device; None where nothing tells, as on
    Windows."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    bounds = [file.read_text().strip() for file in map(Path, _CGROUPS) if file.is_file()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(int, filter(str.isdecimal, bounds))])


@contextlib.contextmanager
def naming_shortage(what: str, remedy: str = LOWER) -> Iterator[None]:
    """Makes an OutOfMemoryError of what jax and NumPy raise where memory does not suffice; a decorator, too."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as reason:
        if isinstance(reason, SledError) or not is_shortage(reason):
            raise
        raise OutOfMemoryError(f"there was too little memory for {what} ({first_line(reason)}); {remedy}") from None


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
