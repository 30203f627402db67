"""Sweeps: grids, what a row holds, resuming, the certified choice, the Pareto front, the command."""

import copy
import csv
import dataclasses
import functools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from demo_toy import THREE, demo_toy
from hypothesis import given, settings
from hypothesis import strategies as st

import sled
from sled.calibration.learn_then_test import p_value
from sled.cli import main
from sled.decoding import loop
from sled.errors import DataError, SettingError
from sled.eval.methods import Method
from sled.eval.questions import Questions, demo_questions, read_questions
from sled.eval.sweep import grid
from sled.eval.sweep import plot as sweep_picture
from sled.eval.sweep import result as sweep_result
from sled.eval.sweep import sweep as sweeping
from sled.eval.sweep.certified import certified, pareto
from sled.eval.sweep.plot import draw_sweep
from sled.eval.sweep.result import SweepFile, SweepRow, Swept
from sled.eval.sweep.sweep import same_tokens, sweep
from sled.exits import Policy
from sled.results import Output, Stats
from sled.timing import Times

# Five, as many as in no other test of the toy: programs that others compiled would not count as this one's.
QUESTIONS = Questions(tuple(f"Question: {n} and {n}?\nAnswer:" for n in range(5)), (0, 2, 4, 6, 8), "sums")
EARLY = grid.early_exits([1], [0.0, 1.0, 0.5])
DRAFTS = grid.self_speculation([1], [3, 1])


def run(lm, folder, methods=(*EARLY, *DRAFTS), questions=QUESTIONS, **how):
    return sweep(lm, methods, questions, folder, **{"rounds": 1, "max_new_tokens": 6, "progress": False, **how})


@pytest.fixture
def scripted(monkeypatch):
    """The toy with a script instead of a model: `scripted.calls` are the exits it was asked for. At threshold t the
    first (1 - t) of the answers are wrong, and it takes t seconds; without exits, or drafting, all are right, in 1."""

    def generate(prompts, *, exits, **_):
        lm.calls.append(exits)
        t = getattr(exits, "threshold", 1.0)
        wrong = round((1 - t) * len(prompts))
        texts = [f"#### {'no' if i < wrong else 2 * i}" for i in range(len(prompts))]
        stats = Stats(prompt_tokens=1, new_tokens=2 * len(prompts), prefill_seconds=0, decode_seconds=1,
                      mean_depth=3 * t, drafted=10 * (t == 1), accepted=5)
        return Output(texts, [[i, i >= wrong] for i in range(len(prompts))], [], [], stats)

    def interleave(calls, rounds, bar):
        assert next(iter(calls)).endswith("no exit")  # the baseline, in every round
        for call in calls.values():
            call()
        seconds = lambda name: max(float(name.rpartition("threshold ")[2]), 0.01) if "threshold" in name else 1.0  # noqa: E731
        return {name: Times([seconds(name), 9.0]) for name in calls}

    lm = copy.copy(demo_toy())
    lm.name, lm.generate, lm.calls, lm.config = "scripted", generate, [], THREE
    monkeypatch.setattr(sweeping, "interleave", interleave)
    monkeypatch.setattr(sweeping, "draw_sweep", lambda _, path: path.write_bytes(b"a picture") and path)
    return lm


def many(n):
    return Questions(tuple(f"q {i}" for i in range(n)), tuple(2 * i for i in range(n)), "questions")


