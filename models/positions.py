"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them over longer texts.

The ways are those of transformers' modeling_rope_utils.py, by the names that it has for them in a `config.json`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from sled.errors import ConfigError


class Scaling:
    """How the frequencies of rotary positions are changed."""

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies [R/2] that are turned with, of those that theta gives: radians a position, float64."""
        return frequency

    def amplitude(self) -> float:
        """What every cosine and sine is multiplied with, so that attention stays as sharp over longer texts."""
        return 1.0

    def context(self, max_positions: int) -> int:
        """How many positions a text may have, of a model that says `max_positions`."""
        return max_positions

    def beyond(self) -> str:
        """What to know where a text is to have more, or nothing."""
        return ""


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023)."""

    factor: float

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling(Scaling):
    """Dynamic NTK: nothing is changed up to the model's `max_positions`, which is as far as a text may go here.

    Beyond them transformers raises theta by `factor` and by the length of each call, so that what a text begins with
    would depend on how it ends.
    """

    factor: float

    def beyond(self) -> str:
        return "beyond them its dynamic rotary scaling would change what a text begins with by how long it gets"


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between.

    Wavelengths are in tokens; the ramp lies between `original_positions / low_freq_factor` and
    `original_positions / high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_positions * frequency / (2 * np.pi)  # over the original context
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): pairs that turn often over the original context keep their frequency,
    those that turn seldom have it divided by `factor`, with a ramp from pair to pair between.

    The ramp goes from the pair that turns `beta_fast` times over `original_positions` to the one that turns `beta_slow`
    times; truncate: from and to whole numbers of pairs around them. attention_factor: None is 0.1 ln(factor) + 1.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        width = 2 * len(frequency)
        low, high = (width * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
                     for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(len(frequency)) - low) / (high - low or 0.001), 0, 1)
        return frequency * (1 - ramp + ramp / self.factor)

    def amplitude(self) -> float:
        return yarn_amplitude(self.factor) if self.attention_factor is None else self.attention_factor

    def context(self, max_positions: int) -> int:
        """Files whose owner has added YaRN by hand keep the `max_positions` from before."""
        return max(max_positions, int(self.factor * self.original_positions))


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """0.1 `weight` ln(factor) + 1, and 1 where nothing is stretched; two weights make one of YaRN's other forms."""
    return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753), as Phi-3 has it: a divisor for each frequency.

    transformers divides by `short_factor` in a call whose text has up to `original_positions` and by `long_factor` in
    one with more. Here no token depends on what comes after it, so `long_context` decides, for all texts: without it
    they have `original_positions` at most.

    factor: how many times `original_positions` the model was made for. attention_factor: None is
    (1 + ln(factor) / ln(original_positions)) ** 0.5.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_positions: int
    attention_factor: float | None = None
    long_context: bool = False

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        return frequency / np.asarray(self.long_factor if self.long_context else self.short_factor)

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.original_positions))

    def context(self, max_positions: int) -> int:
        return max_positions if self.long_context else min(self.original_positions, max_positions)

    def beyond(self) -> str:
        return "" if self.long_context else (
            "for more load it with long_context=True (--long-context), which computes all positions otherwise")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: pair i of a head turns by theta^(-2i / R) radians a position, before `scaling`.

    R is the part of a head that turns: `share` of its width H, the first of it.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None
    share: float = 1.0

    def width(self, head_dim: int) -> int:
        """R."""
        return int(head_dim * self.share)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each of the R/2 pairs, scaling applied. float64 [R/2]."""
        width = self.width(head_dim)
        frequency = self.theta ** (-np.arange(0, width, 2) / width)
        return frequency if self.scaling is None else self.scaling(frequency, self.theta)

    def amplitude(self) -> float:
        """What every cosine and sine is multiplied with."""
        return 1.0 if self.scaling is None else self.scaling.amplitude()

    def context(self, max_positions: int) -> int:
        """How many positions a text may have, of a model that says `max_positions`."""
        return max_positions if self.scaling is None else self.scaling.context(max_positions)

    def beyond(self) -> str:
        """What to know where a text is to have more, or nothing."""
        return "" if self.scaling is None else self.scaling.beyond()

    def check(self, head_dim: int) -> None:
        """Raises ConfigError where heads of this width cannot turn so."""
        width = self.width(head_dim)
        if width % 2 or not 0 < width <= head_dim:
            raise ConfigError(f"{self.share:g} of head_dim {head_dim} is to turn by rotary positions, {width} numbers, "
                              "but they need an even number of at least 2, within the head")
        if isinstance(self.scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.scaling, name))) != width // 2:
                    raise ConfigError(f"{name} of the rotary positions has {count} entries, but {width // 2} pairs "
                                      "turn; correct the file")
