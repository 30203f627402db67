"""The authors' evaluation protocols: arithmetic, rows, answers and demonstrations; then as tasks of the harness."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from sled.errors import DataError, DownloadError, SettingError
from sled.eval.protocols import FOLDER, factor, gsm8k, strategyqa, truthfulqa
from sled.eval.protocols.choices import Scored, first_wins, multiple_choice
from sled.eval.protocols.primers import read_primer

INF, NAN = math.inf, math.nan
PUBLISHED = {"at": "https://example.org/demo.py", "sha256": "0"}


# Arithmetic

@pytest.mark.parametrize("scores, wins", [
    ((-1.0, -2.0, -3.0, -1.5), True),
    ((-2.0, -1.0, -3.0, -4.0), False),
    ((-2.0, -2.0, -2.0, -2.0), True),  # a tie is a win, as published
    ((-2.0, -INF, -INF, -INF), True),
    ((-INF, -INF, -INF, -INF), False),
    ((NAN, -2.0, -3.0, -4.0), False),
    ((-2.0, -3.0, NAN, -4.0), False),
])
def test_factor_takes_the_highest_score(scores, wins):
    assert first_wins(scores) == wins


@pytest.mark.parametrize("true, false, best, expected", [
    # exp: 0.5 and 0.125 of 0.5 + 0.125 + 0.25 + 0.125 = 1
    ([math.log(0.5), math.log(0.125)], [math.log(0.25), math.log(0.125)], 0, (1, 0.625, 0.5)),
    ([math.log(0.5), math.log(0.125)], [math.log(0.25), math.log(0.125)], 1, (0, 0.625, 0.5)),
    ([-1.0], [-1.0], 0, (0, 0.5, 0)),  # above means above, not level with
    ([-3.0, -2.0, -1.0], [-4.0], 0, (1, (math.exp(-3) + math.exp(-2) + math.exp(-1)) /
                                     (math.exp(-3) + math.exp(-2) + math.exp(-1) + math.exp(-4)), 1)),
    # Both vanish in double precision: -1000 becomes -500, and -1600 becomes -400 in two halvings of its own.
    ([-1000.0], [-1600.0], 0, (1, math.exp(-500) / (math.exp(-500) + math.exp(-400)), 1)),
    ([-1000.0], [-1.0], 0, (0, math.exp(-500) / (math.exp(-500) + math.exp(-1)), 0)),
    ([2000.0], [1.0], 0, (1, 0, 1)),  # overflow: no number, counted as nothing, as published
    ([1.0], [2000.0], 0, (0, 0, 0)),
    ([-INF], [-1.0], 0, (0, 0, 0)),
    ([-1.0], [-INF, -INF], 0, (1, 1, 1)),
    ([-INF], [-INF], 0, (0, 0, 0)),
    ([NAN], [-1.0], 0, (0, 0, 0)),
    ([-1.0], [-2.0, NAN], 0, (0, 0, 0)),
])
def test_mc_scores_by_hand(true, false, best, expected):
    assert multiple_choice(true, false, best) == pytest.approx(expected, rel=1e-12)


def test_a_score_with_its_number_of_tokens_is_the_harness_pair():
    scored = pickle.loads(pickle.dumps(Scored(-3.5, True, tokens=7)))
    logp, greedy = scored
    assert (logp, greedy, scored.tokens, len(scored)) == (-3.5, True, 7, 2)


# Reading answers

@pytest.mark.parametrize("text, number", [
    ("3 + 2 = 5. The answer is 5.", "5"),
    ("the ANSWER IS $1,234.50 in all", "1234.50"),
    ("The answer is -3.", "-3"),
    ("The answer is 5 x 3 = 15.", "5"),  # the first number behind the words
    ("7. The answer is none.", None),  # not a number before them
    ("The answer is 4. The answer is 9.", "4"),
    ("so 3 of 4 are 12.", "12"),  # without the words, the last number
    ("18.0", "18.0"),
    (".", None),
    ("", None),
])
def test_gsm8k_number(text, number):
    assert gsm8k.stated_number(text) == number


@pytest.mark.parametrize("text, yes, said", [
    ("It floats. So the answer is yes.", True, "yes"),
    ("So the ANSWER IS No.", False, "no"),
    ("So the answer is yes\n\nQ", False, "yes\n\nq"),  # neither yes nor no: no
    ("The answer is unclear. So the answer is yes.", False, "unclear"),  # the first counts
    ("Thus, yes.", True, None),  # nothing stated: no "no" in it
    ("I do not know.", False, None),
    ("", True, None),
])
def test_strategyqa_yes_or_no(text, yes, said):
    assert strategyqa.is_yes(text) == yes
    assert strategyqa.stated(text) == said


# Rows

FACTOR_ROW = {"full_prefix": "All. ", "turncated_prefixes": "Cut. ", "completion": "T", "contradiction_0": "A",
              "contradiction_1": "B", "contradiction_2": "C"}
QUESTION = {"question": "Why?", "best_answer": "Because", "correct_answers": ["Because", "So. "],
            "incorrect_answers": ["Never."]}
GSM_ROW = {"question": "How many?", "answer": "1+1=<<1+1=2>>2 twice\n2000*1=<<2000*1=2000>>2,000\n#### 2,000"}
STRATEGY_ROW = {"question": "Is it?", "answer": False, "facts": ["It was.", "It is not."]}


def test_truthfulqa_row_of_the_hub_and_of_the_file():
    expected = dict(question="Why?", choices=["Because.", "So.", "Never."], true=2, best=0)
    of_file = {"Question": "Why?", "Best Answer": " Because ", "Correct Answers": "Because; So.;", "Incorrect Answers":
               "Never."}
    assert truthfulqa.row(QUESTION, "row 1") == truthfulqa.row(of_file, "row 1") == expected


@pytest.mark.parametrize("reference, number", [
    ("9{,}500", "9500"), ("72.", "72"), ("$1,234.50", "1234.5"), ("\u22123", "-3"), (".5", "0.5"),
    ("**18** dollars", "18"), (r"\boxed{7}", "7"), ("7%", "7"), ("1 1/3", "4/3"),
])
def test_gsm8k_references_are_read_by_the_grammar(reference, number):
    row = gsm8k.row({**GSM_ROW, "answer": f"1+1=<<1+1=2>>2\n#### {reference}"}, "row 1")
    assert row == dict(question="How many?", number=number, solution=f"1+1=2 The answer is {number}.")


@pytest.mark.parametrize("number, text", [
    ("18", r"The answer is \$18."), ("9500", "The answer is 9{,}500."), ("-3", "The answer is \u22123."),
    ("0.5", r"The answer is $\boxed{\frac{1}{2}}$, of 3"), ("12", "The answer is \uff11\uff12"), ("5", "5 \u20ac"),
    ("0.5", "The answer is \u00bd."), ("1234", "1\u202f234"),
])
def test_gsm8k_values_that_math_verify_finds(number, text):
    pytest.importorskip("math_verify", reason="needs math-verify (the eval extra)")
    assert gsm8k.same_value(number, text) and not gsm8k.same_value("7", text)


@pytest.mark.parametrize("make, row, message", [
    (factor.full, {**FACTOR_ROW, "contradiction_1": None}, "holds nothing in its column 'contradiction_1'.*text"),
    (truthfulqa.row, {"Question": "Why?"}, "no column 'Best Answer'"),
    (truthfulqa.row, {**QUESTION, "best_answer": "Else"}, "'Else.', which is none of its true answers: 'Because.'"),
    (truthfulqa.row, {**QUESTION, "incorrect_answers": [" "]}, "no answer in its column 'incorrect_answers'"),
    (truthfulqa.row, {**QUESTION, "correct_answers": [1]}, "a list of texts"),
    (strategyqa.row, {**STRATEGY_ROW, "answer": "yes"}, r"holds 'yes' \(str\) in its column 'answer'.*true or false"),
    (strategyqa.row_with_facts, {**STRATEGY_ROW, "facts": []}, "holds nothing in its column 'facts'"),
    *[(gsm8k.row, {**GSM_ROW, "answer": answer}, "without one clear number behind ####") for answer in (
        "2000", "2000 ####", "#### ,", "#### .", "#### none", "#### 12 or 13", "#### 1\n#### 2", "#### 5 of 7")],
])
def test_wrong_rows_are_named(make, row, message):
    with pytest.raises(DataError, match=message):
        make(row, "row 7")


# Demonstrations

SCRIPT = '''
import not_installed
ANSWER_TRIGGER = "So it is"
def create_demo_text(n=2):
    question, chain, answer = [], [], []
    question.append("One" "?")
    chain.append("It " + "is.")
    answer.append("1")
    question.append("Two?")
    chain.append("Count.")
    answer.append("2")
    demo_text = ""
'''


def primer(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    return read_primer("some_task", tmp_path / name, PUBLISHED)


def test_demonstrations_as_text_end_with_one_blank_line(tmp_path):
    text, record = primer(tmp_path, "demo.txt", "Q: a\nA: b\n")
    assert text == primer(tmp_path, "demo.txt", "Q: a\nA: b\n\n\n")[0] == "Q: a\nA: b\n\n"
    assert record["as_published"] is False
    assert read_primer("some_task", record["file"], dict(PUBLISHED, sha256=record["sha256"]))[1]["as_published"] is True


def test_demonstrations_in_a_script_are_read_without_running_it(tmp_path):
    text, _ = primer(tmp_path, "demo.py", SCRIPT)
    assert text == "Q: One?\nA: It is. So it is 1.\n\nQ: Two?\nA: Count. So it is 2.\n\n"
    plain = "\n".join(line for line in SCRIPT.splitlines() if "chain.append" not in line)
    plain = plain.replace('demo_text = ""', 'demo_text = "Be brief." + "\\n\\n"')
    assert primer(tmp_path, "demo.py", plain)[0] == "Be brief.\n\nQ: One?\nA: 1\n\nQ: Two?\nA: 2\n\n"


@pytest.mark.parametrize("name, text, message", [
    ("gone.txt", None, r"gone.txt.*cannot be read"),
    ("demo.txt", "\n", "is empty"),
    ("demo.py", "def (", "no Python file"),
    ("demo.py", "x = 1", "no function create_demo_text"),
    ("demo.py", SCRIPT.replace('answer.append("2")', ""), "as many strings to answer as to question"),
    ("demo.py", SCRIPT.replace('"Count."', "count()"), "as many strings"),
    ("demo.py", SCRIPT.replace('chain.append("Count.")', ""), "as many strings"),
])
def test_unusable_demonstrations_are_named(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        primer(tmp_path, name, text)


def test_arithmetic_and_reading_need_no_harness():
    code = ("import sys; from sled.eval.protocols import choices, factor, gsm8k, primers, strategyqa, truthfulqa; "
            "sys.exit('lm_eval' in sys.modules or 'datasets' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


# As tasks of the harness, with a model that says what it is told

@pytest.fixture(scope="module")
def manager():
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm_eval (the eval extra)")
    return tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)


@pytest.fixture
def load(manager, tmp_path):
    """`load(task, {split: rows}, primer)`: the task on made-up rows, with these demonstrations."""
    from lm_eval.tasks._yaml_loader import load_yaml

    def load(name, splits, primer=None, manager=manager):
        config = load_yaml(FOLDER / f"{name}.yaml")
        if primer is not None:
            (tmp_path / "primer.txt").write_text(primer)
            config["metadata"]["primer_file"] = str(tmp_path / "primer.txt")
        files = {split: str(tmp_path / f"{split}.json") for split in splits}
        for split, rows in splits.items():
            if rows is not None:
                Path(files[split]).write_text(rows if isinstance(rows, str) else json.dumps(rows))
        config |= dict(dataset_path="json", dataset_kwargs=dict(data_files=files, cache_dir=str(tmp_path / "cache")))
        return manager.load([config])["tasks"][name]

    return load


@pytest.fixture
def run(load):
    """`run(said, *task)`: results of what `load` gives, and the (prompt, continuation or settings) that the model was
    given. `said`: what the model says, in turn."""
    from harness_tasks import Scripted
    from lm_eval.evaluator import evaluate  # without what simple_evaluate collects about the machine, which takes long

    def run(said, *task):
        model, task = Scripted(said), load(*task)
        out = evaluate(model, {task.task_name: task}, bootstrap_iters=0)
        [results] = out["results"].values()
        return {key.removesuffix(",none"): value for key, value in results.items() if key.endswith(",none")
                and "stderr" not in key}, model.asked, out

    return run


def test_all_tasks_are_found(manager):
    primed = ["gsm8k_cot8", "strategyqa_cot6", "truthfulqa_mc123"]
    assert manager.all_tasks == sorted([*primed, *(f"{task}_rows" for task in primed), "factor_expert", "factor_news",
                                        "factor_wiki"])


def test_factor_by_sum_and_by_mean(run):
    rows = [{**FACTOR_ROW, "completion": f"T{i}"} for i in range(2)]
    said = [Scored(-4.0, False, 2), Scored(-3.0, False, 1), Scored(-9.0, False, 3), Scored(-9.0, False, 4),
            Scored(-4.0, False, 2), Scored(-5.0, False, 1), Scored(-9.0, False, 1), Scored(-9.0, False, 9)]
    results, asked, _ = run(said, "factor_wiki", {"test": rows})
    # by the sum -4 < -3, then -4 is best; by the mean -2 is best (-3, -3, -2.25), then -2 < -1
    assert results == {"acc_sum": 0.5, "acc_mean": 0.5}
    assert asked[:4] == [("Cut. ", " T0"), ("Cut. ", " A"), ("Cut. ", " B"), ("Cut. ", " C")]
    results, asked, _ = run([tuple(score) for score in said], "factor_news", {"test": rows})
    assert results == {"acc_sum": 0.5}, "without the numbers of tokens there is no mean"
    assert asked[0] == ("All. ", " T0")


def test_truthfulqa_with_demonstrations_of_a_file(run):
    rows = [QUESTION, {**QUESTION, "question": "Who?"}]
    scores = [math.log(0.5), math.log(0.1), math.log(0.4), math.log(0.1), math.log(0.7), math.log(0.2)]
    results, asked, out = run([(score, False) for score in scores], "truthfulqa_mc123", {"validation": rows},
                              "Q: x\nA: y.\n\n")
    assert results == pytest.approx({"mc1": 0.5, "mc2": 0.7, "mc3": 0.5})
    assert asked[:3] == [("Q: x\nA: y.\n\nQ: Why?\nA:", f" {answer}") for answer in ("Because.", "So.", "Never.")]
    record = out["configs"]["truthfulqa_mc123"]["metadata"]["primer"]
    assert record["as_published"] is False and len(record["sha256"]) == 64


def test_truthfulqa_shows_other_rows(run):
    rows = [{**QUESTION, "question": f"Why {i}?"} for i in range(8)]
    _, asked, _ = run([(-1.0, False)] * 24, "truthfulqa_mc123_rows", {"validation": rows})
    show = lambda shown, last: "".join(f"Q: Why {i}?\nA: Because.\n\n" for i in shown) + f"Q: Why {last}?\nA:"  # noqa: E731
    assert asked[0][0] == show((1, 2, 3, 4, 5, 6), 0) and asked[-1][0] == show(range(6), 7)


def test_strategyqa(run):
    rows = [{"question": "Is it?", "answer": answer} for answer in (True, False, True)]
    said = ["It is. So the answer is yes.", "Unknown.", " So the answer is perhaps."]
    results, asked, _ = run(said, "strategyqa_cot6", {"test": rows}, "Q: x\nA: y. So the answer is no.")
    assert results == pytest.approx({"acc": 2 / 3, "stated": 1 / 3})
    prompt, settings = asked[0]
    assert prompt == "Q: x\nA: y. So the answer is no.\n\nQ: Is it?\nA:"
    assert settings == {"until": ["Q:", "\n\n##"], "max_gen_toks": 256, "do_sample": False}


def test_strategyqa_reads_the_published_rows_and_shows_their_facts(run):
    rows = [dict(STRATEGY_ROW, question=f"Is {i}?", evidence=[[["a-1"], "operation"], ["no_evidence", ["b", ["c"]]]])
            for i in range(7)]
    results, asked, _ = run(["So the answer is no."] * 7, "strategyqa_cot6_rows", {"test": rows})
    assert results == {"acc": 1, "stated": 1}
    assert asked[6][0] == "".join(f"Q: Is {i}?\nA: It was. It is not. So the answer is no.\n\n" for i in range(6)) + (
        "Q: Is 6?\nA:")


def test_gsm8k(manager, run, tmp_path):
    pytest.importorskip("math_verify", reason="needs math-verify (the eval extra)")
    (tmp_path / "primer.txt").write_text("Q: x\nA: y")
    of_all_tasks = type(manager)(include_path=str(FOLDER), include_defaults=False,
                                 metadata={"primer_file": str(tmp_path / "primer.txt")})
    said = ["The answer is 2,000.", "The answer is 2000.00 dollars.", "1000 * 2 = 2000", "I do not know.", ""]
    results, asked, _ = run(said, "gsm8k_cot8", {"test": [GSM_ROW] * 5}, None, of_all_tasks)
    assert results == {"acc": 0.4, "acc_math_verify": 0.6}
    assert asked[0] == ("Q: x\nA: y\n\nQ: How many?\nA:",
                        {"until": ["Q:", "\\end{code}"], "max_gen_toks": 256, "do_sample": False})


def test_gsm8k_shows_training_rows(run):
    pytest.importorskip("math_verify", reason="needs math-verify (the eval extra)")
    train = [dict(GSM_ROW, question=f"Old {i}?") for i in range(9)]
    _, asked, _ = run(["5"], "gsm8k_cot8_rows", {"train": train, "test": [GSM_ROW]})
    assert asked[0][0] == "".join(f"Q: Old {i}?\nA: 1+1=2 twice 2000*1=2,000 The answer is 2000.\n\n"
                                  for i in range(8)) + "Q: How many?\nA:"


@pytest.mark.parametrize("task, splits, error, message", [
    ("factor_wiki", {"test": [{"text": "x"}]}, DataError,
     r"row 1 of the split 'test' of the data of the task factor_wiki \(json\) has no column "
     "'turncated_prefixes', but 'text'; .*AI21Labs/factor"),
    ("factor_wiki", {"test": None}, DownloadError, r"task factor_wiki \(json\) are not there.*test.json"),
    ("factor_wiki", {"test": "{"}, DataError, r"test\.json, line \d, cannot be read as json"),
    ("gsm8k_cot8_rows", {"test": [GSM_ROW]}, DataError, "no split 'train', but 'test'"),
    ("gsm8k_cot8", {"test": [GSM_ROW]}, SettingError, "gsm8k_eval.py and name it as primer_file.*gsm8k_cot8_rows"),
])
def test_unusable_data_are_named(load, task, splits, error, message):
    with pytest.raises(error, match=message):
        load(task, splits)

