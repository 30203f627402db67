"""What a run writes of itself: metrics, curves, pictures, throughput."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sled.errors import CheckpointError, SettingError
from sled.models.config import DecoderConfig, ExitHeads
from sled.models.decoder import Decoder
from sled.train.run.metrics import Metrics, draw, progress_bar, progress_line, read_metrics
from sled.train.run.throughput import Throughput, flops_per_token, peak


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, steps, *, resumed_from=0, **more):
    with Metrics(path, resumed_from=resumed_from, **more) as metrics:
        for step in steps:
            metrics.write(step, {"loss": step / 2, "held_out": [3.0, 2.0 / step]})


def test_lines_come_back_as_they_were_written(path):
    with Metrics(path) as metrics:
        metrics.write(1, {"loss": jnp.float32(0.1), "layers": np.array([1, 2]), "half": jnp.bfloat16(0.5), "text": "a"})
        metrics.write(3, {"loss": float("nan"), "held_out": [1.0, float("inf")], "count": 7})
        for step in (3, 2):
            with pytest.raises(SettingError, match=f"step is {step}, but the metrics file holds step 3 already"):
                metrics.write(step, {})
    assert read_metrics(path) == [
        {"step": 1, "loss": float(np.float32(0.1)), "layers": [1, 2], "half": 0.5, "text": "a"},
        {"step": 3, "loss": "nan", "held_out": [1.0, "inf"], "count": 7}]
    for line in path.read_text().splitlines():  # strict JSON: no NaN, no Infinity
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\0\0\0"])
def test_after_a_resume_each_step_stands_once(path, torn):
    write(path, range(1, 9))
    with path.open("ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 9))
    write(path, range(6, 11), resumed_from=5)
    resumed = path.read_bytes()
    path.unlink()
    write(path, range(1, 11))
    assert resumed == path.read_bytes()
    write(path, [1])  # a run from the start begins the file anew
    assert [line["step"] for line in read_metrics(path)] == [1]


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b'{"step": "2"}\n', b'{"step": 1}\n', b"garbage\n"])
def test_damage_before_the_last_line_is_told(path, line):
    write(path, [1])
    with path.open("ab") as file:
        file.write(line + b'{"step": 3}\n')
    for use in (read_metrics, Metrics):
        with pytest.raises(CheckpointError, match=r"line 2 of the metrics file .* is damaged"):
            use(path)


def test_what_cannot_be_read_or_written(path, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="none cannot be read"):
        read_metrics(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"the metrics file is .* cannot be written"):
        Metrics(tmp_path / "file" / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SettingError, match=r'not installed; install it with pip install "sled-jax\[tensorboard\]"'):
        Metrics(path, tensorboard="board")


def test_tensorboard_gets_the_same_numbers(path, tmp_path, monkeypatch):
    writer = Mock()
    monkeypatch.setitem(sys.modules, "tensorboardX", Mock(SummaryWriter=writer))
    with Metrics(path, resumed_from=1, tensorboard=tmp_path) as metrics:
        metrics.write(2, {"loss": 1.5, "held_out": [3.0, 1.0], "name": "text"})
    assert writer.mock_calls == [
        call(str(tmp_path), purge_step=2), call().add_scalar("loss", 1.5, 2), call().add_scalar("held_out/1", 3.0, 2),
        call().add_scalar("held_out/2", 1.0, 2), call().close()]


def test_tensorboardx_writes_its_file(path, tmp_path):
    pytest.importorskip("tensorboardX")
    write(path, [1, 2], tensorboard=tmp_path / "board")
    [events] = (tmp_path / "board").iterdir()
    assert b"held_out/2" in events.read_bytes()


def test_the_progress_line_is_short():
    values = {"loss": jnp.float32(2.34567), "held_out": [3.0, 2.5], "tokens_per_second": 12345.6, "batch": 2048}
    assert progress_line(values) == "loss 2.346, held out 2.5, tokens per second 12,346, batch 2,048"
    with progress_bar(10, 4) as bar:
        assert (bar.total, bar.n) == (10, 4)


TPU = SimpleNamespace(device_kind="TPU v5 lite")


@pytest.mark.parametrize("kind, expected", [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756.5e12), ("NVIDIA H200", 989.4e12), ("TPU v4 lite", None), ("NVIDIA H100 NVL", None),
    ("cpu", None), ("NVIDIA L4", None)])
def test_peaks_are_known_by_name(kind, expected):
    assert peak(SimpleNamespace(device_kind=kind)) == expected


def test_throughput_counts_tokens_and_what_they_cost_but_no_pauses():
    now = [100.0]
    flops = flops_per_token(CONFIG, 1000, 0, 16)
    meter = Throughput(flops, devices=[TPU, TPU], clock=lambda: now[0])
    meter.count(300)
    now[0] += 2
    with meter.paused():
        now[0] += 50
    meter.count(100)
    now[0] += 2
    assert meter.read(lambda: 1.5) == pytest.approx({
        "tokens_per_second": 100, "mfu": 100 * flops.model / 394e12,
        "mfu_with_exits": 100 * (flops.model + 1.5 * flops.exit) / 394e12})
    now[0] += 1
    assert meter.read()["tokens_per_second"] == 0
    assert set(Throughput(flops).read()) == {"tokens_per_second"}  # a CPU's peak is not known
    assert set(Throughput(devices=[TPU]).read()) == {"tokens_per_second"}


CONFIG = DecoderConfig("llama", vocab_size=20, width=16, mlp_width=24, num_layers=3, num_heads=2, num_kv_heads=1,
                       head_dim=8, max_positions=64, tied_head=False, windows=(None, 4, None))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [None, ExitHeads((1, 2), "affine"), ExitHeads((1, 2), "affine", tied=False)])
def test_flops_are_those_of_the_matrix_products(tied, heads):
    """Each product of [m, k] and [k, n] is 2 m k n forward, twice that backward; norms are what 6 N counts too much."""
    config = DecoderConfig(**{**vars(CONFIG), "tied_head": tied, "exit_heads": heads})
    weights = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Decoder.init(config, rngs=nnx.Rngs(0)))))
    sizes = [sum(weight.size for path, weight in weights if (path[0] == "exit_heads") == of_heads)
             for of_heads in (False, True)]
    d, f, v, t = 16, 24, 20, 32
    layer = d * 16 + 2 * d * 8 + 16 * d + 3 * d * f  # queries, keys and values, output, MLP
    attention = sum(2 * 16 * reach for reach in (t, 4, t))  # scores and mixing, of each query with those it may see
    norms = 7 * d
    flops = flops_per_token(config, *sizes, t)
    assert flops.model == 3 * 2 * (3 * layer + d * v + norms + attention)
    assert flops.exit == 3 * 2 * (d * v + (d * d + d if heads else 0))  # the bias is what 6 N counts too much


def test_the_picture_shows_every_layer(path, tmp_path):
    with Metrics(path) as metrics:
        metrics.write(1, {"loss": 1.0})
    with pytest.raises(SettingError, match="has no 'held_out' yet"):
        draw(path, tmp_path / "losses.png")
    write(path, [1, 3, 5])
    for name in ("losses.png", "losses.svg"):
        assert draw(path, tmp_path / name).stat().st_size > 5000
    text = (tmp_path / "losses.svg").read_text()
    assert text.count('id="line2d_') >= 2 and "step" in text
    with pytest.raises(SettingError, match="ending is none of"):
        draw(path, tmp_path / "losses.gif")
