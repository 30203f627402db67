"""`sled bench`: measurements, side by side in one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sled.cli.options import print_devices
from sled.files import writable


@dataclasses.dataclass(frozen=True)
class BenchFusion:
    """The fused SLED step against the released algorithm in torch, and against the projections it cannot avoid.

    Needs the `parity` extra for the torch side; without it the rest is measured. About three minutes.
    """

    json: Path | None = None
    """Also write the report to this file."""

    def run(self) -> None:
        from sled.bench.fusion import run_fusion_bench

        _show(run_fusion_bench(), self.json)


@dataclasses.dataclass(frozen=True)
class BenchDecode:
    """Decoding a random 134M-parameter Llama, against transformers' generate on the same weights.

    Greedy and SLED, batch 1 and 8, float32; time to first token and compile time. Needs the `parity`
    extra for the transformers side; without it the rest is measured. A few minutes.
    """

    new_tokens: int = 64
    """Tokens per row and run."""
    rounds: int = 4
    """Interleaved rounds; ratios are taken between the fastest."""
    json: Path | None = None
    """Also write the report to this file."""

    def run(self) -> None:
        from sled.bench.decode import run_decode_bench

        _show(run_decode_bench(new_tokens=self.new_tokens, rounds=self.rounds), self.json)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the fused step, or decoding, against others in the same run."""

    what: Annotated[BenchFusion, tyro.conf.subcommand("fusion")] | Annotated[
        BenchDecode, tyro.conf.subcommand("decode")]

    def run(self) -> None:
        if self.what.json:
            writable("--json", self.what.json)
        print_devices()
        self.what.run()


def _show(report, path: Path | None) -> None:
    print(report.markdown())
    if path:
        path.write_text(report.json() + "\n")
