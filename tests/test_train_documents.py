"""Tokenised examples are kept: made once, for the same data and settings alone, and never half."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from programs import killed
from tokenizers import normalizers
from training_data import CONFIG, DEMO, ROWS, one_epoch, tokens_of, write

from sled.errors import DataError
from sled.io import cache_folder
from sled.text.tokenizer import Tokenizer
from sled.train.data.packing import Layout

pytest_plugins = ["training_data"]


@pytest.fixture
def encoded(monkeypatch):
    """A list that grows by every text that is tokenised."""
    calls, encode_all = [], Tokenizer.encode_all
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts: calls.extend(texts) or encode_all(self, texts))
    return calls


def test_a_second_run_tokenises_and_arranges_nothing(load, tmp_path, encoded, monkeypatch):
    path = write(tmp_path, "jsonl")
    first = load(path)
    assert len(encoded) == 4
    again = load(path)
    assert len(encoded) == 4 and again.report == first.report and again.digest == first.digest
    np.testing.assert_equal(one_epoch(again), one_epoch(first))
    load(path, Layout(32, shape="padded", prompt_weight=1))  # rows are other ones, their documents are not
    assert len(encoded) == 4
    monkeypatch.setattr("sled.train.data.rows.arrange", None)
    np.testing.assert_equal(one_epoch(load(path)), one_epoch(first))
    with pytest.raises(TypeError):
        load(path, Layout(63))


def test_other_data_or_settings_are_tokenised_anew(load, tmp_path, encoded):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "b": "two"}\n')
    other = Tokenizer.from_folder(DEMO)
    other._get().normalizer = normalizers.Lowercase()
    load(path)
    for change in (dict(text="b"), dict(limit=1), dict(prompt="b", completion="text"), dict(tokenizer=other),
                   dict(config=dataclasses.replace(CONFIG, eos_ids=(1,)))):
        before = len(encoded)
        load(path, **change)
        assert len(encoded) > before, change
    before = len(encoded)
    path.write_text('{"text": "six", "b": "two"}\n')  # of the same size
    load(path)
    load([{"text": "six", "b": "two"}])
    load([{"text": "ten", "b": "two"}])
    assert encoded[before:] == ["six", "six", "ten"]


@pytest.mark.parametrize("damage", [
    lambda f: (f / "tokens.bin").write_bytes(b"\0" * 8), lambda f: (f / "about.json").unlink(),
    lambda f: (f / "documents.npz").write_bytes(b"PK\x03\x04"), lambda f: (f / "about.json").write_text("{"),
    lambda f: [p.write_bytes(b"") for p in f.glob("*.npz")]])
def test_what_is_damaged_is_made_anew(load, tmp_path, damage):
    expected = tokens_of(load(ROWS))
    [folder] = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    damage(folder)
    assert tokens_of(load(ROWS)) == expected


def test_an_error_leaves_nothing_behind(load, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [3]}\n{"ids": [1000]}\n')
    with pytest.raises(DataError, match="example 2, has token id 1000"):
        load(path, tokens="ids")
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_who_asks_at_once_waits_for_the_first(load, encoded):
    at_once = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: at_once.wait() >= 0 and load(ROWS).report, range(4)))
    assert len(encoded) == len(ROWS) and len(set(map(str, found))) == 1


KILLED = """
import sys, time
from pathlib import Path
from sled.models.config import DecoderConfig
from sled.text.tokenizer import Tokenizer
from sled.train.data import documents
from sled.train.data.sources import Source

documents.TOGETHER = 2  # two examples are written, then comes a long wait

class Slow:
    def __iter__(self):
        yield {"text": "Ash buys 0 toys."}
        yield {"text": "Ben buys 1 toys."}
        print("half", flush=True)
        time.sleep(60)

documents.Reading.digest = lambda self: "same"
config = DecoderConfig("llama", 1000, 8, 8, 2, 2, 2, 4, 256, eos_ids=(0,))
documents.tokenise(Source(Slow()), Tokenizer.from_folder(Path(sys.argv[1])), config, cache=sys.argv[2], progress=False)
"""


def test_a_killed_run_leaves_nothing_that_counts(load, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert killed(KILLED, DEMO, cache, after=1) == ["half\n"]
    assert len(list(cache.glob("*.unfinished-*"))) == 1
    monkeypatch.setattr("sled.train.data.sources.Reading.digest", lambda self: "same")  # so it is the same entry
    assert load(ROWS).report.examples == 4
    assert list(cache.glob("*.unfinished-*")) == []


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("data") == tmp_path / "sled" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("data") == Path.home() / ".cache" / "sled" / "data"
