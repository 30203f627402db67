"""Benchmarks on toy sizes: reports are whole, without torch and transformers too, and measure what they say."""

import dataclasses
import itertools
import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from demo_toy import TWO, demo_toy

import sled
from sled.bench import decode, engine, exactness, exits, layers, solving, stages
from sled.bench.fusion import FINAL, FLOOR, TORCH, run_fusion_bench
from sled.bench.loss import OURS, PLAIN, run_loss_bench
from sled.bench.report import BenchReport, column
from sled.demo.problems import problems, prompt
from sled.errors import SettingError


@pytest.fixture
def toy(monkeypatch):
    """It takes the bundled model's place, and the benchmarks measure less."""
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo_toy())
    monkeypatch.setattr(sled, "layers", lambda *_, **__: types.SimpleNamespace(speaking_layers=lambda _: (1,)))
    for module, settings in ((solving, dict(MAX_NEW_TOKENS=6)), (layers, dict(MAX_NEW_TOKENS=6)),
                             (engine, dict(POLICIES={"no early exit": None})),
                             (exits, dict(DRAFTS=(2,), THRESHOLDS=(0.0, 1.0)))):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    return demo_toy()


@pytest.mark.parametrize(("run", "settings", "says"), [
    (run_fusion_bench, dict(rounds=0), "rounds is 0"), (run_loss_bench, dict(rounds=0), "rounds is 0"),
    (exits.run_exits_bench, dict(problems=0), "at least 1"), (exits.run_exits_bench, dict(rounds=0), "at least 1"),
    (engine.run_engine_bench, dict(requests=0), "at least 1"), (engine.run_engine_bench, dict(slots=0), "at least 1"),
    (decode.run_decode_bench, dict(new_tokens=1024), "context"), (decode.run_decode_bench, dict(rounds=0), "at least"),
    (exactness.run_exactness_bench, dict(texts=0), "at least 1"),
    (exactness.run_exactness_bench, dict(batch_size=0), "at least 1"),
    (exactness.run_exactness_bench, dict(dtype="int8"), "bfloat16"),
    (stages.run_stages_bench, {}, "the number of devices is 1, but must be"),
    *((layers.run_layers_bench, dict(model=models), "must be 1 to 4 different ones")
      for models in ((), ("one", "one"), tuple("abcde"))),
])
def test_settings_that_measure_nothing_are_refused(run, settings, says):
    with pytest.raises(SettingError, match=says):
        run(**settings)


# The form of every report

@dataclasses.dataclass
class Lap:
    way: str = column("the way")
    batch: int = column("batch")
    best: float | None = column("best s")


@dataclasses.dataclass
class Speed:
    speed: float = column("speed")


def test_a_report_is_a_table_per_kind_of_row_under_its_head_and_json_by_name():
    rows = [Lap("left", 1, 1 / 3), Lap("right", 8, None), Speed(2.0), Speed(3.0)]
    report = BenchReport("Racing", {"laps": 3}, rows, ["No wind."], date="2026-11-24", hardware="a track",
                         versions={"shoes": "2.0", "socks": "1.0"})
    assert report.markdown().split("\n") == [
        "Racing; 2026-11-24; a track; shoes 2.0, socks 1.0", "",
        "| the way | batch | best s |", "|---|---|---|", "| left | 1 | 0.33 |", "| right | 8 | - |", "",
        "| speed |", "|---|", "| 2.00 |", "| 3.00 |", "", "No wind."]
    assert json.loads(report.json()) == {
        "date": "2026-11-24", "hardware": "a track", "versions": {"shoes": "2.0", "socks": "1.0"}, "laps": 3,
        "notes": ["No wind."], "rows": [{"way": "left", "batch": 1, "best": 1 / 3},
                                        {"way": "right", "batch": 8, "best": None}, {"speed": 2.0}, {"speed": 3.0}]}
    made_now = BenchReport("Racing", {}, rows)
    assert made_now.date and made_now.hardware and made_now.versions["jax"]


# The fused step

FUSION = dict(sizes=((16, 300),), batches=(1,), rounds=2, memory=False, progress=False)


