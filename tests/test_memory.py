"""Too little memory: told beforehand where shapes tell, and one named error where it shows."""

import jax
import pytest
from tiny_lm import talking_lm

import sled
from sled.decoding import memory
from sled.errors import OutOfMemoryError


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
