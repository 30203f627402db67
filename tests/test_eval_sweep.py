"""Sweeps: grids, what a row holds, resuming, the certified choice, the Pareto front."""

import csv
import dataclasses
import json
import re
import warnings

import jax
import pytest
from demo_toy import demo_toy
from scripted_sweep import DRAFTS, EARLY, QUESTIONS, many, run

import sled
from sled.decoding import loop
from sled.errors import EvaluationWarning, SettingError
from sled.eval.methods import Method
from sled.eval.questions import demo_questions
from sled.eval.sweep import grid
from sled.eval.sweep.plot import draw_sweep
from sled.exits import Policy
from sled.exits.policy import Exits
from sled.settings.decorator import setting, settings
from sled.settings.rules import Number

pytest_plugins = ["scripted_sweep"]
pytestmark = pytest.mark.filterwarnings("ignore::sled.errors.EvaluationWarning")  # most sweeps here are tiny


def test_a_sweep_compiles_each_program_once_and_says_what_happened(tmp_path):
    toy = demo_toy()
    before = loop.decode.programs[False]
    swept = run(toy, tmp_path / "new" / "folder")
    assert loop.decode.programs[False] == before + 3  # no exit, early exit, speculation
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
        assert row.seconds > 0 and row.unanswered == 5 and row.tokens <= 5 * 6
        assert row.relative_speed == pytest.approx(row.against_seconds / row.seconds) and row.low <= row.accuracy
    assert swept.sequences == (tuple(m.name for m in EARLY), tuple(m.name for m in DRAFTS))
    again = run(toy, tmp_path / "b", [*grid.early_exits([1], [0.2, 0.7]), *grid.self_speculation([1], [2])], rounds=2)
    assert loop.decode.programs[False] == before + 3 and len(again.rows) == 4  # other numbers, no other program
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "sweep.csv", "samples.jsonl", "sweep.md", "sweep.png"}
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


@settings
class Own(Policy):
    """A policy that this package does not know."""

    every: tuple[int, ...] = setting(Exits(), help="layers")
    nerve: float = setting(Number(hint="any will do"), help="nerve")

    def exits(self, num_layers):
        return (*self.every, num_layers)

    def at_exit(self, view):
        raise NotImplementedError


def test_a_policy_of_ones_own_is_swept_by_its_settings(scripted, tmp_path):
    methods = [Method(f"{every} {nerve}", exits=Own(every, nerve)) for every in ((1,), (1, 2)) for nerve in (0.2, 0.1)]
    swept = run(scripted, tmp_path, methods)
    assert [row.layers for row in swept.rows] == ["", "1", "1", "1 2", "1 2"] and not swept.rows[1].verifies
    again = run(scripted, tmp_path, methods)
    assert again.rows == swept.rows
    kind, *values = again.rows[4].settings.items()
    assert kind[1].endswith("Own") and values == [("every", [1, 2]), ("nerve", 0.1)]
    assert draw_sweep(swept, tmp_path / "own.svg").stat().st_size > 5000
    drafts = [dataclasses.replace(row, verifies=bool(row.layers)) for row in swept.rows]
    assert draw_sweep(dataclasses.replace(swept, rows=tuple(drafts)), tmp_path / "own.svg").exists()


