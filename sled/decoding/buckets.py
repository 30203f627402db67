"""Sizes that arrays are rounded up to, so that nearby lengths share one compiled program."""

from __future__ import annotations


def bucket(n: int, *, least: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, 192, ... that holds `n`: at most half is padding."""
    size = least
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
