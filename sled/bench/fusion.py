"""The cost of a fused SLED step, against plain decoding, the floor, and the released algorithm.

The floor is the projection of every candidate layer, which no method that looks at all layers can avoid.
Peak memory is measured in fresh processes.
"""

import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sled.bench.report import BenchReport, column
from sled.fusion import SLED, SharedHead, default_tile
from sled.settings.rules import Whole
from sled.timing import interleave

SIZES = ((1024, 32_000), (2048, 128_256))
LAYERS, SCALE = 32, 10
PORT_ROUNDS = 3  # of the torch port, which takes most of the time
FLOOR, FINAL, TORCH = "projection of all layers", "final projection alone", "torch, as released"


@dataclasses.dataclass
class FusionRow:
    """One form at one size. Times in milliseconds, memory in MB (10^6 bytes); None where not measured."""

    width: int = column("D")
    vocabulary: int = column("V")
    batch: int = column("batch")
    form: str = column("form")
    best_ms: float = column("best ms")
    median_ms: float = column("median ms")
    over_final: float = column("x final")
    over_floor: float = column("x floor")
    torch_speedup: float | None = column("torch / this")
    xla_temp_mb: float | None = column("XLA temp MB")
    peak_mb: float | None = column("peak MB")


def run_fusion_bench(sizes=SIZES, batches=(1, 8), rounds: int = 7, memory: bool = True,
                     progress: bool = True) -> BenchReport:
    """Time SLED in its plain and streaming form, the two projections and, where installed, the torch port.

    sizes: (width, vocabulary) pairs. rounds: interleaved repetitions; the port runs in at most `PORT_ROUNDS`,
    at batch 1 only, as the released code does. memory: also measure peak memory, in one process each.
    """
    Whole(1, hint="it counts the repetitions")("rounds", rounds)
    port, notes = _torch_port()
    with_port = port is not None
    per_size = 4 * len(batches) * rounds + with_port * min(PORT_ROUNDS, rounds) + (2 + with_port) * memory
    rows = []
    with tqdm(total=len(sizes) * per_size, desc="sled bench fusion", disable=not progress) as bar:
        for width, vocabulary in sizes:
            w_VD = jax.random.normal(jax.random.key(0), (vocabulary, width)) / width**0.5
            for batch in batches:
                rows += _time_forms(w_VD, batch, rounds, port if batch == 1 else None, bar)
            del w_VD
            if memory:
                _measure_peaks([r for r in rows if (r.width, r.vocabulary, r.batch) == (width, vocabulary, 1)], bar)
    title = f"Fused SLED step, {LAYERS} layers, k = {SCALE}"
    return BenchReport(title, {"layers": LAYERS, "scale": SCALE}, rows, notes)


def _time_forms(w_VD, batch, rounds, port, bar) -> list[FusionRow]:
    vocabulary, width = w_VD.shape
    h_BCD = 3 * jax.random.normal(jax.random.key(1), (batch, LAYERS + 1, width))
    compiled = {
        FINAL: _compile(lambda h_BCD, w_VD: SharedHead(w_VD).project(h_BCD[:, -1]), h_BCD, w_VD),
        FLOOR: _compile(lambda h_BCD, w_VD: SharedHead(w_VD).project(h_BCD), h_BCD, w_VD),
    }
    for name, tile in _forms(batch, vocabulary).items():
        compiled[name] = _compile(_sled_step(tile), h_BCD, w_VD)
    calls: dict[str, Callable] = {
        name: lambda run=run: jax.block_until_ready(run(h_BCD, w_VD)) for name, run in compiled.items()
    }
    if port is not None:
        torch = sys.modules["torch"]
        h_CD, w_torch_VD = torch.from_dlpack(h_BCD[0]), torch.from_dlpack(w_VD)
        calls[TORCH] = lambda: port(h_CD, w_torch_VD, scale=SCALE)

    for call in calls.values():
        call()
    times = interleave(calls, rounds, bar, fewer={TORCH: PORT_ROUNDS})
    best = {name: of.best for name, of in times.items()}
    return [FusionRow(width=width, vocabulary=vocabulary, batch=batch, form=name, best_ms=1e3 * best[name],
                      median_ms=1e3 * times[name].median, over_final=best[name] / best[FINAL],
                      over_floor=best[name] / best[FLOOR],
                      torch_speedup=best[TORCH] / best[name] if TORCH in best else None,
                      xla_temp_mb=compiled[name].memory_analysis().temp_size_in_bytes / 1e6 if name in compiled else
                      None, peak_mb=None) for name in calls]


def _forms(batch, vocabulary) -> dict[str, int | None]:
    """Plain and streaming SLED, the automatic choice of `default_tile` marked."""
    chosen = default_tile(batch * (LAYERS + 1), vocabulary)
    tile = chosen or default_tile(10**9, vocabulary)
    mark = lambda picked: " (default)" if picked else ""  # noqa: E731
    return {"SLED, plain" + mark(chosen is None): None, f"SLED, tiles of {tile}" + mark(chosen == tile): tile}


def _sled_step(tile):
    return lambda h_BCD, w_VD: SLED(scale=SCALE).logits(h_BCD, SharedHead(w_VD, tile=tile))


def _compile(function, *args):
    return jax.jit(function).lower(*args).compile()


def _torch_port():
    """The torch port and no notes, or None and a note on how to get it."""
    try:
        from sled.bench.torch_sled import torch_sled_logits
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None, ['torch is not installed, so the port was left out: pip install "sled-jax[parity]"']
    if jax.default_backend() != "cpu":
        return None, ["The torch port is compared on the CPU only."]
    return torch_sled_logits, []


def _measure_peaks(rows: list[FusionRow], bar) -> None:
    """Fill in `peak_mb`, batch 1: the most memory a call holds beyond inputs and program."""
    for row in rows:
        if row.form in (FINAL, FLOOR):
            continue
        tile = next((t for name, t in _forms(1, row.vocabulary).items() if name == row.form), None)
        side = "torch" if row.form == TORCH else "jax"
        call = f"_peak_of_two_calls({side!r}, {row.width}, {row.vocabulary}, {tile})"
        done = subprocess.run([sys.executable, "-c", f"from sled.bench import fusion; print(fusion.{call})"],
                              capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() != "None":
            row.peak_mb = float(done.stdout) / 1e6
        bar.update()


def _peak_of_two_calls(side: str, width: int, vocabulary: int, tile: int | None) -> int | None:
    """Bytes of resident memory two calls add at their peak, in this process; None without Linux and glibc."""
    if not os.path.exists("/proc/self/clear_refs") or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    rng = np.random.default_rng(0)
    w_VD = np.resize(rng.standard_normal((1000, width), np.float32), (vocabulary, width))
    h_BCD = rng.standard_normal((1, LAYERS + 1, width), np.float32)
    if side == "torch":
        import torch

        from sled.bench.torch_sled import torch_sled_logits

        h_CD, w_VD = torch.from_numpy(h_BCD[0]), torch.from_numpy(w_VD)
        call = lambda: torch_sled_logits(h_CD, w_VD, scale=SCALE)  # noqa: E731
    else:
        h_BCD, w_VD = jax.block_until_ready((jnp.asarray(h_BCD), jnp.asarray(w_VD)))
        run = _compile(_sled_step(tile), h_BCD, w_VD)
        call = lambda: run(h_BCD, w_VD).block_until_ready()  # noqa: E731
    # The allocator keeps what making the inputs and compiling freed; give it back, or the calls reuse it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak back to the present size
    before = _status_bytes("VmRSS")
    call()
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))