def test_grids_go_from_safe_to_risky_and_name_what_is_swept():
    methods = grid.early_exits([1, (4, 2)], [0.5, 0.9, 0.5], measures=["margin", "max_probability"], kv="propagate",
                               fusion=sled.SLED(rate=2, scale=5))
    assert len(methods) == 8 and methods[0].name == "SLED rate 2 scale 5, exit after 1, propagate, margin threshold 0.9"
    assert [m.exits.threshold for m in methods] == [0.9, 0.5] * 4 and methods[-1].exits.layers == (2, 4)
    assert methods[-1].exits.kv == "propagate" and methods[-1].exits.measure == "max_probability"
    assert [m.exits.draft for m in grid.self_speculation([2, 1], [4, 2])] == [2, 4, 2, 4]
    settings = grid.sled_settings([1, 2], [5, 10])
    assert [(m.fusion.rate, m.fusion.scale) for m in settings] == [(1, 5), (1, 10), (2, 5), (2, 10)]
    assert len({m.name for m in (*methods, *settings)}) == 12 and all(m.exits is None for m in settings)
    assert grid.no_exit(sled.DoLa()).name == "DoLa, no exit"
    assert grid.usual_layers(8) == (1, 2, 4, 6) and grid.usual_layers(32) == (4, 8, 16, 24)
    assert grid.usual_layers(2) == (1,) and grid.usual_layers(1) == ()
    with pytest.raises(SettingError, match="threshold"):
        grid.early_exits([1], [40.0])


def test_a_sweep_compiles_each_program_once_and_says_what_happened(tmp_path):
    toy = demo_toy()
    before = loop.decode._cache_size()
    swept = run(toy, tmp_path / "new" / "folder")
    assert loop.decode._cache_size() == before + 3  # no exit, early exit, speculation
    rows = {row.method: row for row in swept.rows}
    full, one, half, none, *drafts = swept.rows
    assert [row.method for row in swept.rows] == ["no exit", *(m.name for m in (*EARLY, *DRAFTS))]
    assert (full.mean_depth, full.against, full.relative_speed, full.layers) == (2, "no exit", 1, "")
    assert (one.mean_depth, one.same_texts, one.same_tokens, one.lost) == (2, 1, 1, 0)
    assert none.mean_depth == 1 <= half.mean_depth <= 2
    assert [row.settings["threshold"] for row in (none, half)] == [0, 0.5] and not half.verifies
    assert all(row.same_texts == 1 and 0 <= row.acceptance <= 1 and row.verifies for row in drafts)
    assert [row.settings["draft"] for row in drafts] == [1, 3] and full.acceptance is None is none.acceptance
    for row in swept.rows:
        assert row.seconds > 0 and row.tokens_per_second == pytest.approx(row.tokens / row.seconds)
        assert row.relative_speed == pytest.approx(row.against_seconds / row.seconds) and row.low <= row.accuracy
    assert swept.sequences == (tuple(m.name for m in EARLY), tuple(m.name for m in DRAFTS))
    again = run(toy, tmp_path / "b", [*grid.early_exits([1], [0.2, 0.7]), *grid.self_speculation([1], [2])], rounds=2)
    assert loop.decode._cache_size() == before + 3 and len(again.rows) == 4  # other numbers, no other program
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"sweep.csv", "sweep.md", "sweep.png"}
    with (tmp_path / "new" / "folder" / "sweep.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [row["method"] for row in kept] == list(rows) and all(len(row["right"]) == 5 for row in kept)
    assert float(kept[2]["seconds"]) == half.seconds  # all digits


def test_fusions_are_compared_with_plain_decoding_and_exits_with_their_own_fusion(scripted, tmp_path):
    fusion = sled.ClampOnly(5)
    swept = run(scripted, tmp_path, [*grid.early_exits([1], [0.5], fusion=fusion), *grid.sled_settings([1], [5])])
    against = {row.method: row.against for row in swept.rows}
    assert against == {"no exit": "no exit", "ClampOnly scale 5, no exit": "no exit",
                       "ClampOnly scale 5, exit after 1, threshold 0.5": "ClampOnly scale 5, no exit",
                       "SLED rate 1 scale 5, no exit": "no exit"}
    assert swept.sequences == (("ClampOnly scale 5, exit after 1, threshold 0.5",),)
    only = run(scripted, tmp_path, grid.sled_settings([1, 2], [5]))
    assert only.choice() == (None, ()) and "none is chosen" in only.markdown()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["nerve"], meta_fields=["every"])
