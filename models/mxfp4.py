"""Matrices in MXFP4 (Open Compute Project, Microscaling Formats 1.0): 32 numbers of four bits share a power of two.

gpt-oss's experts are published so: for the matrices [X, in, out] of a name there are `NAME_blocks`, [X, out, in / 32,
16] bytes of two numbers each, the lower half first, and `NAME_scales`, [X, out, in / 32] exponents, 127 above their
value.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sled.errors import CheckpointError

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK, BIAS = 32, 127
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
NUMBERS = np.concatenate([MAGNITUDES, -MAGNITUDES])  # by their four bits
PAIRS = np.stack([np.tile(NUMBERS, 16), np.repeat(NUMBERS, 16)], axis=-1)  # by a byte, [256, 2]


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 numbers, [..., 32 G], of blocks [..., G, 16] and scales [..., G]; all of them exact in bfloat16."""
    numbers = PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):  # told by name where weights are read
        numbers *= np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)[..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


def stepped(stored: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a stored tensor. Files are read without steps; matrices in four bits take them, to dequantise less."""
    if isinstance(stored, Packed):
        return stored[index]
    whole = tuple(slice(one.start, one.stop) for one in index)
    return stored[whole][tuple(slice(None, None, one.step) for one in index)]


class Packed:
    """The matrices [X, in, out], bfloat16, of one name, read as a stored tensor is."""

    def __init__(self, blocks: Any, scales: Any):
        self._blocks, self._scales = blocks, scales

    def get_shape(self) -> list[int]:
        experts, columns, groups, _ = self._blocks.get_shape()
        return [experts, groups * BLOCK, columns]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, inside, columns = index
        begin, end, _ = inside.indices(self.get_shape()[1])
        groups = slice(begin // BLOCK, -(-end // BLOCK))
        blocks, scales = (stepped(stored, (experts, columns, groups)) for stored in (self._blocks, self._scales))
        found = np.empty((*scales.shape[:2], end - begin), jnp.bfloat16)
        for expert, pair in enumerate(zip(blocks, scales, strict=True)):  # in float32 one at a time
            found[expert] = dequantised(*pair)[:, begin - groups.start * BLOCK:][:, :end - begin]
        return found.swapaxes(1, 2)


def unpacked(stored: dict[str, Any]) -> dict[str, Any]:
    """Stored tensors by name, blocks and scales that belong together being one tensor. Raises CheckpointError
    where they do not fit each other."""
    packed = [name.removesuffix(BLOCKS) for name in stored
              if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in stored]
    pairs = {name: [stored[name + end] for end in (BLOCKS, SCALES)] for name in packed}
    for name, (blocks, scales) in pairs.items():
        shape, of_scales = blocks.get_shape(), scales.get_shape()
        if {blocks.get_dtype(), scales.get_dtype()} != {"U8"} or len(shape) != 4 or shape != [*of_scales, BLOCK // 2]:
            raise CheckpointError(f"{name}{BLOCKS} of shape {shape} and {name}{SCALES} of shape {of_scales} are no "
                                  "matrices in MXFP4; use the checkpoint before quantisation")
    left = {name: tensor for name, tensor in stored.items()
            if not name.endswith((BLOCKS, SCALES)) or name.removesuffix(BLOCKS).removesuffix(SCALES) not in pairs}
    return left | {name: Packed(*pair) for name, pair in pairs.items()}
