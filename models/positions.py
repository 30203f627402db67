"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them over longer texts."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023)."""

    factor: float

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between.

    Wavelengths are in tokens; the ramp lies between `original_positions / low_freq_factor` and
    `original_positions / high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        turns = self.original_positions * frequency / (2 * np.pi)  # over the original context
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: pair i of a head turns by theta^(-2i / H) radians a position, before `scaling`."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each of the H/2 pairs, scaling applied. float64 [H/2]."""
        frequency = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        return frequency if self.scaling is None else self.scaling(frequency)
