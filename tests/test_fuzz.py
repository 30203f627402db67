"""Hostile values everywhere that a user, a file or a shell can put one: what fails, fails by a named error.

Seeded: the same cases every time. `--exhaustive` runs 2,000 and more; the rule is the same. With their counts:

    python -m pytest -n 0 -s --exhaustive tests/test_fuzz.py 2>&1 | grep cases
"""

import collections
import contextlib
import dataclasses
import json
import shutil
import signal
import sqlite3
import struct
import time
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny_lm import CONFIG, talking_lm, tiny_lm

import sled
from sled import cli
from sled.calibration.record import FORMAT, Calibration, Step
from sled.cli.commands import SLED as COMMANDS
from sled.cli.line import options_of
from sled.errors import SledError, SledWarning
from sled.eval.harness.cache import Cache
from sled.exits import POLICIES, SCHEDULES
from sled.fusion import FUSIONS
from sled.io import json_digest, shorten
from sled.models.stored import open_weights
from sled.settings.decorator import declared
from sled.text.tokenizer import Tokenizer

SECONDS = 20  # of a case's own computing, compilation included, however busy the machine is
WAITING = 90  # and in all, for what waits without computing
OUTCOMES = collections.Counter()

NUMBERS = st.sampled_from([
    0, 1, -1, 2, 3, 0.5, 1.0, -0.0, 1e-6, 1e-38, 1e-46, 5e-324, 1e6, 1e30, 1e38, 1e39, -1e39, 2**31 - 1, 2**31, 2**32,
    2**63, -2**63, 10**30, 10**400, float("nan"), float("inf"), float("-inf")])
TEXTS = st.text(max_size=8) | st.sampled_from([
    "", " ", "a", "ab", "no", "\0", "\ud800", "é", "a" * 200, "../x", "/dev/zero", "nan", "1e39", "-1", "0x10", "[",
    "{}", "{{", "\\", "-", "--", "%s", "🙂"])
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
LISTS = st.lists(PLAIN, max_size=4) | st.lists(st.lists(NUMBERS, max_size=2), max_size=2)
OBJECTS = st.dictionaries(TEXTS, PLAIN, max_size=3)
ARRAYS = st.sampled_from([
    np.array(1.0), np.array([]), np.array([np.nan]), np.array([1e39]), np.array([True]), np.zeros(5), np.array(["a"]),
    np.array([None, 1], object), np.ones((2, 2)), np.array([2**40]), np.ones(3, "c16"), np.array([0.5], np.float16),
    np.array([3], np.uint8), np.zeros((0, 3))])
ANYTHING = PLAIN | LISTS | OBJECTS | ARRAYS | st.sampled_from([
    b"a", object(), int, ..., {1}, range(3), (1, 2), lambda: 1])
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=6)


@contextlib.contextmanager
def named_errors(*misuse):
    """What is raised within is a SledError with something to read, and it is not long in coming."""
    def hang(number, _):
        raise AssertionError(f"computes for {SECONDS} s" if number == signal.SIGPROF else f"waits for {WAITING} s")

    before = {number: signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SledWarning)
            yield
        OUTCOMES["taken"] += 1
    except SledError as error:
        assert 20 < len(str(error)) < 2000, str(error)[:300]
        OUTCOMES["refused"] += 1
    except misuse:
        OUTCOMES["misused"] += 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def trials(request):
    """trials(strategy, check): check(case) for the cases of a strategy, a few or many; prints what became of them."""
    def run(strategy, check, *, few: int, many: int = 400):
        slowest = (0.0, None)

        def timed(case):
            nonlocal slowest
            began = time.process_time()
            check(case)
            slowest = max(slowest, (time.process_time() - began, case), key=lambda pair: pair[0])

        OUTCOMES.clear()
        hypothesis.settings(
            max_examples=many if request.config.getoption("--exhaustive") else few, derandomize=True, database=None,
            deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate])(hypothesis.given(strategy)(timed))()
        print(f"{request.node.name}: {OUTCOMES.total()} cases, {dict(OUTCOMES)}; slowest {slowest[0]:.1f} s of "
              f"computing: {shorten(repr(slowest[1]), 150)}")

    return run


CLASSES = [*FUSIONS.values(), *POLICIES.values(), *SCHEDULES.values(), sled.Sampling, sled.Limits]


