"""The authors' evaluation protocols as tasks of the harness, on made-up rows with a model that says what it is told."""

import json
import math

import pytest

from sled.errors import DataError, DownloadError, SettingError
from sled.eval.protocols import FOLDER
from sled.eval.protocols.choices import Scored

FACTOR_ROW = {"full_prefix": "All. ", "turncated_prefixes": "Cut. ", "completion": "T", "contradiction_0": "A",
              "contradiction_1": "B", "contradiction_2": "C"}
QUESTION = {"question": "Why?", "best_answer": "Because", "correct_answers": ["Because", "So."],
            "incorrect_answers": ["Never."]}
GSM_ROW = {"question": "How many?", "answer": "1+1=<<1+1=2>>2 twice\n2000*1=<<2000*1=2000>>2,000\n#### 2,000"}
STRATEGY_ROW = {"question": "Is it?", "answer": False, "facts": ["It was.", "It is not."]}


@pytest.fixture(scope="module")
def manager():
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm_eval (the eval extra)")
    return tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)


@pytest.fixture
def load(manager, tmp_path):
    """`load(task, {split: rows}, primer_file=...)`: the task on made-up rows."""
    from lm_eval.tasks._yaml_loader import load_yaml

    def load(name, splits, manager=manager, **metadata):
        files = {split: tmp_path / f"{split}.json" for split in splits}
        for split, path in files.items():
            path.write_text(splits[split] if isinstance(splits[split], str) else json.dumps(splits[split]))
        config = load_yaml(FOLDER / f"{name}.yaml")
        config |= dict(dataset_path="json", metadata=config["metadata"] | metadata, dataset_kwargs=dict(
            data_files={split: str(path) for split, path in files.items()}, cache_dir=str(tmp_path / "cache")))
        return manager.load([config])["tasks"][name]

    return load


