"""The exits benchmark on a toy model: the report is whole, and transformers may be missing."""

import itertools
import json
from pathlib import Path

import pytest
from flax import nnx

import sled
from sled.bench import exits, solving
from sled.errors import SettingError
from sled.lm import LM
from sled.models import Decoder, DecoderConfig
from sled.text.tokenizer import Tokenizer

CONFIG = DecoderConfig(family="llama", vocab_size=1000, width=32, mlp_width=48, num_layers=2, num_heads=2,
                       num_kv_heads=2, head_dim=16, max_positions=128, eos_ids=(0,), tied_head=True)


@pytest.fixture
def toy(monkeypatch):
    tokenizer = Tokenizer.from_folder(Path(sled.__file__).parent / "demo" / "model")
    lm = LM(Decoder.init(CONFIG, rngs=nnx.Rngs(0)), tokenizer)
    monkeypatch.setattr(sled, "load", lambda *_, **__: lm)
    monkeypatch.setattr(solving, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(exits, "GUESSES", ((1, 2),))
    monkeypatch.setattr(exits, "EXITS", (1,))
    monkeypatch.setattr(exits, "THRESHOLDS", (0.0, 1.0))
    return lm


def test_the_report_is_whole_without_transformers(toy, monkeypatch, tmp_path):
    def missing(decoder):
        raise ImportError("no torch", name="torch")

    def two_of_them(lm, questions, entries=exits.speculation_entries):
        return dict(itertools.islice(entries(lm, questions).items(), 2))

    monkeypatch.setattr(exits, "transformers_twin", missing)
    monkeypatch.setattr(exits, "speculation_entries", two_of_them)  # each is a program to compile
    report = exits.run_exits_bench(problems=8, rounds=1, picture=tmp_path / "deep" / "exits.png")
    alone = [row for row in report.rows if isinstance(row, exits.SpeculationRow)]
    full, *early = [row for row in report.rows if isinstance(row, exits.EarlyExitRow)]
    assert len(alone) == 2 and len(early) == 2 * 5 * 2 and len(report.rows) == 23
    assert all(row.best > 0 and row.plain_over_this > 0 and row.transformers_over_this is None for row in alone)
    assert all(row.same_texts == 1 for row in alone)
    assert alone[0].acceptance is None and 0 <= alone[1].acceptance <= 1
    assert (full.depth, full.threshold, full.same_tokens, full.no_exit_over_this) == (2, None, 1, 1)
    assert all(row.depth == (1 if row.threshold == 0 else 2) and row.lockstep_over_this > 0 for row in early)
    assert all(row.same_tokens == row.same_answers == 1 for row in early if row.threshold == 1)
    assert "parity" in report.notes[-1]
    assert len(json.loads(report.json())["rows"]) == 23 and report.markdown().count("\n|---|") == 2
    assert (tmp_path / "deep" / "exits.png").read_bytes()[:4] == b"\x89PNG"


def test_every_way_has_its_plain_one(toy):
    entries = exits.speculation_entries(toy, [[1]])
    assert {entry.plain for entry in entries.values()} == {exits.GREEDY, exits.SLED} <= entries.keys()
    assert all((entry.plain == exits.SLED) == name.startswith("SLED") for name, entry in entries.items())


def test_transformers_says_the_same_plain_and_assisted(toy):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    questions = solving.mixed_questions(toy, 4)
    plain = solving.our_way(toy, questions, 1)()
    entries = exits.transformers_entries(toy, questions)
    assert len(entries) == 3
    ran = [entry.way() for entry in entries.values()]
    assert all(made.tokens == plain.tokens for made in ran)
    assert ran[0].acceptance is None and all(0 <= made.acceptance <= 1 for made in ran[1:])


def test_problems_are_mixed_and_frequent_tokens_end_texts(toy):
    questions = solving.mixed_questions(toy, 6)
    assert len(questions) == 8 and len(set(map(tuple, questions))) == 8
    few = solving.frequent_tokens(toy, 16)
    assert len(few) == 16 and 0 in few


def test_counts_below_one_are_refused(toy):
    for settings in (dict(problems=0), dict(rounds=0)):
        with pytest.raises(SettingError, match="at least 1"):
            exits.run_exits_bench(**settings)