def test_the_fused_step_is_measured_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sled.bench.torch_sled", raising=False)
    report = run_fusion_bench(**FUSION)
    assert [row.form for row in report.rows][:2] == [FINAL, FLOOR] and len(report.rows) == 4
    assert all(row.torch_speedup is None and row.best_ms > 0 for row in report.rows)
    assert "parity" in report.notes[0] and report.notes[0] in report.markdown()
    assert json.loads(report.json())["rows"][0]["vocabulary"] == 300


def test_the_fused_step_is_measured_with_torch():
    pytest.importorskip("torch")
    report = run_fusion_bench(**FUSION)
    assert [row.form for row in report.rows].count(TORCH) == 1
    assert report.rows[1].torch_speedup > 0 and report.versions["torch"]


def test_the_port_is_the_released_algorithm():
    torch = pytest.importorskip("torch")
    from sled.bench.torch_sled import torch_sled_logits

    reference = np.load(Path(__file__).parent / "fixtures" / "sled_reference.npz")
    for case in range(8):
        scale, rate, bound = reference[f"gen{case}_params"]
        h_CD = torch.from_numpy(reference[f"gen{case}_logits"])
        out_V = torch_sled_logits(h_CD, torch.eye(h_CD.shape[-1]), float(rate), int(scale), float(bound))
        np.testing.assert_allclose(out_V.numpy(), reference[f"gen{case}_out"], atol=1e-5)


# The loss

def test_the_loss_is_measured_in_every_form():
    report = run_loss_bench(vocabulary=300, width=8, exits=2, tokens=512, rounds=1, progress=False)
    rows = {row.form: row for row in report.rows}
    assert rows[PLAIN].over_plain == rows[PLAIN].memory_over_plain == 1 and len(rows) == 5
    assert rows[OURS].best_s > 0 and rows[OURS].memory_mb > 0
    assert "x floor" in report.markdown() and json.loads(report.json())["exits"] == 2


# Decoding, exits, serving

def test_decoding_is_measured_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = decode.run_decode_bench(new_tokens=2, rounds=1, config=TWO, batches=(1,))
    ways, least = report.rows[:4], report.rows[4:]
    assert [row.way for row in ways] == ["greedy", "SLED", "SLED, rate 1", "greedy, room for 1,024"]
    assert ways[0].over_greedy == 1
    assert all(row.first_call > 0 and row.transformers_over_this is None for row in ways)
    assert [row.work for row in least] == ["products and head", "weights read once"]
    assert all(row.best_ms > 0 for row in least)
    assert "parity" in report.notes[0]


def test_exits_are_measured_without_transformers(toy, monkeypatch, tmp_path):
    def two_of_them(*of, entries=exits.speculation_entries):
        return dict(itertools.islice(entries(*of).items(), 2))

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(exits, "speculation_entries", two_of_them)  # each is a program to compile, and so is a schedule
    monkeypatch.setattr(exits, "SCHEDULES", {name: exits.SCHEDULES[name] for name in ("immediate", "lockstep")})
    report = exits.run_exits_bench(problems=8, rounds=1, picture=tmp_path / "deep" / "exits.png")
    drafting = [row for row in report.rows if isinstance(row, exits.SpeculationRow)]
    leaving = [row for row in report.rows if isinstance(row, exits.EarlyExitRow)]
    assert [row.batch for row in drafting] == [1, 1, 8, 8]
    assert all(row.best > 0 and row.plain_over_this > 0 and row.transformers_over_this is None for row in drafting)
    assert all(row.same_texts == 1 for row in drafting)
    assert all(row.acceptance is None for row in drafting[::2])
    assert all(0 <= row.acceptance <= 1 for row in drafting[1::2])
    full, early = ([row for row in leaving if (row.threshold is None) == none] for none in (True, False))
    assert [row.batch for row in full] == [1, 8] and [row.batch for row in early] == [1] * 2 * 2 + [8] * 2 * 2 * 2
    assert all((row.depth, row.same_tokens, row.no_exit_over_this) == (2, 1, 1) for row in full)
    assert all(row.depth == (1 if row.threshold == 0 else 2) for row in early)
    assert all(row.batch == 1 or row.lockstep_over_this > 0 for row in early)
    assert all(row.same_tokens == 1 for row in early if row.threshold == 1)
    assert all(row.same_answers is None for row in early)  # the toy answers nothing
    assert "parity" in report.notes[2]
    said = [re.sub(r"[\d.]+ times", "n times", note) for note in report.notes[3:]]
    assert said == [each for batch in (1, 8) for each in (
        f"batch {batch}, drafts: the fastest of 1 settings, speculation after 1, draft 2, is n times as fast as "
        "greedy, with 100% of its texts",
        *(f"batch {batch}, threshold 1, at which no token leaves, {kv} K/V: n times as fast as no exit"
          for kv in ("exact", "propagate")))]
    assert len(json.loads(report.json())["rows"]) == 18 and report.markdown().count("\n|---|") == 2
    assert (tmp_path / "deep" / "exits.png").read_bytes()[:4] == b"\x89PNG"