def test_settings(trials):
    """Of any field: refused, or finite and in its range as it is computed with."""
    def check(case):
        kind, chosen = case
        with named_errors():
            made = kind(**chosen)
            for name, of in declared(kind).items():
                value = getattr(made, name)
                if of.traced and isinstance(value, (int, float, np.ndarray)):
                    assert not np.isnan(np.asarray(value, np.float32)).any()

    fields = st.sampled_from(CLASSES).flatmap(lambda kind: st.tuples(st.just(kind), st.fixed_dictionaries(
        needed := {name: st.just(1) | ANYTHING for name in ("layers", "layer")
                   if name in declared(kind) and kind in POLICIES.values()},
        optional={name: ANYTHING for name in declared(kind) if name not in needed})))
    trials(fields, check, few=60, many=600)


def test_numbers_that_pass_give_numbers(trials, request):
    """Scores and tokens under numbers at the ends of their ranges: never NaN."""
    lm, ends = talking_lm(), {}
    more = (sled.DoLa, sled.ClampOnly) if request.config.getoption("--exhaustive") else ()
    for kind in (sled.SLED, sled.Sampling, *more):
        ends[kind] = {name: NUMBERS for name, of in declared(kind).items() if of.rows and name != "steps"}

    def check(case):
        kind, chosen = case
        with named_errors():
            made = kind(**chosen, **({"max_scale": 16} if "scale" in ends[kind] else {}))
            if kind is sled.Sampling:
                assert all(0 <= token < CONFIG.vocab_size for token in lm.generate("ab", sampling=made).tokens[0])
            else:
                assert not np.isnan(lm.score("ab", "cd", fusion=made).logprobs[0]).any()

    trials(st.sampled_from(list(ends)).flatmap(lambda kind: st.tuples(st.just(kind), st.fixed_dictionaries(
        {}, optional=ends[kind]))), check, few=12, many=200)


def test_arguments_of_the_public_functions(trials):
    lm = talking_lm()
    calls = {
        "generate": lambda x, y: lm.generate(x, max_new_tokens=2), "stop": lambda x, y: lm.generate("ab", stop=x),
        "stream": lambda x, y: list(lm.stream(x, chunk=y, max_new_tokens=2)), "lens": lambda x, y: lm.lens(x),
        "score": lambda x, y: lm.score(x, y), "limits": lambda x, y: lm.generate("ab", max_new_tokens=x, seed=y),
        "batch": lambda x, y: lm.generate(["ab"], batch_size=x, fusion=y), "load": lambda x, y: sled.load(x, dtype=y),
        "decoding": lambda x, y: sled.Decoding(x, y), "calibration": lambda x, y: Calibration.load(x),
        "engine": lambda x, y: sled.Engine(tiny_lm(), slots=x, capacity=y),
        "classifier": lambda x, y: sled.load_classifier(x, lm),
        "exits": lambda x, y: lm.generate("ab", exits=sled.SelfSpeculation(1, vocabulary=x), max_new_tokens=2),
        "calibrate": lambda x, y: sled.calibrate(lm, x, exits=sled.EarlyExit(1), grid=y),
        "chat": lambda x, y: lm.chat(x),
        "picture": lambda x, y: sled.lens.picture(lm.lens("ab"), x), "tune": lambda x, y: sled.tune(lm, x, exits=y),
    }

    def check(case):
        name, x, y = case
        with named_errors():
            calls[name](x, y)

    trials(st.tuples(st.sampled_from(list(calls)), ANYTHING, ANYTHING), check, few=40)