def run(task, said):
    """Results of one task, and the (prompt, continuation or settings) that the model was given. `said`: what the model
    says, in turn."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate  # without what simple_evaluate collects about the machine, which takes long

    asked = []

    class Scripted(LM):
        def answer(self, requests):
            asked.extend(request.args for request in requests)
            return list(said)

        loglikelihood = generate_until = answer

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    out = evaluate(Scripted(), {task.task_name: task}, bootstrap_iters=0)
    [results] = out["results"].values()
    return {key.removesuffix(",none"): value for key, value in results.items() if key.endswith(",none")
            and "stderr" not in key}, asked, out


def test_all_tasks_are_found(manager):
    primed = ["gsm8k_cot8", "strategyqa_cot6", "truthfulqa_mc123"]
    assert manager.all_tasks == sorted([*primed, *(f"{task}_rows" for task in primed), "factor_expert", "factor_news",
                                        "factor_wiki"])


def test_factor_by_sum_and_by_mean(load):
    rows = [{**FACTOR_ROW, "completion": f"T{i}"} for i in range(2)]
    said = [Scored(-4.0, False, 2), Scored(-3.0, False, 1), Scored(-9.0, False, 3), Scored(-9.0, False, 4),
            Scored(-4.0, False, 2), Scored(-5.0, False, 1), Scored(-9.0, False, 1), Scored(-9.0, False, 9)]
    results, asked, _ = run(load("factor_wiki", {"test": rows}), said)
    # by the sum -4 < -3, then -4 is best; by the mean -2 is best (-3, -3, -2.25), then -2 < -1
    assert results == {"acc_sum": 0.5, "acc_mean": 0.5}
    assert asked[:4] == [("Cut. ", " T0"), ("Cut. ", " A"), ("Cut. ", " B"), ("Cut. ", " C")]
    results, asked, _ = run(load("factor_news", {"test": rows}), [tuple(score) for score in said])
    assert results == {"acc_sum": 0.5}, "without the numbers of tokens there is no mean"
    assert asked[0] == ("All. ", " T0")


def test_truthfulqa_with_demonstrations_of_a_file(load, tmp_path):
    (tmp_path / "primer.txt").write_text("Q: x\nA: y.\n\n")
    rows = [QUESTION, {**QUESTION, "question": "Who?"}]
    scores = [math.log(0.5), math.log(0.1), math.log(0.4), math.log(0.1), math.log(0.7), math.log(0.2)]
    results, asked, out = run(load("truthfulqa_mc123", {"validation": rows},
                                        primer_file=str(tmp_path / "primer.txt")), [(s, False) for s in scores])
    assert results == pytest.approx({"mc1": 0.5, "mc2": 0.7, "mc3": 0.5})
    assert asked[:3] == [("Q: x\nA: y.\n\nQ: Why?\nA:", f" {answer}") for answer in ("Because.", "So.", "Never.")]
    record = out["configs"]["truthfulqa_mc123"]["metadata"]["primer"]
    assert record["as_published"] is False and len(record["sha256"]) == 64


def test_truthfulqa_shows_other_rows(load):
    rows = [{**QUESTION, "question": f"Why {i}?"} for i in range(8)]
    _, asked, _ = run(load("truthfulqa_mc123_rows", {"validation": rows}), [(-1.0, False)] * 24)
    show = lambda shown, last: "".join(f"Q: Why {i}?\nA: Because.\n\n" for i in shown) + f"Q: Why {last}?\nA:"  # noqa: E731
    assert asked[0][0] == show((1, 2, 3, 4, 5, 6), 0) and asked[-1][0] == show(range(6), 7)


def test_strategyqa(load, tmp_path):
    (tmp_path / "primer.txt").write_text("Q: x\nA: y. So the answer is no.")
    rows = [{"question": "Is it?", "answer": answer} for answer in (True, False, True)]
    said = ["It is. So the answer is yes.", "Unknown.", " So the answer is perhaps."]
    task = load("strategyqa_cot6", {"test": rows}, primer_file=str(tmp_path / "primer.txt"))
    results, asked, _ = run(task, said)
    assert results == pytest.approx({"acc": 2 / 3, "stated": 1 / 3})
    prompt, settings = asked[0]
    assert prompt == "Q: x\nA: y. So the answer is no.\n\nQ: Is it?\nA:"
    assert settings == {"until": ["Q:", "\n\n##"], "max_gen_toks": 256, "do_sample": False}


def test_strategyqa_reads_the_published_rows_and_shows_their_facts(load):
    rows = [dict(STRATEGY_ROW, question=f"Is {i}?", evidence=[[["a-1"], "operation"], ["no_evidence", ["b", ["c"]]]])
            for i in range(7)]
    results, asked, _ = run(load("strategyqa_cot6_rows", {"test": rows}), ["So the answer is no."] * 7)
    assert results == {"acc": 1, "stated": 1}
    assert asked[6][0] == "".join(f"Q: Is {i}?\nA: It was. It is not. So the answer is no.\n\n" for i in range(6)) + (
        "Q: Is 6?\nA:")


def test_gsm8k(manager, load, tmp_path):
    pytest.importorskip("math_verify", reason="needs math-verify (the eval extra)")
    (tmp_path / "primer.txt").write_text("Q: x\nA: y")
    of_all_tasks = type(manager)(include_path=str(FOLDER), include_defaults=False,
                                 metadata={"primer_file": str(tmp_path / "primer.txt")})
    said = ["The answer is 2,000.", "The answer is 2000.00 dollars.", "1000 * 2 = 2000", "I do not know.", ""]
    results, asked, _ = run(load("gsm8k_cot8", {"test": [GSM_ROW] * 5}, of_all_tasks), said)
    assert results == {"acc": 0.4, "acc_math_verify": 0.6}
    assert asked[0] == ("Q: x\nA: y\n\nQ: How many?\nA:",
                        {"until": ["Q:", "\\end{code}"], "max_gen_toks": 256, "do_sample": False})


def test_gsm8k_shows_training_rows(load):
    pytest.importorskip("math_verify", reason="needs math-verify (the eval extra)")
    train = [dict(GSM_ROW, question=f"Old {i}?") for i in range(9)]
    _, asked, _ = run(load("gsm8k_cot8_rows", {"train": train, "test": [GSM_ROW]}), ["5"])
    assert asked[0][0] == "".join(f"Q: Old {i}?\nA: 1+1=2 twice 2000*1=2,000 The answer is 2000.\n\n"
                                  for i in range(8)) + "Q: How many?\nA:"


@pytest.mark.parametrize("task, splits, error, message", [
    ("factor_wiki", {"test": [{"text": "x"}]}, DataError,
     r"row 1 of the split 'test' of the data of the task factor_wiki \(json\) has no column 'turncated_prefixes'"),
    ("factor_wiki", {"test": "{"}, DataError, "data of the task factor_wiki .json. cannot be read"),
    ("gsm8k_cot8_rows", {"test": [GSM_ROW]}, DataError, "no split 'train', but 'test'"),
    ("gsm8k_cot8", {"test": [GSM_ROW]}, SettingError, "gsm8k_eval.py and name it as primer_file.*gsm8k_cot8_rows"),
])
def test_unusable_data_are_named(load, task, splits, error, message):
    with pytest.raises(error, match=message):
        load(task, splits)


def test_data_out_of_reach_are_named(manager, tmp_path):
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(FOLDER / "factor_wiki.yaml")
    config["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "gone.csv")}}
    with pytest.raises(DownloadError, match=r"task factor_wiki \(csv\) are not there.*gone.csv"):
        manager.load([config])
