"""Requests, and kept answers: found again under the very same settings alone, and whole after a kill."""

import copy
import importlib.metadata
import sqlite3
import textwrap

import jax
import pytest
import tokenizers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install sled-jax[eval]")

from programs import killed

import sled
from sled.errors import EvaluationError, SettingError
from sled.eval import methods
from sled.eval.harness import adapter as harness
from sled.eval.harness.cache import Cache
from sled.eval.harness.requests import GenerationRequest, GenerationSettings, batches
from sled.eval.methods import Method, deciding_versions
from sled.io import json_digest
from sled.text.tokenizer import Tokenizer

EARLY = sled.EarlyExit((2,), threshold=0.5)


def changed(lm, **attributes):
    other = copy.copy(lm)
    vars(other).update(attributes)
    return other


METHODS = [
    dict(fusion=sled.SLED()), dict(fusion=sled.SLED(rate=3.0)), dict(fusion=sled.SLED(scale=5)),
    dict(fusion=sled.SLED(norm_early=True)), dict(fusion=sled.ClampOnly()), dict(exits=EARLY),
    dict(exits=sled.EarlyExit((2,), threshold=0.6)), dict(exits=sled.EarlyExit((3,), threshold=0.5)),
    dict(exits=sled.EarlyExit((2,), threshold=0.5, kv="propagate")), dict(exits=sled.SelfSpeculation(2)),
    dict(exits=EARLY, schedule=sled.Gather(2)), dict(sampling=sled.Sampling(temperature=0.7)),
    dict(sampling=sled.Sampling(repetition_penalty=1.1)),
]


def kept(cache, lm, method, normalise=True):
    return harness.SledLM(lm, method, normalise=normalise, cache=cache, progress=False)._answers


def test_an_answer_is_found_under_its_own_settings_alone(demo):
    cache = Cache()
    kept(cache, demo, Method("plain")).add({"request": "the answer"})
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")), "test")
    models = (changed(demo, params=jax.tree.map(lambda w: w + 1e-3, demo.params)), changed(demo, text=tokenizer),
              sled.load("demo", dtype="bfloat16"))
    others = [*(kept(cache, demo, Method("m", **how)) for how in METHODS),
              *(kept(cache, other, Method("m")) for other in models), kept(cache, demo, Method("m"), normalise=False)]
    assert all(other.find(["request"]) == {} for other in others)
    assert kept(cache, demo, Method("the same under another name")).find(["request"]) == {"request": "the answer"}
    assert len({other.digest for other in others}) == len(METHODS) + 4


@pytest.mark.parametrize("of", deciding_versions())
def test_an_answer_of_another_version_is_not_found(demo, monkeypatch, of):
    cache = Cache()
    kept(cache, demo, Method("plain")).add({"request": "the answer"})
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == of else version(name))
    monkeypatch.setattr("sled.eval.methods.ARITHMETIC", 1 if of == "arithmetic" else methods.ARITHMETIC)
    assert kept(cache, demo, Method("plain")).find(["request"]) == {}


def request(ids=(1, 2), until=("\n",), max_new_tokens=8, seed=None, **sampling):
    return GenerationRequest(ids, GenerationSettings(until, max_new_tokens, sled.Sampling(**sampling)), seed)


def test_every_part_of_a_request_is_in_its_key():
    generated = [request(), request((1, 3)), request(until=()), request(max_new_tokens=9), request(seed=0),
                 request(seed=1), request(temperature=0.5)]
    scored = [{"context": (1, 2), "continuation": (3,)}, {"context": (1,), "continuation": (2, 3)}]
    assert len({json_digest(each.described()) for each in generated} | set(map(json_digest, scored))) == 9


def test_requests_are_batched_by_length_or_by_stream():
    greedy = [request((1,) * n) for n in (3, 9, 5, 7, 4)]
    assert list(batches(greedy, range(5), 2)) == [[1, 3], [2, 4, 0]]  # what is left over goes with the last batch
    drawn = [request(seed=seed, temperature=1.0) for seed in (7, 0, 1, 2, 8)]
    assert list(batches(drawn, range(5), 8)) == [[1, 2, 3], [0, 4]]
    assert list(batches(greedy, [], 2)) == []
    mixed = [request(), request(max_new_tokens=9), request()]
    assert sorted(map(sorted, batches(mixed, range(3), 8))) == [[0, 2], [1]]


def test_generation_settings_are_read_as_the_harness_means_them():
    read, cold = GenerationSettings.of, {"do_sample": False, "temperature": 0.5, "top_p": 0.9}
    assert read({"until": "x", "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": None}) == (
        GenerationSettings(("x",), 7, sled.Sampling(temperature=0.5, top_p=0.9)))
    assert read(cold) == GenerationSettings((), 256, sled.Sampling())
    assert read({"max_gen_toks": 7}, at_most=5).max_new_tokens == 5
    assert read({}, at_most=500).max_new_tokens == 500
    for wrong, says in (({"num_beams": 4}, "num_beams, which mean nothing here"),
                        ({"do_sample": True}, "no temperature above 0"),
                        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, "Sampling.top_p is 2.0")):
        with pytest.raises(EvaluationError, match=says):
            read({"until": ["\n"], **wrong})


def test_after_a_kill_whole_batches_are_there(tmp_path):
    """A process writes batch after batch, each of the rows n:0 to n:9, and is killed at any moment."""
    program = textwrap.dedent("""
        import itertools, sys
        from sled.eval.harness.cache import Cache
        answers = Cache(sys.argv[1]).under({"method": "plain"})
        for n in itertools.count():
            answers.add({f"{n}:{i}": "x" * 1000 for i in range(10)})
            print(n, flush=True)
    """)
    path = tmp_path / "answers.sqlite"
    said = int(killed(program, path, after=30)[-1])
    answers = Cache(path).under({"method": "plain"})
    rows = [len(answers.find([f"{n}:{i}" for i in range(10)])) for n in range(said + 100)]
    assert set(rows) <= {0, 10} and rows[:said + 1] == [10] * (said + 1)
    assert rows == sorted(rows, reverse=True)
    answers.add({"after": 1.5})
    assert answers.find(["after"]) == {"after": 1.5}


def test_files_that_are_no_cache_are_named(tmp_path):
    (tmp_path / "text").write_text("not a database, and long enough to be told from an empty one\n" * 100)
    with pytest.raises(EvaluationError, match="cannot be used"):
        Cache(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(EvaluationError, match="has format 0"):
        Cache(tmp_path / "other")
    with pytest.raises(SettingError, match="cannot be written"):
        Cache(tmp_path / "text" / "below")
    for path in ("", 3, "a\0b", "x" * 5000):
        with pytest.raises(SettingError):
            Cache(path)


@pytest.mark.parametrize("damage", [
    "answer = '[0.5'", "answer = '[0.25]'", "answer = NULL", "answer = 7", "answer = x'ff00'", "sha256 = 'ff'",
    "answer = cast(x'ff22' AS TEXT)", "sha256 = NULL",
])
def test_a_damaged_row_is_named(tmp_path, damage):
    answers = Cache(tmp_path / "cache").under({"method": "plain"})
    answers.add({"a": [0.5]})
    with sqlite3.connect(tmp_path / "cache") as db:
        db.execute(f"UPDATE answers SET {damage}")
    db.close()
    with pytest.raises(EvaluationError, match=r"cache .*/cache (is damaged|cannot be used)"):
        answers.find(["a"])