def test_command(trials, monkeypatch, tmp_path, capfd):
    """Options with words of any kind: 0, 1 with one line, or 2 where the line is misused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sled, "load", lambda *_, **__: talking_lm())
    told = {name: [word for option in options_of(COMMANDS[name]) for word in option.spellings]
            for name in ("generate", "score", "lens")}

    def check(case):
        name, words, prompt = case
        with named_errors(SystemExit):
            assert cli.main([name, *words, prompt]) in (0, 1)

    words = lambda name: st.lists(st.tuples(st.sampled_from(told[name]), TEXTS | NUMBERS.filter(  # noqa: E731
        lambda x: x != 10**400).map(str)), max_size=3).map(lambda pairs: [word for pair in pairs for word in pair])
    lines = st.sampled_from(list(told)).flatmap(lambda name: st.tuples(st.just(name), words(name), TEXTS))
    trials(lines, check, few=25)


def test_folders(trials, tmp_path, write_model, variants):
    """A model's files with a field, a byte or a header changed: read, or refused before a weight is."""
    folder = write_model(tmp_path / "model", "llama")
    config, weights = json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8:8 + size])

    def check(case):
        what, name, value, at = case
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(weights)
        for other in ("generation_config.json", "exit_heads.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / other).unlink(missing_ok=True)
        if what == "config":
            (folder / "config.json").write_text(json.dumps({**config, name: value}))
        elif what == "header":
            changed = {**header, list(header)[at % len(header)]: value}
            written = json.dumps(changed).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + weights[8 + size:])
        elif what == "byte":
            broken = bytearray(weights)
            broken[at % (8 + size)] ^= 1 + at % 255
            (folder / "model.safetensors").write_bytes(broken)
        else:
            (folder / what).write_text(json.dumps({name: value} if at % 2 else value), errors="surrogatepass")
        with named_errors():
            with open_weights(folder) as stored:
                assert stored.sizes
            Tokenizer.from_folder(folder)

    names = st.sampled_from([*config, "rope_scaling", "eos_token_id", "layers", "kind", "tied", "model", "added_tokens",
                             "added_tokens_decoder", "bos_token", "temperature", "quantization_config"])
    kinds = st.sampled_from(["config"] * 4 + ["header", "byte", "generation_config.json", "exit_heads.json",
                                              "tokenizer.json", "tokenizer_config.json"])
    trials(st.tuples(kinds, names, JSON, st.integers(0, 2**31)), check, few=30, many=500)


def test_records(trials, tmp_path):
    """Calibrations with a digest that fits, and rows of a cache: as they were, or refused."""
    step = Step(0.9, 0.0, 0.01, 2.0)
    serving = {"exits": {"kind": "sled.EarlyExit", "layers": [1]}, "schedule": {"kind": "sled.Immediate"}}
    record = Calibration(0.9, 0.1, 0.05, "rouge", 40, (0.9, 0.5), (step, Step(0.5, 0.9, 0.9, 1.5)), 4, serving, "m", 0,
                         8, "today", {}, "here")
    whole = {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(record)))}
    answers = Cache(tmp_path / "cache").under({})
    answers.add({"a": [0.5]})

    def check(case):
        name, value, within = case
        if name == "cache":
            with contextlib.closing(sqlite3.connect(tmp_path / "cache")) as db, db:
                column, text = "answer" if within else "sha256", value if isinstance(value, str) else repr(value)
                db.execute(f"UPDATE answers SET {column} = ?", (text,))
            with named_errors(UnicodeEncodeError):
                assert answers.find(["a"]) in ({}, {"a": [0.5]})
            return
        changed = {**whole, name: value} if name != "serving" or not isinstance(within, str) else {
            **whole, "serving": {**serving, within: value}}
        text = json.dumps({**changed, "sha256": json_digest(changed)})
        (tmp_path / "record.json").write_text(text)
        with named_errors():
            found = Calibration.load(tmp_path / "record.json")
            found.table(), found.verdict(), found.schedule, found._rebuilt("exits")

    safe = JSON.filter(lambda value: "\\ud800" not in json.dumps(value))
    trials(st.tuples(st.sampled_from([*whole, "cache", "cache"]), safe, st.sampled_from(["exits", "schedule", None])),
           check, few=60)


@pytest.mark.parametrize(("fields", "heads"), [
    (dict(num_hidden_layers=9_999), None), (dict(num_hidden_layers=10_000), list(range(1, 9_999))),
    (dict(num_hidden_layers=2), [1]), (dict(num_hidden_layers=10_001), None), (dict(num_hidden_layers=2**63), None),
    (dict(vocab_size=2**31 - 1), None), (dict(hidden_size=2**30), None), (dict(eos_token_id=[1] * 1001), None),
    (dict(rope_theta=1e-30), None), (dict(rope_theta=1e39), None), (dict(), list(range(1, 10**5))),
])
def test_counts_beyond_what_is_stored_are_refused_before_anything_is_built(fields, heads, tmp_path, write_model):
    folder = write_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    for old in ("rope_parameters", "rope_scaling") if "rope_theta" in fields else ():
        config.pop(old, None)
    (folder / "config.json").write_text(json.dumps(config | fields))
    if heads:
        (folder / "exit_heads.json").write_text(json.dumps({"layers": heads, "kind": "mlp", "tied": False}))
        shutil.copyfile(folder / "model.safetensors", folder / "exit_heads.safetensors")
    with named_errors(), pytest.raises(SledError) as refused, open_weights(folder):
        raise AssertionError("it is no model")
    assert len(str(refused.value)) < 1000
