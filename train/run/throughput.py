"""The speed of training: tokens per second, and the share of the devices' peak that the model's arithmetic makes up.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) counts the arithmetic that the model needs, not what was
executed: recomputed activations and recomputed logits count once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from sled.models.config import DecoderConfig

# Peak bfloat16 multiply-add rate of one device, dense (without sparsity), in FLOP/s, by JAX's name of the device.
# TPU: cloud.google.com/tpu/docs, the page of each version. NVIDIA: the data sheets of A100, H100 and H200, which give
# twice these figures for H100 and H200, with sparsity. The longest name that a device's name begins with holds; None
# is for devices that share a name with one of these, but not its peak.
PEAKS = {
    "TPU v4": 275e12, "TPU v4 lite": None,
    "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989.4e12, "NVIDIA H100 PCIe": 756.5e12, "NVIDIA H100 NVL": None,
    "NVIDIA H200": 989.4e12, "NVIDIA H200 NVL": None,
}


class Flops(NamedTuple):
    """Arithmetic of training on one token, in FLOPs (a multiply-add is two), forward and backward."""

    model: float  # 6 N + 12 L N H T: what PaLM's formula counts for a model with one loss, at its last layer
    exit: float  # an earlier layer's loss: another projection onto the vocabulary, 6 D V, after its head if it has one


def flops_per_token(config: DecoderConfig, parameters: int, heads: int, length: int) -> Flops:
    """Arithmetic per token of a decoder in training on rows of `length` tokens.

    parameters: all of the model's but those of its exit heads, of which there are `heads`. An embedding table that is
    not the head as well, or of learned positions, is looked up, not multiplied, and is left out. The attention term is
    PaLM's 12 L N H T, for which a causal mask saves nothing; a layer with a sliding window counts the window where that
    is shorter. Of a mixture of experts those that a token goes through count.
    Layers that layer dropout skips are counted as if they ran.
    """
    table = 0 if config.tied_head else config.vocab_size * config.width
    table += config.max_positions * config.width if config.rope is None else 0
    reach = sum(min(length, window or length) for window in config.windows)
    projection = config.vocab_size * config.width
    own = 0.0 if config.exit_heads is None else heads / len(config.exit_heads.layers)
    if own and not config.exit_heads.tied:
        own -= projection  # it is counted below
    if experts := config.experts:
        one = 3 * config.width * experts.width + config.mlp_bias * (2 * experts.width + config.width)
        parameters -= config.num_layers * (experts.count - experts.chosen) * one
    return Flops(model=6.0 * (parameters - table) + 12.0 * config.num_heads * config.head_dim * reach,
                 exit=6.0 * (projection + own))


def peak(device) -> float | None:
    """The device's peak in bfloat16 FLOP/s, or None where it is not known."""
    names = [name for name in PEAKS if device.device_kind.startswith(name)]
    return PEAKS[max(names, key=len)] if names else None


class Throughput:
    """A meter of tokens per second.

    flops: arithmetic per token, for the utilisation. devices: those that train (None: all).
    clock: seconds, ascending.
    """

    def __init__(self, flops: Flops | None = None, *, devices: Sequence[jax.Device] | None = None,
                 clock: Callable[[], float] = time.perf_counter):
        peaks = [peak(device) for device in (jax.devices() if devices is None else devices)]
        self._flops, self._peak = flops, None if None in peaks else sum(peaks)
        self._clock = clock
        self._tokens, self._since = 0, clock()

    def count(self, tokens: int) -> None:
        """Count the tokens of a step, of all devices together."""
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began

    def read(self, exits: Callable[[], float] = lambda: 0.0) -> dict[str, float]:
        """`tokens_per_second` since the last reading and, where the devices' peak is known, utilisations from 0 to 1.

        `mfu` counts the model alone and compares with other trainers; `mfu_with_exits` adds the losses of earlier
        layers, of which there were `exits()` per step, on average.
        Steps run asynchronously: fetch a result of the last step first. The first reading includes compilation.
        """
        now = self._clock()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        values = {"tokens_per_second": rate}
        if self._flops is not None and self._peak is not None:
            values["mfu"] = rate * self._flops.model / self._peak
            values["mfu_with_exits"] = rate * (self._flops.model + self._flops.exit * exits()) / self._peak
        return values
