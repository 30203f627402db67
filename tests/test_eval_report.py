"""Evaluations: methods compared on the same samples, and a report that is written whole and replaces nobody's files."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from harness_tasks import QUESTIONS, lm_eval, write_rows

import sled
from sled import cli
from sled.cli.evaluate import Eval
from sled.cli.line import parse
from sled.errors import EvaluationError, EvaluationWarning, SettingError, SledError
from sled.eval.methods import Method, baselines
from sled.eval.report import report as report_module
from sled.eval.report.report import EvaluationReport, report_folder
from sled.eval.report.run import evaluate
from sled.io import written_whole

pytest_plugins = ["harness_tasks"]
pytestmark = pytest.mark.usefixtures("no_listing")
BASE, OTHER = np.arange(80) % 3 > 0, np.arange(80) % 4 > 0


@pytest.mark.parametrize("method, idle", [
    (Method("early", exits=sled.EarlyExit((1,), threshold=0.5)), "exits"),
    (Method("draft", exits=sled.SelfSpeculation(1)), "exits"),
    (Method("warm", sampling=sled.Sampling(temperature=1.0)), "sampling"),
])
def test_log_likelihoods_are_refused_where_a_setting_would_do_nothing(lm, tiny_tasks, method, idle):
    with pytest.raises(EvaluationError, match=f"'tiny_choice' asks for log-likelihoods, which never depend on "
                                              f"the {idle} of a method: the figures of '{method.name}' would"):
        evaluate(lm, "tiny_choice", [method], include_path=[tiny_tasks], progress=False)


def test_choices_are_not_scored_where_what_is_left_out_has_no_finite_score(lm, tiny_tasks):
    with pytest.raises(EvaluationError, match="'tiny_choice' asks for log-likelihoods, but 'm' gives minus infinity"):
        evaluate(lm, "tiny_choice", [Method("m", fusion=sled.DoLa())], include_path=tiny_tasks, progress=False)


@pytest.mark.parametrize("fusion", [sled.SLED(), sled.SLED(lower_bound=-9.0), sled.ClampOnly(), sled.DoLa(),
                                    sled.DoLa(lower_bound=-9.0)], ids=str)
def test_whole_texts_are_not_scored_where_tokens_are_left_out(lm, tiny_tasks, fusion):
    with pytest.raises(EvaluationError, match="'tiny_rolling' asks for the log-likelihood of whole texts, but 'm' "):
        evaluate(lm, ["tiny_text", "tiny_rolling"], [Method("m", fusion=fusion)], include_path=tiny_tasks)


@pytest.mark.parametrize("words, names", [
    ("", ["greedy"]), ("--seed 3", ["greedy"]), ("--fusion final", ["greedy"]),
    ("--temperature 0.5 --top-k 4 --seed 3", ["final layer, temperature 0.5, top k 4"]),
    ("--fusion sled --rate 2 --temperature 1", ["SLED, rate 2, temperature 1"]),
    ("--fusion sled dola confident --rate 3", ["SLED, rate 3", "DoLa", "ConfidentDecoding"]),
    ("--fusion sled dola clamp --lower-bound -9 --layers 0 4",
     ["SLED, lower bound -9, layers 0 4", "DoLa, lower bound -9, layers 0 4", "clamp only, lower bound -9"]),
    ("--fusion sled 'sled --layers 0 8 --rate 1' 'dola  --lower-bound -1' --lower-bound -9 --rate 3",
     ["SLED, rate 3", "SLED, rate 1, layers 0 8", "DoLa, lower bound -1"]),
    ("--fusion sled 'sled --layers 0 4 8 12 16' 'sled --layers 0 1 2 3' --rate 1 --temperature 1",
     ["SLED, temperature 1", "SLED, layers 0 4 .. 16, temperature 1", "SLED, layers 0 1 2 3, temperature 1"]),
    ("--fusion confident 'confident --window 4' --no-norm-early", ["ConfidentDecoding", "ConfidentDecoding, window 4"]),
    ("--fusion final clamp", ["greedy", "clamp only"]),
])
def test_the_command_calls_methods_by_their_options(words, names):
    eval = parse(Eval, "sled eval", ["--tasks", "sled_demo", *shlex.split(words)])
    assert eval._names(eval.fusion_options.each()) == names


@pytest.mark.parametrize("words, says", [
    ("--rate 2", "--rate has no meaning for --fusion final;"),
    ("--fusion dola clamp --rate 2", "--rate has no meaning for --fusion dola clamp;"),
    ("--fusion sledd", "--fusion has 'sledd', but must begin with one of final, sled"), ("--fusion", "has ''"),
    ("--fusion sled 'sled,rate=2'", "has 'sled,rate=2'"), ("--fusion sled dola --window 3", "--window has no meaning"),
    ("--fusion sled sled", "has 'sled' twice")])
def test_fusions_that_do_not_fit_are_named(command, words, says):
    code, _, err = command("eval", "--tasks", "sled_demo", *shlex.split(words), "-o", "nowhere")
    assert code == 1 and says in err and not Path("nowhere").exists()


@pytest.mark.parametrize("methods, names", [
    ([{}, dict(rate=3.0), dict(layers=(0, 1))], ["greedy", "clamp only"]),
    ([{}, dict(scale=5)], ["greedy", "clamp only, scale 10", "clamp only, scale 5"]),
    ([dict(lower_bound=-9), dict(lower_bound=-8, scale=5)],
     ["greedy", "clamp only, scale 10, lower bound -9", "clamp only, scale 5, lower bound -8"]),
    ([dict(scale=5), sled.ClampOnly(scale=5)], ["greedy"]), ([sled.FinalLayer(), {}], ["clamp only"]),
    ([sled.DoLa(), sled.ConfidentDecoding()], ["greedy"])])
def test_several_methods_have_each_baseline_once(methods, names):
    methods = [Method(str(n), fusion=sled.SLED(**fusion) if isinstance(fusion, dict) else fusion)
               for n, fusion in enumerate(methods)]
    assert [base.name for base in baselines(*methods)] == names


def test_baselines_are_plain_decoding_and_the_clamp():
    method = Method("mine", fusion=sled.SLED(rate=3.0, scale=20, lower_bound=-500.0), exits=sled.SelfSpeculation(2))
    assert [(b.name, b.decoding.fusion, b.leaves_early) for b in baselines(method)] == [
        ("greedy", sled.FinalLayer(), False), ("clamp only", sled.ClampOnly(scale=20, lower_bound=-500.0), False)]
    assert [b.name for b in baselines(Method("dola", fusion=sled.DoLa()))] == ["greedy"]
    assert baselines(Method("g")) == ()
    clamps = Method("clamp only", fusion=sled.ClampOnly()), Method("mine", fusion=sled.SLED(scale=5))
    assert [b.name for b in baselines(*clamps)] == ["greedy", "clamp only, scale 5"]
    with pytest.raises(SettingError, match="fusion is 'sled'"):
        Method("x", fusion="sled")
    with pytest.raises(SettingError, match=r"lm is 'demo', but must be an instance, .* give what sled\.load returns"):
        evaluate("demo", "sled_demo", [method])


def test_a_task_that_keeps_to_no_examples_says_so(lm, capsys):
    told = dict(metadata={"problems": 2}, max_new_tokens=4, limit=1)
    with pytest.warns(EvaluationWarning, match=r"1 of 1 prompts are longer than the 64 tokens of the model's context"):
        report = evaluate(lm, "sled_demo", [Method("greedy")], num_fewshot=3, **told)
    assert report.tasks["greedy"][0].num_fewshot == 0
    assert "warning: 3 examples before each question were asked for, but the task 'sled_demo' keeps to the 0 that" in \
        capsys.readouterr().err
    evaluate(lm, "sled_demo", [Method("greedy")], num_fewshot=0, **told)
    assert "warning" not in capsys.readouterr().err


def test_every_method_sees_the_same_examples(lm, tiny_tasks, tmp_path):
    """Examples are drawn at random: the second method finds all answers of the first only if its prompts are alike."""
    data = write_rows(tmp_path / "rows.jsonl", ({"question": f"w {n}", "answer": str(n)} for n in range(8)))
    report = evaluate(lm, "tiny_text", [Method("one"), Method("two")], include_path=[tiny_tasks], num_fewshot=2,
                      data=data, max_new_tokens=4, batch_size=8, progress=False)
    one, two = (method["counts"] for method in report.methods)
    assert one["computed"] == 8 and two["computed"] == 0 and not any(m["verifies"] for m in report.methods)
    assert report.tasks["one"][0].documents() == report.tasks["two"][0].documents()


def test_the_command_writes_a_report_and_computes_nothing_twice(tiny_model, tiny_tasks, tmp_path, capsys):
    arguments = ["eval", "--tasks", "tiny_text", "--model", str(tiny_model), "--include-path", str(tiny_tasks),
                 "--fusion", "sled", "--scale", "5", "--batch-size", "6", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [m["name"] for m in report["methods"]] == ["greedy", "clamp only", "SLED, scale 5"]
    assert [m["counts"]["computed"] for m in report["methods"]] == [6, 6, 6]
    assert report["tasks"]["greedy"][0]["n"] == 6 and report["against"] == "greedy"
    assert report["model"]["weights"] and report["versions"]["lm_eval"] == lm_eval.__version__
    assert report["methods"][2]["settings"]["fusion"]["scale"] == 5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "report.md", "samples.jsonl", "answers.sqlite", "tiny_text-exact_match.png"}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 18 and "doc" not in samples[0]
    assert [s["row"] for s in samples] == [1, 2, 3, 4, 5, 6] * 3 and samples[1]["prompt"] == f"q: {QUESTIONS[1]}\na:"
    ended = [s["finish_reasons"] for s in samples if s["method"] == "greedy"]
    assert set(map(len, ended)) == {1} and ended.count(["length"]) == report["methods"][0]["counts"]["unfinished"] > 0
    assert "tiny_text: 6 samples" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [m["counts"]["computed"] for m in again["methods"]] == [0, 0, 0]
    assert again["comparisons"] == report["comparisons"]


def test_a_report_tells_scores_that_are_no_probabilities(lm, tiny_tasks, tmp_path):
    choices = json.loads((tiny_tasks / "tiny_choice.yaml").read_text())
    brier = dict(metric="brier_score", aggregation="brier_score", higher_is_better=False)
    choices |= {"task": "brier", "metric_list": [dict(metric="acc"), brier]}
    (tmp_path / "brier.yaml").write_text(json.dumps(choices))
    methods = [Method("greedy"), Method("clamp", fusion=sled.ClampOnly(scale=2)), Method("dola", fusion=sled.DoLa(
        "high", relative_top=1e-30, lower_bound=-1000)), Method("sled", fusion=sled.SLED(scale=2, log_softmax=True))]
    report = evaluate(lm, "brier", methods, include_path=tmp_path, progress=False)
    written = report.markdown()
    left = {method: (tasks[0].left_out, tasks[0].scored) for method, tasks in report.tasks.items()}
    assert left["greedy"] == left["dola"] == (0, 18) and left["clamp"][0] > 9 and left["clamp"] == left["sled"]
    assert f"keeps: {left['clamp'][0]} of 18 under clamp, {left['sled'][0]} of 18 under sled. Each such" in written
    marked = {line.split()[1] for line in written.splitlines() if re.search(r"brier_score .*\* \|$", line)}
    assert marked == {"clamp", "sled"} and "\n\\* Of scores some of which are lower bounds" in written
    [one] = [s for s in report.tasks["clamp"][0].samples if s["doc_id"] == 0]
    assert one["prompt"] == f"q: {QUESTIONS[0]}\na: " and one["choices"] == ["0", "no", "it is so"] and one["row"] == 1
    assert len(one["left_out"]) == 3 and "left_out" not in report.tasks["greedy"][0].samples[0]


def test_methods_are_timed_side_by_side(lm, tiny_tasks, monkeypatch):
    decoded, decode = [], lm.decode
    monkeypatch.setattr(lm, "decode", lambda prompts, *of, **how: decoded.append(len(prompts)) or decode(
        prompts, *of, **how))
    methods = [Method("greedy"), Method("clamp", fusion=sled.ClampOnly())]
    report = evaluate(lm, "tiny_text", methods, include_path=tiny_tasks, batch_size=6, time_samples=2, progress=False)
    assert decoded == [6, 6] + [2] * 8 and {name: len(t.seconds) for name, t in report.times.items()} == {
        "greedy": 3, "clamp": 3}
    assert all(method["counts"]["requests"] == 6 for method in report.methods) and len(report.json()["times"]) == 2
    [_, timed] = report.markdown().split("## Time")
    assert "The first 2 samples" in timed and re.search(r"greedy \| \d+\.\d\d \| 1\.00 \|", timed)


@pytest.mark.parametrize("given", [
    dict(tasks="nosuch"), dict(limit=0), dict(tasks="tiny_choice", methods=[Method("m", exits=sled.EarlyExit(1, 0.5))]),
    dict(apply_chat_template=True), dict(against="nobody"), dict(methods=[]), dict(time_samples=0),
    dict(data="nowhere.jsonl"),
    dict(metadata={"a": 1}), dict(methods=[Method("m"), Method("m")]), dict(num_fewshot=99)], ids=str)
def test_a_refused_evaluation_leaves_nothing(lm, tiny_tasks, tmp_path, given):
    with pytest.raises(SledError):
        evaluate(lm, **{"tasks": "tiny_text", "methods": [Method("m")], "include_path": tiny_tasks, "progress": False,
                        "out": tmp_path / "a" / "b", "cache": tmp_path / "c" / "d.sqlite", **given})
    assert not list(tmp_path.iterdir())


def test_a_report_is_replaced_whole_or_not_at_all(lm, tiny_tasks, tmp_path, monkeypatch):
    report = evaluate(lm, "tiny_text", [Method("greedy")], include_path=[tiny_tasks], batch_size=6, progress=False)
    report.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 4
    other = dataclasses.replace(report, date="today")

    def half_of_it(_, path):
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(SettingError, match="No space left"):
        broken.setattr(report_module, "draw_comparison", half_of_it)
        other.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    other.pictures["tiny_text: exact_match"] = "renamed.png"
    other.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "samples.jsonl", "renamed.png"}


@pytest.mark.parametrize("held, says", [
    ({"report.md": "mine"}, "holds report.md that sled did not write"),
    ({"samples.jsonl": "{}", "report.json": '{"mine": 1}'}, "holds report.json and samples.jsonl that sled did not"),
    ({"report.json": "[1]"}, "holds report.json"),
    (None, "'.*out', which is a file; name a folder"),
])
def test_a_folder_with_files_of_ones_own_is_refused_before_any_work(tmp_path, monkeypatch, capsys, held, says):
    monkeypatch.setattr(sled, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    out = tmp_path / "out"
    out.write_text("mine") if held is None else out.mkdir()
    for name, text in (held or {}).items():
        (out / name).write_text(text)
    assert cli.main(["eval", "--tasks", "sled_demo", "--out", str(out)]) == 1
    assert re.search(f"SettingError: --out is .*{says}", capsys.readouterr().err)
    assert held is None or {path.name: path.read_text() for path in out.iterdir()} == held


def test_a_report_whose_writing_was_killed_does_not_bar_its_folder(tmp_path):
    (tmp_path / "report.md").touch()
    with pytest.raises(SettingError, match=r"report\.md that sled did not write or did not finish"):
        report_folder("out", tmp_path)
    with written_whole(tmp_path / "report.json") as beside:
        beside.touch()
        report_folder("out", tmp_path)


def report_of(scores, methods=()):
    model = dict(name="m", weights="0" * 64, dtype="float32", layers=2)
    return EvaluationReport(tasks={"base": []}, scores=scores, times={}, methods=list(methods), settings={},
                            versions={}, hardware="h", model=model, date="d", against="base", seed=0)


def test_a_report_counts_the_p_values_of_all_its_tables():
    scores = {"a": {"base": BASE, "x": OTHER, "y": OTHER}, "b": {"base": BASE, "x": OTHER, "y": OTHER},
              "c": {"base": BASE, "x": BASE / 2, "y": BASE / 2}}
    said = report_of(scores).markdown().split("\n## ")
    assert [part.count("Of the 4 in all tables of this report") for part in said] == [0, 1, 1, 0, 0]
    assert [part.count("compare with 0.013 instead") for part in said] == [0, 1, 1, 0, 0]
    assert "Bonferroni" not in report_of({"a": {"base": BASE, "x": OTHER}}).markdown()


def test_verified_drafts_have_no_mean_layer():
    methods = [Method("exit", exits=sled.EarlyExit(1)), Method("draft", exits=sled.SelfSpeculation(1, draft=3))]
    counts = dict(requests=2, computed=2, truncated=0, unfinished=0, new_tokens=8, layers=12)
    about = [{"name": m.name, "verifies": m.verifies, "counts": counts} for m in methods]
    report = dataclasses.replace(report_of({}, about), tasks={"exit": [], "draft": []})
    _, _, exit, draft = report.answers().splitlines()
    assert "missed" not in report.answers()
    assert exit == "| exit | 2 | 2 | 0 | 0 | - | 1.50 of 2 |" and draft == "| draft | 2 | 2 | 0 | 0 | - | - |"


def test_pictures_have_names_of_their_own_and_earlier_ones_go(tmp_path):
    def write(*scores):
        report_of({score: {"base": [1, 0]} for score in scores}).write(tmp_path)
        return {path.name for path in tmp_path.glob("*.png")}

    (tmp_path / "mine.png").write_bytes(b"")
    assert write("t: a,b", "t: a b", "T: a b", "t: c") == {"mine.png", "t-a-b.png", "t-a-b-2.png", "T-a-b-3.png",
                                                          "t-c.png"}
    assert "(t-a-b-2.png)" in (tmp_path / "report.md").read_text()
    assert write("t: c") == {"mine.png", "t-c.png"}
