"""The fusion benchmark on a toy size: the report is whole, and torch may be missing."""

import json
import pathlib
import sys

import numpy as np
import pytest

from sled.bench.fusion import FINAL, FLOOR, TORCH, run_fusion_bench
from sled.errors import SettingError


def test_report_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sled.bench.torch_sled", raising=False)
    report = run_fusion_bench(sizes=((16, 300),), batches=(1,), rounds=2, memory=False, progress=False)
    assert [row.form for row in report.rows][:2] == [FINAL, FLOOR] and len(report.rows) == 4
    assert all(row.torch_speedup is None and row.best_ms > 0 for row in report.rows)
    assert "parity" in report.notes[0] and report.notes[0] in report.markdown()
    assert json.loads(report.json())["rows"][0]["vocabulary"] == 300


def test_rounds_that_measure_nothing_are_refused():
    with pytest.raises(SettingError, match="rounds is 0"):
        run_fusion_bench(rounds=0)


def test_report_with_torch():
    pytest.importorskip("torch")
    report = run_fusion_bench(sizes=((16, 300),), batches=(1,), rounds=2, memory=False, progress=False)
    assert [row.form for row in report.rows].count(TORCH) == 1
    assert report.rows[1].torch_speedup > 0 and report.versions["torch"]


def test_the_port_is_the_released_algorithm():
    torch = pytest.importorskip("torch")
    from sled.bench.torch_sled import torch_sled_logits

    reference = np.load(pathlib.Path(__file__).parent / "fixtures" / "sled_reference.npz")
    for case in range(8):
        scale, rate, bound = reference[f"gen{case}_params"]
        h_CD = torch.from_numpy(reference[f"gen{case}_logits"])
        out_V = torch_sled_logits(h_CD, torch.eye(h_CD.shape[-1]), float(rate), int(scale), float(bound))
        np.testing.assert_allclose(out_V.numpy(), reference[f"gen{case}_out"], atol=1e-5)