def test_the_fastest_setting_that_keeps_the_answers_is_named():
    def leaving(threshold, kept, speed, kv="exact"):
        return exits.EarlyExitRow(8, kv, "immediate", threshold, *[1.0] * 4, depth=2.0, held=0, same_tokens=1.0,
                                  same_answers=kept, no_exit_over_this=speed, lockstep_over_this=1.0)

    def drafting(way, speed):
        return exits.SpeculationRow(8, way, *[1.0] * 7, same_texts=1.0, plain_over_this=speed,
                                    transformers_over_this=None)

    rows = [leaving(0.5, 0.9, 3.0), leaving(0.8, 0.98, 2.0), leaving(0.9, 1.0, 1.5), leaving(1, 1.0, 0.9),
            leaving(1, 0.5, 0.8, "propagate")]
    assert exits.best_of([drafting("greedy", 1), drafting("speculation A", 1.2), drafting("speculation B", 1.4),
                          drafting("SLED", 9), drafting("SLED, speculation C", 1.1)], rows) == [
        "batch 8, drafts: the fastest of 2 settings, speculation B, is 1.40 times as fast as greedy, with 100% of its "
        "texts",
        "batch 8, drafts: the fastest of 1 settings, SLED, speculation C, is 1.10 times as fast as SLED, with 100% of "
        "its texts",
        "batch 8, early exit, exact K/V: the fastest of 3 settings that keep 97% of the answers, threshold 0.8 "
        "(immediate, mean depth 2.0), is 2.00 times as fast as no exit, with 98% of its answers",
        "batch 8, threshold 1, at which no token leaves, exact K/V: 0.90 times as fast as no exit",
        "batch 8, threshold 1, at which no token leaves, propagate K/V: 0.80 times as fast as no exit"]


def test_every_way_has_its_plain_one(toy):
    entries = exits.speculation_entries(toy, [[1]], (1,), 1)
    assert {entry.plain for entry in entries.values()} == {exits.GREEDY, exits.SLED} <= entries.keys()
    assert all((entry.plain == exits.SLED) == name.startswith("SLED") for name, entry in entries.items())


def test_transformers_has_the_same_texts_plain_and_assisted(toy):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    questions = solving.mixed_questions(toy, 4)
    plain = solving.our_way(toy, questions, 1)()
    entries = exits.transformers_entries(toy, questions, (1,))
    assert len(entries) == 3
    ran = [entry.way() for entry in entries.values()]
    assert all(made.tokens == plain.tokens for made in ran)
    assert ran[0].acceptance is None and all(0 <= made.acceptance <= 1 for made in ran[1:])


def test_problems_are_mixed_and_frequent_tokens_end_texts(toy):
    questions = solving.mixed_questions(toy, 6)
    assert len(questions) == 8 and len(set(map(tuple, questions))) == 8
    few = solving.frequent_tokens(toy, 32)
    assert len(few) == 32 and 0 in few


def test_the_engine_is_measured_beside_batches(toy):
    report = engine.run_engine_bench(requests=4, slots=2, rounds=1)
    assert [(row.exits, row.way) for row in report.rows] == [("no early exit", "batches"), ("no early exit", "engine")]
    assert all(row.same_texts == 1 and 0 < row.mean_wait <= row.best for row in report.rows)
    assert report.rows[0].batches_over_this == 1


# Layers