@dataclasses.dataclass(frozen=True)
class Own(Policy):
    """A policy that this package does not know."""

    every: tuple[int, ...]
    nerve: float
    verifies, propagates, schedule, window, positions_per_token = False, False, sled.Immediate(), 9, 1

    def exits(self, num_layers):
        return (*self.every, num_layers)

    def prepare(self, network):
        return None

    def at_exit(self, view):
        raise NotImplementedError


def test_a_policy_of_ones_own_is_swept_by_its_settings(scripted, tmp_path):
    methods = [Method(f"{every} {nerve}", exits=Own(every, nerve)) for every in ((1,), (1, 2)) for nerve in (0.2, 0.1)]
    swept = run(scripted, tmp_path, methods)
    assert [row.layers for row in swept.rows] == ["", "1", "1", "1 2", "1 2"] and not swept.rows[1].verifies
    again = run(scripted, tmp_path, methods)
    assert again.rows == swept.rows
    kind, *settings = again.rows[4].settings.items()
    assert kind[1].endswith("Own") and settings == [("every", [1, 2]), ("nerve", 0.1)]
    assert draw_sweep(swept, tmp_path / "own.svg").stat().st_size > 5000
    drafts = [dataclasses.replace(row, verifies=bool(row.layers)) for row in swept.rows]
    assert draw_sweep(dataclasses.replace(swept, rows=tuple(drafts)), tmp_path / "own.svg").exists()


