"""Grids; the rows of a sweep: their file, the certified choice, the Pareto front, fused sweeps."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sled
from sled.calibration.learn_then_test import p_value
from sled.errors import SettingError
from sled.eval.sweep import grid
from sled.eval.sweep import plot as sweep_picture
from sled.eval.sweep import result as sweep_result
from sled.eval.sweep.certified import certified, pareto
from sled.eval.sweep.measure import same_tokens
from sled.eval.sweep.plot import draw_sweep
from sled.eval.sweep.result import SweepFile, SweepRow, Swept


def test_grids_go_from_safe_to_risky_and_name_what_is_swept():
    methods = grid.early_exits([1, (4, 2)], [0.5, 0.9, 0.5], measures=["margin", "max_probability"], kv="propagate",
                               fusion=sled.SLED(rate=2, scale=5))
    exits = [method.decoding.exits for method in methods]
    assert len(methods) == 8 and methods[0].name == "SLED rate 2 scale 5, exit after 1, propagate, margin threshold 0.9"
    assert [each.threshold for each in exits] == [0.9, 0.5] * 4 and exits[-1].layers == (2, 4)
    assert exits[-1].kv == "propagate" and exits[-1].measure == "max_probability"
    assert [m.decoding.exits.draft for m in grid.self_speculation([2, 1], [4, 2])] == [2, 4, 2, 4]
    fused = grid.sled_settings([1, 2], [5, 10])
    assert [(m.decoding.fusion.rate, m.decoding.fusion.scale) for m in fused] == [(1, 5), (1, 10), (2, 5), (2, 10)]
    assert len({m.name for m in (*methods, *fused)}) == 12 and not any(m.leaves_early for m in fused)
    assert grid.no_exit(sled.DoLa()).name == "DoLa, no exit"


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
               high=1.0, unanswered=0, unfinished=0, lost=0.0, same_texts=1.0, same_tokens=1.0, mean_depth=2.5,
               acceptance=None, tokens=7,
               seconds=0.1, median_seconds=0.2, against_seconds=0.3, against_median_seconds=0.4,
               relative_speed=3.0, right="010")
TEXTS = [{"method": "m", "responses": [[text]]} for text in ("a", "b\n\u2028\r", "\u00e9")]


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
    monkeypatch.setattr(sweep_picture, "save_figure", lambda figure, _: figures.append(figure))
    draw_sweep(fused(), tmp_path / "fused.svg")
    time = figures[0].axes[1]
    assert time.get_xlabel() == "times as fast as SLED, no exit"
    at = {line.get_marker(): line.get_xydata().tolist() for line in time.lines}
    assert at["*"] == [[1, 0.9]] and at["p"] == [[pytest.approx(0.8), 0.8]]  # of two such marks the last


@pytest.mark.parametrize(("accuracies", "n", "ticks", "says"), [
    ((0.0, 0.0, 0.0), 10, "0%", "no method solves any question"), ((0.0, 0.01, 0.0), 100, "0%", None),
    ((0.3, 0.0, 0.1), 100, "0%", None), ((0.69, 0.5, 0.6), 30, "60%", None), ((0.95, 0.0, 0.9), 100, "0%", None),
    ((1.0, 1.0, 1.0), 3, "100%", None),
])
def test_pictures_show_all_markers_whole_at_any_accuracy(tmp_path, monkeypatch, accuracies, n, ticks, says):
    figures = []
    monkeypatch.setattr(sweep_picture, "save_figure", lambda figure, _: figures.append(figure))
    rows = [dataclasses.replace(row, accuracy=accuracy, n=n, low=max(accuracy - 0.1, 0), high=min(accuracy + 0.2, 1))
            for row, accuracy in zip(fused().rows[1:4], accuracies, strict=True)]
    draw_sweep(dataclasses.replace(fused(), rows=tuple(rows), what="a long story " * 30), tmp_path / "low.svg")
    [depth, *_] = figures[0].axes
    to_pixels = depth.transData.transform
    low, high = depth.get_ylim()
    bottom, top = (to_pixels((0, y))[1] for y in (low, high))
    for accuracy in accuracies:  # a marker of 7 points, at 100 pixels an inch
        assert bottom + 5 < to_pixels((0, accuracy))[1] < top - 5
    figures[0].canvas.draw()
    assert figures[0].get_suptitle().count("story") == 30
    assert figures[0]._suptitle.get_window_extent().width < figures[0].bbox.width
    assert ticks in [label.get_text() for label in depth.get_yticklabels()]
    assert [text.get_text() for text in depth.texts] == [says] * bool(says)
    front = {line.get_linewidth() for line in depth.lines if len(line.get_xdata())}
    assert (6 in front) == (max(accuracies) > 0.01)


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_gives_its_whole_rows(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "sweep.csv"
    rows = [dataclasses.replace(ROW, digest=str(i)) for i in range(3)]
    for row in rows:
        SweepFile(path).append(row, TEXTS)
    text, samples = path.read_bytes(), (path.parent / "samples.jsonl").read_bytes()
    cut = int(share * len(text))
    path.write_bytes(text[:cut])
    whole = max(text[:cut].count(b"\n") - 1, 0)
    assert list(SweepFile(path).by_digest.values()) == rows[:whole]
    for row in rows[whole:]:
        SweepFile(path).append(row, TEXTS)
    assert path.read_bytes() == text and (path.parent / "samples.jsonl").read_bytes() == samples

    cut = int(share * len(samples))  # and without their samples, rows do not count
    (path.parent / "samples.jsonl").write_bytes(samples[:cut])
    whole = samples[:cut].count(b"\n") // 3
    assert list(SweepFile(path).by_digest.values()) == rows[:whole]
    assert (path.parent / "samples.jsonl").read_bytes().count(b"\n") == 3 * whole


@pytest.mark.parametrize(("damage", "says"), [
    (lambda text: text.replace("digest", "key", 1), "other columns"),
    (lambda text: text.replace("0.25", "no number"), "line 2, is damaged"),
    (lambda text: text.replace("010", "01"), "2 marks for 3"),
    (lambda text: text + "a,b\n", "line 3, is damaged"),
], ids=["columns", "number", "marks", "short"])
def test_damaged_files_are_refused_by_line(tmp_path, damage, says):
    path = tmp_path / "sweep.csv"
    SweepFile(path).append(dataclasses.replace(ROW, seconds=0.25), TEXTS)
    path.write_text(damage(path.read_text()))
    with pytest.raises(SettingError, match=says):
        SweepFile(path)


def test_rows_are_on_the_disk_before_the_next_is_measured(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(sweep_result.os, "fsync", synced.append)
    SweepFile(tmp_path / "sweep.csv").append(ROW, TEXTS)
    assert len(synced) == 3  # the head, the samples and the row

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_result.os, "fsync", full)
    with pytest.raises(SettingError, match=r"samples\.jsonl cannot be written .No space left on device.; make room"):
        SweepFile(tmp_path / "sweep.csv").append(dataclasses.replace(ROW, digest="other"), TEXTS)


def test_tokens_at_the_same_place():
    assert same_tokens([[1, 2, 3], [4]], [[1, 9, 3, 4], [4, 5]]) == 3 / 6
    assert same_tokens([[]], [[]]) == 0 and same_tokens([[1, 2]], [[1]]) == 1