def test_layers_are_measured_on_the_solutions_and_on_what_the_last_one_generates(toy, tmp_path):
    """Against the model's own logits, one text at a time."""
    report = layers.run_layers_bench(("one",), problems=3, picture=tmp_path / "layers.png")
    assert [(row.model, row.layer) for row in report.rows] == [("one", 1), ("one", 2)]
    model = toy.build(toy.params)
    logits = jax.jit(lambda tokens_BT: model.logits(model.hidden_states(tokens_BT)[1:, 0]))

    def read(question, text):
        """-log p of the text's tokens, and whether they are the likeliest, each [L, T]."""
        padded_BT = np.array([[*question, *text, *[0] * 256][:256]])  # one program; padding comes later than texts
        logp_LTV = jax.nn.log_softmax(logits(padded_BT)[:, len(question) - 1:len(question) + len(text) - 1])
        return -logp_LTV[:, np.arange(len(text)), text], logp_LTV.argmax(-1) == np.array(text)

    measured = []
    for problem in problems("heldout", 3):
        question = toy.text.encode(prompt(problem.question))
        generated = toy.generate(question, max_new_tokens=6).tokens[0]
        measured.append((*read(question, [*toy.text.encode(" " + problem.solution), 0]), read(question, generated)[1]))
    means = [np.concatenate(each, axis=1).mean(1) for each in zip(*measured, strict=True)]
    for name, expected in zip(("loss", "accuracy", "agreement"), means, strict=True):
        np.testing.assert_allclose([getattr(row, name) for row in report.rows], expected, rtol=1e-5)
    assert report.rows[1].agreement == 1 and all(0 <= row.solved <= 1 for row in report.rows)
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


# Equal texts

EXACT = dict(dtype="float32", texts=3, new_tokens=6, batch_size=2, exit_layer=1, draft=2)


@pytest.mark.exhaustive
def test_in_float32_every_way_gives_equal_texts(toy):
    report = exactness.run_exactness_bench(**EXACT)
    assert len(report.rows) == 7 and all((row.equal, row.texts, row.largest_gap) == (3, 3, None) for row in report.rows)


@pytest.mark.parametrize(("texts", "batch", "names"), [
    (2, 2, ["each alone", "by the engine, 2 slots"]), (5, 2, ["each alone", "batches of 4", "by the engine, 2 slots"]),
    (3, 2, ["each alone", "batches of 3", "by the engine, 2 slots"]), (1, 1, ["by the engine, 1 slot"])])
def test_ways_are_those_that_so_many_texts_have(toy, texts, batch, names):
    ways = exactness.decoded_in_every_way(toy, [[1]] * texts, 2, batch, 1, 2)
    assert [name for name in ways if "alone" in name or "batches" in name or "slot" in name] == names


def test_texts_are_compared_and_a_first_difference_is_measured_in_logits(toy, monkeypatch, tmp_path):
    """One token of one text is changed by hand: its logits are those of `score`."""
    settings, every = EXACT, exactness.decoded_in_every_way

    def with_a_wrong_one(lm, prompts, *rest):
        plain = every(lm, prompts, *rest)["plain"]
        return {"plain": plain, "right": plain, "wrong": lambda: [[*row[:2], 7, *row[3:]] if i == 1 else row
                                                                  for i, row in enumerate(plain())]}

    monkeypatch.setattr(exactness, "decoded_in_every_way", with_a_wrong_one)
    picture = tmp_path / "gaps.svg"
    report = exactness.run_exactness_bench(**settings, picture=picture)
    right, wrong, difference = report.rows
    assert (right.equal, wrong.equal, difference.way, difference.text, difference.number) == (3, 2, "wrong", 2, 3)
    prompt = solving.mixed_questions(toy, 3)[1]
    plain = toy.generate(prompt, max_new_tokens=6).tokens[0]
    one, other = toy.score([*prompt, *plain[:2]], [[plain[2]], [7]], normalise=False).totals
    assert difference.gap == pytest.approx(one - other, rel=1e-4) == wrong.largest_gap == wrong.median_gap
    assert difference.steps == pytest.approx(difference.gap / np.spacing(np.float32(one)), rel=1e-3)
    assert "2 | 3 |" in report.markdown() and picture.stat().st_size