def test_interrupted_sweeps_go_on(scripted, tmp_path):
    whole = run(scripted, tmp_path / "whole")
    assert len(scripted.calls) == 6 + (1 + 4 + 3)  # each once; then no exit beside each program's, in the round
    scripted.calls.clear()
    again = run(scripted, tmp_path / "whole")
    assert not scripted.calls and again.rows == whole.rows and again.markdown() == whole.markdown()

    # A process that is killed in the middle of the last row but one.
    *begun, last_but_one, _ = (tmp_path / "whole" / "sweep.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "sweep.csv").write_bytes(b"".join(begun))
    code = ("import os, sys; out = open(sys.argv[1], 'ab', buffering=0); "
            f"out.write({last_but_one[:90]!r}); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "sweep.csv"]).returncode == -9
    resumed = run(scripted, tmp_path)
    assert len(scripted.calls) == 3 + 3 and len(set(row.run for row in resumed.rows)) == 2
    plain = lambda rows: [dataclasses.replace(row, run="") for row in rows]  # noqa: E731
    assert plain(resumed.rows) == plain(whole.rows)
    assert "These rows stem from 2 runs" in resumed.markdown() and "stem from" not in whole.markdown()
    assert (tmp_path / "sweep.csv").read_bytes().count(b"\n") == 7


def test_what_changed_is_measured_again(scripted, tmp_path):
    usual = dict(methods=EARLY[:1])
    run(scripted, tmp_path, **usual)
    for change in (dict(rounds=2), dict(max_new_tokens=5), dict(batch_size=2), dict(questions=many(5)),
                   dict(questions=dataclasses.replace(QUESTIONS, answers=(0, 2, 4, 6, 9))),
                   dict(methods=grid.early_exits([1], [1.0], kv="propagate")),
                   dict(methods=[dataclasses.replace(EARLY[0], schedule=sled.Gather(2))])):
        scripted.calls.clear()
        run(scripted, tmp_path, **{**usual, **change})
        assert scripted.calls, change
    scripted.calls.clear()
    run(scripted, tmp_path, **usual)
    assert not scripted.calls
    scripted.params = jax.tree.map(lambda x: x + 1, scripted.params)
    run(scripted, tmp_path, **usual)
    assert scripted.calls


def test_the_fastest_certified_setting(scripted, tmp_path):
    methods = [*grid.early_exits([1, 2], [0.99, 0.9, 0.5]), *DRAFTS]
    swept = run(scripted, tmp_path, methods, many(400), delta=0.05)
    chosen, passed = swept.choice()
    assert chosen == "exit after 1, threshold 0.99" and len(passed) == 4  # 1% is lost at 0.99, 10% at 0.9
    said = swept.markdown()
    assert "each of the 4 certified methods, of 8 tested in 3 sequences" in said and "fastest of them: exit" in said
    assert "| yes |" in said and "| no |" in said and "1.01 times as fast as no exit" in said
    assert "so their tokens/s do not compare; times as fast does" in said
    assert dataclasses.replace(swept, delta=0.25).choice().method == "exit after 1, threshold 0.9"
    only = run(scripted, tmp_path, DRAFTS, many(400))
    assert only.choice().method is None and "None of them was faster" in only.verdict()
    few = run(scripted, tmp_path, methods, many(20))
    assert few.choice() == (None, ()) and "it takes 80 questions here, and 20 were asked" in few.verdict()


def test_levels_pass_from_one_sequence_to_the_others():
    assert certified([[0.05]], 0.05) == [1] and certified([[0.051]], 0.05) == [0]
    assert certified([[0.025], [0.05]], 0.05) == [1, 1]  # Holm
    assert certified([[0.026], [0.05]], 0.05) == [0, 0]
    assert certified([[0.05, 0.05, 0.06, 0.0]], 0.05) == [2]  # a fixed sequence ends at the first that fails
    assert certified([[0.02, 0.03], [0.03, 0.01]], 0.05) == [1, 0]
    assert certified([[0.02, 0.02], [0.03, 0.01]], 0.05) == [2, 2]
    assert certified([[], [0.05]], 0.05) == [0, 1] and certified([], 0.05) == []


@pytest.mark.parametrize("means", [
    [[0.11] * 4] * 4,  # every claim is true, just so
    [[0.02, 0.06, 0.101, 0.3], [0.105, 0.01, 0.2, 0.01], [0.0, 0.0, 0.0, 0.0]],
    [[0.0]] * 3 + [[0.104]] * 3,
], ids=["all", "mixed", "single"])
def test_certified_losses_exceed_delta_as_rarely_as_promised(means):
    rng, delta, epsilon, n, draws, wrong = np.random.default_rng(0), 0.1, 0.1, 150, 1000, 0
    of = [p_value(k / n, n, delta) for k in range(n + 1)]
    for _ in range(draws):
        lost = [[of[k] for k in rng.binomial(n, row)] for row in means]
        wrong += any(mean > delta for row, count in zip(means, certified(lost, epsilon), strict=True)
                     for mean in row[:count])
    assert wrong / draws <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / draws)


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_the_pareto_front_is_what_nothing_beats(xy):
    x, y = [a for a, _ in xy], [b for _, b in xy]
    beaten = {i for i, (a, b) in enumerate(xy) if any(c >= a and d >= b and (c, d) != (a, b) for c, d in xy)}
    front = pareto(x, y)
    assert sorted(front) == [i for i in range(len(xy)) if i not in beaten]
    assert [x[i] for i in front] == sorted(x[i] for i in front)
    assert [y[i] for i in front] == sorted((y[i] for i in front), reverse=True)


ROW = SweepRow(digest="d", run="r", machine="an, \"odd\" one", versions="v", method="m", against="a", layers="1 2",
               verifies=False, policy='{"kind": "sled.EarlyExit", "threshold": 0.1}', n=3, accuracy=1 / 3, low=0.0,
               high=1.0, lost=0.0, same_texts=1.0, same_tokens=1.0, mean_depth=2.5, acceptance=None, tokens=7,
               seconds=0.1, median_seconds=0.2, against_seconds=0.3, against_median_seconds=0.4,
               tokens_per_second=70.0, relative_speed=3.0, right="010")


def fused():
    """SLED takes 2 seconds where plain decoding takes 1; an exit 1.25 where SLED takes 2.5; SLED at another rate 4
    where plain decoding takes 1.6."""
    row = lambda method, against, took, base, accuracy, **has: dataclasses.replace(  # noqa: E731
        ROW, digest=method, method=method, against=against, seconds=took, against_seconds=base, accuracy=accuracy,
        relative_speed=base / took, mean_depth=3, **{"layers": "", "policy": "{}", **has})
    rows = (row("no exit", "no exit", 1.0, 1.0, 0.5), row("SLED, no exit", "no exit", 2.0, 1.0, 0.9),
            row("SLED, exit", "SLED, no exit", 1.25, 2.5, 0.7, layers="1", policy='{"threshold": 0.5}'),
            row("SLED, bad exit", "SLED, no exit", 5.0, 2.5, 0.4, layers="1", policy='{"threshold": 0.4}'),
            row("other SLED, no exit", "no exit", 4.0, 1.6, 0.8))
    return Swept(rows, (("SLED, exit", "SLED, bad exit"),), delta=0.1, epsilon=0.1, num_layers=3, what="q")


def test_every_row_of_a_fused_sweep_is_placed_by_the_baseline_of_the_exits():
    swept = fused()
    assert swept.baseline().method == "SLED, no exit"
    assert {row.method: swept.speed(row) for row in swept.rows} == pytest.approx({
        "no exit": 2, "SLED, no exit": 1, "SLED, exit": 2, "SLED, bad exit": 0.5, "other SLED, no exit": 0.8})
    depth, speed = ([row.method for row in front] for front in swept.fronts())
    assert depth == ["SLED, no exit"] and speed == ["SLED, no exit", "SLED, exit"]
    assert "timed beside SLED, no exit, the others beside no exit" in swept.markdown()
    plain = dataclasses.replace(swept, rows=(swept.rows[0], swept.rows[1], swept.rows[4]), sequences=())
    assert plain.baseline().method == "no exit" and plain.speed(plain.rows[2]) == plain.rows[2].relative_speed
    assert [row.method for row in plain.fronts()[1]] == ["SLED, no exit", "no exit"]
    assert "timed beside" not in plain.markdown()


def test_the_picture_of_a_fused_sweep_has_its_baseline_at_1(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(sweep_picture, "FigureCanvasAgg", figures.append)
    draw_sweep(fused(), tmp_path / "fused.svg")
    time = figures[0].axes[1]
    assert time.get_xlabel() == "times as fast as SLED, no exit"
    at = {line.get_marker(): line.get_xydata().tolist() for line in time.lines}
    assert at["*"] == [[1, 0.9]] and at["p"] == [[pytest.approx(0.8), 0.8]]  # of two such marks the last


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_gives_its_whole_rows(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "sweep.csv"
    rows = [dataclasses.replace(ROW, digest=str(i)) for i in range(3)]
    for row in rows:
        SweepFile(path).append(row)
    text = path.read_bytes()
    cut = int(share * len(text))
    path.write_bytes(text[:cut])
    whole = max(text[:cut].count(b"\n") - 1, 0)
    assert list(SweepFile(path).by_digest.values()) == rows[:whole]
    for row in rows[whole:]:
        SweepFile(path).append(row)
    assert path.read_bytes() == text


@pytest.mark.parametrize(("damage", "says"), [
    (lambda text: text.replace("digest", "key", 1), "other columns"),
    (lambda text: text.replace("0.25", "no number"), "line 2, is damaged"),
    (lambda text: text.replace("010", "01"), "2 marks for 3"),
    (lambda text: text + "a,b\n", "line 3, is damaged"),
], ids=["columns", "number", "marks", "short"])
def test_damaged_files_are_refused_by_line(tmp_path, damage, says):
    path = tmp_path / "sweep.csv"
    SweepFile(path).append(dataclasses.replace(ROW, seconds=0.25))
    path.write_text(damage(path.read_text()))
    with pytest.raises(SettingError, match=says):
        SweepFile(path)


def test_rows_are_on_the_disk_before_the_next_is_measured(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(sweep_result.os, "fsync", synced.append)
    SweepFile(tmp_path / "sweep.csv").append(ROW)
    assert len(synced) == 2  # the head and the row


def test_tokens_at_the_same_place():
    assert same_tokens([[1, 2, 3], [4]], [[1, 9, 3, 4], [4, 5]]) == 3 / 6
    assert same_tokens([[]], [[]]) == 0 and same_tokens([[1, 2]], [[1]]) == 1


@pytest.mark.parametrize(("methods", "how", "says"), [
    (["no exit"], {}, "methods holds 'no exit'"), ([], {}, "methods holds nothing"),
    (EARLY, dict(questions=[]), r"questions is \[\], which is no Questions; give what demo_questions"),
    (EARLY, dict(lm="demo"), "lm is 'demo', but must be an instance, .* give what sled.load returns"),
    (EARLY, dict(max_new_tokens=1000), "holds 512 tokens, and question 1 of sums takes 11 .* ask for at most 501 "),
    (grid.early_exits([3], [0.5]), {}, "no early exit of a model"),
    ([Method("m", exits=sled.EarlyExit(1)), Method("m", exits=sled.EarlyExit(2))], {}, "two methods are called 'm'"),
    ([Method("a\nb")], {}, "no single line"),
    ([*EARLY, *grid.early_exits([1], [0.5], fusion=sled.SLED())], {}, "several fusions"),
    (EARLY, dict(rounds=0), "rounds is 0"), (EARLY, dict(batch_size=0), "batch_size is 0"),
    (EARLY, dict(delta=0), "must be a number in"), (EARLY, dict(epsilon=1), "must be a number in"),
    (EARLY, dict(folder="/proc/none"), "folder is '/proc/none', which cannot be written to"),
], ids=range(14))
def test_what_cannot_be_swept(scripted, tmp_path, methods, how, says):
    with pytest.raises(SettingError, match=says):
        run(**{"lm": scripted, "folder": tmp_path, "methods": methods, **how})
    assert not scripted.calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sweep.md", "sweep.png"])
def test_files_of_ones_own_are_not_replaced(command, scripted, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert command("-o", tmp_path, "--problems", 2) == 1
    assert f"--output is '{tmp_path}', which holds {name} that sled did not write" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine" and not scripted.calls and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SettingError, match="folder is"):
        run(scripted, tmp_path)


def test_questions_from_a_file(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [{"q": "1+1?", "a": "2", "s": "so\n#### 1,002"}, {"q": "a half?", "a": "0.5", "s": "#### $7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_questions(str(path), prompt="Question: {q}\nAnswer:", answer="a")
    assert asked.prompts == ("Question: 1+1?\nAnswer:", "Question: a half?\nAnswer:")
    assert asked.answers == (2, Fraction(1, 2)) and asked.right(["#### 2.0", "#### 0.5 or so"]) == [True, True]
    first = read_questions(path, prompt="q", answer="s", limit=1)
    assert (first.prompts, first.answers, first.source) == (("1+1?",), (1002,), "questions of asked.jsonl")
    with pytest.raises(DataError, match=r"asked\.jsonl, example 1, has the answer '1\+1\?', in which no number"):
        read_questions(path, prompt="s", answer="q")
    path.write_text('{"q": "1?", "a": 1}\n{"q": "2?", "a": 0.00001}\n')
    assert read_questions(path, prompt="q", answer="a").answers == (1, Fraction(1, 100_000))
    for value, said in (("3/4", "3/4"), ("s\n#### 1 or 2", "1 or 2"), ("1 000", "1 000"), ("a half?", r"a half\?")):
        path.write_text("".join(json.dumps({"q": "q?", "a": each}) + "\n" for each in (1, value)))
        with pytest.raises(DataError, match=f"example 2, has the answer '{said}', .*give one such as 54, .* 1e-5"):
            read_questions(path, prompt="q", answer="a")


def test_questions_are_checked():
    assert demo_questions(3).prompts[0].startswith("Question: ") and len(demo_questions(3).answers) == 3
    with pytest.raises(SettingError, match="count is 0"):
        demo_questions(0)
    with pytest.raises(SettingError, match="2 prompts and 1 answers"):
        Questions(("a", "b"), (1,), "x")


def test_pictures_of_every_kind_of_sweep(scripted, tmp_path):
    measures = grid.early_exits([1, (1, 2)], [0.9, 0.5], measures=["margin", "entropy"])
    for i, methods in enumerate([[*measures, *DRAFTS], DRAFTS, grid.sled_settings([1, 2], [5])]):
        swept = run(scripted, tmp_path, methods, many(100), delta=0.4)
        assert draw_sweep(swept, tmp_path / f"{i}.svg").stat().st_size > 5000
    with pytest.raises(SettingError, match="ending is none of"):
        draw_sweep(swept, tmp_path / "sweep.bmp")


def test_the_documentations_python_runs(command, scripted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sled, "load", lambda *_, **__: scripted)
    scripted.config = dataclasses.replace(THREE, num_layers=8, windows=THREE.windows[:1] * 8)
    text = (Path(sled.__file__).parents[1] / "docs" / "sweeps.md").read_text()
    blocks = text.split("```python\n")[1:]
    exec("\n".join(block.partition("```")[0] for block in blocks), {})
    assert len(blocks) == 2 and (tmp_path / "sweep" / "sweep.md").exists() and (tmp_path / "comparison.png").exists()


@pytest.fixture
def command(scripted, monkeypatch):
    """`command(*arguments)`: the exit status of `sled sweep`, with the scripted model."""
    monkeypatch.setattr(sled, "load", lambda *_, **__: scripted)
    return lambda *arguments: main(["sweep", *map(str, arguments)])


def test_the_command(command, scripted, tmp_path, capsys):
    assert command("-o", tmp_path, "--problems", 4, "--exit-layers", 1, "1,2", "--thresholds", 0.9, 0.5, "--drafts", 2,
                   "--draft-layers", 2, "--rates", 1, "--scales", 5, 10) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in (
        "no exit", "exit after 1, threshold 0.9", "exit after 1 2, threshold 0.5", "speculation after 2, draft 2",
        "SLED rate 1 scale 10, no exit"))
    assert (tmp_path / "sweep.md").read_text() == out and (tmp_path / "sweep.png").exists()
    scripted.calls.clear()
    (tmp_path / "own.jsonl").write_text('{"q": "0?", "a": 0}\n{"q": "1?", "a": 2}\n')
    assert command("-o", tmp_path / "own", "--data", tmp_path / "own.jsonl", "--prompt", "{q}", "--answer", "a",
                   "--thresholds", "--fusion", "sled", "--rate", 2) == 0
    own = (tmp_path / "own" / "sweep.md").read_text()
    assert "scripted, 2 questions of own.jsonl, at most 96 new" in own
    assert own.count("| SLED rate 2 scale 10, speculation after") == 2 * 4  # layers x drafts


@pytest.mark.parametrize(("arguments", "says"), [
    (["--thresholds", "--drafts"], "nothing is left to sweep"), (["--rates", "1"], "--rates and --scales go together"),
    (["--thresholds", "--drafts", "--rates", "1", "--scales", "5", "--fusion", "dola"],
     "--fusion has no meaning without --thresholds or --drafts"),
    (["--thresholds", "--exit-layers", "1"], "--exit-layers has no meaning without --thresholds"),
    (["--drafts", "--draft-layers", "1"], "--draft-layers has no meaning without --drafts"),
    (["--exit-layers", "one"], "--exit-layers is 'one'"), (["--problems", "0"], "count is 0"),
    (["--prompt", "q"], "--data, which was not given"), (["--data", "x.jsonl"], "without --prompt or --answer"),
    (["--data", "x.jsonl", "--prompt", "q", "--answer", "a"], "no file at 'x.jsonl'"),
    (["-m", "other"], "no questions were given for other"), (["--exit-layers", "9"], "no early exit of a model of 3"),
    (["--thresholds", "2"], "EarlyExit.threshold is 2"),
], ids=str)
def test_mistakes_are_named(command, tmp_path, capsys, arguments, says):
    assert command("-o", tmp_path, *arguments) == 1
    assert says in capsys.readouterr().err
