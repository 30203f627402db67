"""What a machine lacks: memory, told beforehand where shapes tell; room on a disk. One named error where it shows."""

import errno
import logging

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from tiny_lm import talking_lm

import sled
from sled.decoding import memory
from sled.errors import OutOfMemoryError, SettingError
from sled.export.forms import export_program
from sled.export.program import Traced
from sled.models import save_folder


@pytest.mark.parametrize("call", [
    lambda lm: sled.Engine(lm, slots=10**9), lambda lm: sled.Engine(lm, slots=20_000),
    lambda lm: lm.generate(["a"] * 500, batch_size=10**9), lambda lm: lm.stream(["a"] * 500),
    lambda lm: lm.score([[6 + n % 50, 6 + n // 50] for n in range(500)], [[7]] * 500, batch_size=500),
    lambda lm: sled.Engine(lm, slots=500, exits=sled.SelfSpeculation(1, draft=60)),
    lambda lm: sled.Engine(lm, slots=500, exits=sled.EarlyExit(1, max_deferred=60)),
])
def test_what_memory_cannot_hold_is_refused_with_its_bytes(call, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 2**20)
    with pytest.raises(OutOfMemoryError, match=r"rows of \d\d positions, .* at least [\d.]+ .iB, but .* 1 MiB"):
        call(talking_lm())


@pytest.mark.parametrize(("call", "at"), [
    (lambda lm: lm.generate("a"), "sled.decoding.state.empty_state"),
    (lambda lm: lm.score("a", "b"), "sled.lm.score_pairs"),
    (lambda lm: lm.lens("a"), "sled.lm.look"), (lambda lm: next(lm.stream("a")), "sled.decoding.loop.decode"),
    (lambda lm: sled.Engine(lm), "sled.decoding.state.empty_state"),
    (lambda lm: sled.load("demo"), "sled.loading.load_folder"),
])
@pytest.mark.parametrize("error", [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), MemoryError()],
    ids=lambda error: type(error).__name__)
def test_too_little_memory_is_one_named_error(call, at, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(at, fail)
    with pytest.raises(OutOfMemoryError, match=r"too little memory for .* \((RES|Mem).*\); (lower|give)"):
        call(talking_lm())


def test_a_device_that_fails_otherwise_is_not_called_short_of_memory(monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: x")

    monkeypatch.setattr("sled.lm.look", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        talking_lm().lens("a")


def chained(error: Exception) -> Exception:
    outer = ValueError("a library's own words")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(("error", "says"), [
    (OSError(errno.ENOSPC, "x"), "a file cannot be written (No space left on device); make room"),
    (OSError(errno.EDQUOT, "x"), "a file cannot be written (Disk quota exceeded); make room"),
    (chained(OSError(errno.EFBIG, "x")), "a file cannot be written (File too large); make room"),
    (OSError(errno.EIO, "x"), "a file cannot be read or written (Input/output error); check its disk"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "a file cannot be written (No space left on"),
    (MemoryError(), "there was too little memory (MemoryError); lower"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "there was too little memory (RES"),
])
def test_what_the_machine_lacks_is_one_line_of_the_command(error, says, monkeypatch, command):
    def fail(*_, **__):
        try:
            raise error
        finally:
            logging.getLogger("absl").error("pages", exc_info=True)  # as Orbax does

    monkeypatch.setattr(sled, "load", fail)
    code, out, err = command("generate", "a")
    [line] = [line for line in err.splitlines() if not line.startswith(("running on", "warning: no accelerator"))]
    assert (code, out) == (1, "") and line.startswith(f"sled: {says}")


@pytest.mark.parametrize("write", [
    lambda lm, folder: save_folder(lm.build(lm.params), folder),
    lambda lm, folder: export_program("demo", folder, sled.Decoding()),
    lambda lm, folder: sled.save_classifier(sled.Classifier(np.ones((1, 32)), np.ones(1), (1,)), folder / "x", lm),
], ids=["model", "program", "classifier"])
def test_a_full_disk_is_named_and_nothing_is_left(write, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in ("sled.models.huggingface", "sled.export.program", "sled.calibration.classifier_file"):
        monkeypatch.setattr(f"{module}.save_file", full)
    monkeypatch.setattr("sled.export.program.trace_generation", lambda *_: Traced(b"", {}))
    monkeypatch.setattr("sled.export.program.trace_step", lambda *_: Traced(b"", {}))
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match=r"cannot be written \(No space left on device\); make room"):
        write(talking_lm(), tmp_path / "folder")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