def test_interrupted_sweeps_go_on(scripted, tmp_path):
    whole = run(scripted, tmp_path / "whole")
    assert len(scripted.calls) == 6 + (1 + 4 + 3)  # each once; then no exit beside each program's, in the round
    scripted.calls.clear()
    again = run(scripted, tmp_path / "whole")
    assert not scripted.calls and again.rows == whole.rows and again.markdown() == whole.markdown()

    # What a kill in the middle of the last row but one leaves.
    *begun, last_but_one, _ = (tmp_path / "whole" / "sweep.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "sweep.csv").write_bytes(b"".join(begun) + last_but_one[:90])
    samples = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(samples[:-20])
    resumed = run(scripted, tmp_path)
    assert len(scripted.calls) == 3 + 3 and len(set(row.run for row in resumed.rows)) == 2
    plain = lambda rows: [dataclasses.replace(row, run="") for row in rows]  # noqa: E731
    assert plain(resumed.rows) == plain(whole.rows)
    assert "These rows stem from 2 runs" in resumed.markdown() and "stem from" not in whole.markdown()
    assert (tmp_path / "sweep.csv").read_bytes().count(b"\n") == 7
    assert (tmp_path / "samples.jsonl").read_bytes() == samples


@pytest.mark.parametrize(("cut", "warns", "first", "stands"), [
    (0, None, True, 0), (3, None, True, 1), (10, None, True, 1), (30, "30 of 100 texts of no exit ended at", True, 1),
    (100, "100 of 100 texts of no exit ended at the token limit: an answer .*--max-new-tokens.*--stop", True, 1),
    (100, r"no exit solves 0 of 100 questions \(100 ended at the token limit\): so .*chosen. Allow mo", False, 1)])
def test_texts_that_ended_at_the_token_limit_are_told(scripted, tmp_path, cut, warns, first, stands):
    scripted.cut, scripted.says = cut, "#### {}" if first else "#### 7"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        swept = run(scripted, tmp_path, EARLY, many(100))
    assert [bool(re.match(warns or "", str(each.message))) for each in found] == [True] * bool(warns)
    assert all(row.unfinished == cut for row in swept.rows)
    said = f"\n**{cut} of 100 texts of no exit ended at the token limit**: an answer that "
    assert swept.markdown().count(said) == stands
    ends = [json.loads(line)["finish_reasons"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert ends.count(["length"]) == cut * len(swept.rows) and len(ends) == 100 * len(swept.rows)


@pytest.mark.parametrize(("questions", "prompts", "form"), [
    (many(2), ["q 0", "q 1"], "All prompts"),
    (dataclasses.replace(many(2), template="q {n}"), ["q 0", "q 1"], "Put as 'q {n}'. All prompts"),
    (dataclasses.replace(many(1), prompts=([7, 8],)), None, "All prompts"),
    (dataclasses.replace(many(1), template="{n}", prompts=(sled.Chat("1?", "Be brief.", {"name": "Ann"}),)),
     ["system: Be brief. user: 1? Ann"], "Put as '{n}', in the model's chat template, behind the system message "
                                         "'Be brief.', with name = 'Ann'. All prompts"),
])
def test_a_record_has_what_was_asked_and_what_came(scripted, tmp_path, monkeypatch, questions, prompts, form):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{{ name }}"
    monkeypatch.setattr(type(scripted.text.chats), "template", lambda *_: template)
    swept = run(scripted, tmp_path, EARLY[:1], dataclasses.replace(questions, first_row=4))
    assert f"\n{form} and texts are in samples.jsonl." in swept.markdown()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["method"] for s in samples] == [row.method for row in swept.rows for _ in questions.prompts]
    assert prompts is None or [s["prompt"] for s in samples[:len(prompts)]] == prompts
    assert [s["digest"] for s in samples] == [row.digest for row in swept.rows for _ in questions.prompts]
    assert {**samples[0], "digest": "", "prompt": ""} == {
        "digest": "", "method": "no exit", "doc_id": 0, "row": 4, "filter": "strict-match", "prompt": "", "target": "0",
        "responses": [["#### 0"]], "answers": ["0"], "scores": {"accuracy": 1}, "finish_reasons": ["stop"]}


def test_what_changed_is_measured_again(scripted, tmp_path):
    def measured(**change):
        scripted.calls.clear()
        run(scripted, tmp_path, **{"methods": EARLY[:1], **change})
        return bool(scripted.calls)

    assert measured()
    for change in (dict(rounds=2), dict(max_new_tokens=5), dict(batch_size=2), dict(questions=many(5)),
                   dict(questions=dataclasses.replace(QUESTIONS, answers=(0, 2, 4, 6, 9))),
                   dict(methods=grid.early_exits([1], [1.0], kv="propagate")),
                   dict(methods=[Method(EARLY[0].name, exits=EARLY[0].decoding.exits, schedule=sled.Gather(2))])):
        assert measured(**change), change
    assert not measured()
    scripted.params = jax.tree.map(lambda x: x + 1, scripted.params)
    assert measured()


def test_the_fastest_certified_setting(scripted, tmp_path):
    methods = [*grid.early_exits([1, 2], [0.99, 0.9, 0.5]), *DRAFTS]
    swept = run(scripted, tmp_path, methods, many(400), delta=0.05)
    chosen, passed = swept.choice()
    assert chosen == "exit after 1, threshold 0.99" and len(passed) == 4  # 1% is lost at 0.99, 10% at 0.9
    said = swept.markdown()
    assert "each of the 4 certified methods, of 8 tested in 3 sequences" in said and "fastest of them: exit" in said
    assert "| yes |" in said and "| no |" in said and "1.01 times as fast as no exit" in said
    assert "one whose answers break off is faster" in said
    assert dataclasses.replace(swept, delta=0.25).choice().method == "exit after 1, threshold 0.9"
    only = run(scripted, tmp_path, DRAFTS, many(400))
    assert only.choice().method is None and "None of them was faster" in only.verdict()
    few = run(scripted, tmp_path, methods, many(20))
    assert few.choice() == (None, ()) and "it takes 80 questions here, and 20 were asked" in few.verdict()


# A model at the floor: nothing it solves can be lost, so that without this rule everything would be certified.
@pytest.mark.parametrize(("says", "questions", "solved"), [
    ("I do not know.", many(400), "0 of 400 questions (in 400 of its texts no answer could be read)"),
    ("#### 7", many(400), "0 of 400 questions:"),
    ("#### {}", dataclasses.replace(many(400), extract="boxed"),
     "0 of 400 questions (in 400 of its texts no answer could be read)"),
    ("#### {}", dataclasses.replace(many(400), answers=tuple(2 * i + (i > 10) for i in range(400))),
     "11 of 400 questions:"),  # fewer than delta
    ("#### {}", dataclasses.replace(many(400), answers=tuple(2 * i + (i > 24) for i in range(400))),
     "25 of 400 questions:"),  # a little more, but not by what 400 questions can show
    ("#### {}", dataclasses.replace(many(100), answers=tuple(2 * i + (i > 4) for i in range(100))),
     "5 of 100 questions:"),
])
def test_where_nothing_can_be_lost_nothing_is_certified(scripted, tmp_path, says, questions, solved):
    scripted.says = says
    said = f"no exit solves {re.escape(solved)}.* so nothing will be certified or chosen"
    with pytest.warns(EvaluationWarning, match=said):
        swept = run(scripted, tmp_path, [*grid.early_exits([1, 2], [1.0, 0.9, 0.1]), *DRAFTS], questions)
    assert swept.choice() == (None, ()) and "**Nothing is certified or chosen**: no exit solves" in swept.markdown()
    assert solved in swept.verdict() and not any(
        word in swept.markdown() for word in ("fastest of them", "| yes |", "Not beaten"))
    assert all(row.unanswered == (400 if "could be read" in solved else 0) for row in swept.rows[:1])


def test_a_baseline_that_solves_enough_is_certified_beside(scripted, tmp_path):
    some = dataclasses.replace(many(400), answers=tuple(2 * i + (i > 39) for i in range(400)))  # a tenth
    swept = run(scripted, tmp_path, EARLY, some)
    assert EARLY[0].name in swept.choice().certified and "no exit solves 0.1 of these" in swept.verdict()


def test_another_rule_that_finds_more_is_named(scripted, tmp_path):
    scripted.says = "That makes {}"
    hint = "By flexible-extract .--extract. it solves 100. Its first text: 'That makes 0'"
    with pytest.warns(EvaluationWarning, match=hint):
        run(scripted, tmp_path, EARLY, many(100))
    swept = run(scripted, tmp_path, EARLY, dataclasses.replace(many(100), extract="flexible-extract"))
    assert swept.rows[0].accuracy == 1 and "the answer being the last number" in swept.what


def test_too_few_questions_are_told_before_any_work(scripted, tmp_path):
    with pytest.warns(EvaluationWarning, match="3 questions certify nothing: even without any loss it takes 59 at"):
        scripted.decode = None  # before any answer: what calls it fails
        with pytest.raises(TypeError):
            run(scripted, tmp_path, EARLY, many(3))


@pytest.mark.parametrize(("questions", "stop", "passed"), [
    (many(5), None, ()), (dataclasses.replace(many(5), stop=("Q:",)), None, ("Q:",)),
    (dataclasses.replace(many(5), stop=("Q:",)), "\n\n", ("\n\n",)), (demo_questions(5), None, ("Question:",)),
    (demo_questions(5), (), ()), (many(5), ["a", "b"], ("a", "b")),
])
def test_stop_strings(scripted, tmp_path, questions, stop, passed):
    swept = run(scripted, tmp_path, EARLY[:1], questions, stop=stop)
    assert scripted.stop == passed and swept.what.count("ending at") == bool(passed)


@pytest.mark.parametrize(("methods", "how", "says"), [
    (["no exit"], {}, r"methods is \['no exit'\], but"), ([], {}, r"methods is \[\], but"),
    (EARLY, dict(questions=[]), r"questions is \[\], which is no Questions; give what demo_questions"),
    (EARLY, dict(lm="demo"), "lm is 'demo', but must be an instance, .* give what sled.load returns"),
    (EARLY, dict(max_new_tokens=1000), "holds 512 tokens, and question 1 of sums takes 11 .* ask for at most 501 "),
    ([Method("m", exits=sled.EarlyExit(1)), Method("m", exits=sled.EarlyExit(2))], {}, "two methods are called 'm'"),
    ([Method("a\nb")], {}, "no single line"),
    ([*EARLY, *grid.early_exits([1], [0.5], fusion=sled.SLED())], {}, "several fusions"),
    (EARLY, dict(rounds=0), "rounds is 0"), (EARLY, dict(batch_size=0), "batch_size is 0"),
    (EARLY, dict(delta=0), "must be a number in"), (EARLY, dict(epsilon=1), "must be a number in"),
    (EARLY, dict(folder="/proc/none"), "folder is '/proc/none', which cannot be written to"),
], ids=range(13))
def test_what_cannot_be_swept(scripted, tmp_path, methods, how, says):
    with pytest.raises(SettingError, match=says):
        run(**{"lm": scripted, "folder": tmp_path, "methods": methods, **how})
    assert not scripted.calls and not list(tmp_path.iterdir())


def test_pictures_of_every_kind_of_sweep(scripted, tmp_path):
    measures = grid.early_exits([1, (1, 2)], [0.9, 0.5], measures=["margin", "entropy"])
    for i, methods in enumerate([[*measures, *DRAFTS], DRAFTS, grid.sled_settings([1, 2], [5])]):
        swept = run(scripted, tmp_path, methods, many(100), delta=0.4)
        assert draw_sweep(swept, tmp_path / f"{i}.svg").stat().st_size > 5000
