"""Tasks by name, and with data of one's own: what each reads and shows, and what is refused before any work."""

import json
from pathlib import Path

import pytest
from harness_tasks import QUESTIONS, TASKS, Scripted, lm_eval, write_rows

from sled.demo.problems import problems
from sled.errors import DataError, EvaluationError, SettingError
from sled.eval.harness.tasks import load_tasks
from sled.eval.report.scores import TaskResult

pytest_plugins = ["harness_tasks"]
pytestmark = pytest.mark.usefixtures("no_listing")


def test_metadata_that_a_task_may_read_are_taken(tmp_path):
    """A function that takes any name, and a class of one's own, may read what cannot be known."""
    (tmp_path / "own.py").write_text("""import datasets
from lm_eval.api.task import ConfigurableTask

class Own(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

def rows(**told):
    return datasets.DatasetDict(test=datasets.Dataset.from_list([dict(question="q", answer=told["word"])]))

def one_row(word, **_):
    return rows(word=word)
""")
    tags = {"made": "custom_dataset: !function own.rows",
            "classed": "class: !function own.Own\ncustom_dataset: !function own.one_row"}
    for name, tag in tags.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\noutput_type: generate_until\n"
                                               f"doc_to_text: question\ndoc_to_target: answer\n{tag}\n")
        loaded = load_tasks([name], include_path=[tmp_path], metadata={"word": "w", "other": 1})
        assert loaded["tasks"][name].eval_docs[0]["answer"] == "w"
    with pytest.raises(SettingError, match=r"problems is 'abc', but must be a whole number of at least 1; it counts"):
        load_tasks(["sled_demo"], metadata={"problems": "abc"})


def test_the_demo_task_counts_an_answer_without_a_number_wrong():
    loaded = load_tasks(["sled_demo"], metadata={"problems": 3})
    right, other, _ = problems("heldout", 3)
    model = Scripted([f" {right.solution}", f" {other.solution}9", "I think so. #### none"])
    results = lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)
    task = TaskResult.of(results, "sled_demo", loaded["tasks"]["sled_demo"])
    [scores] = task.scores().values()
    assert scores.tolist() == [1, 0, 0] and task.unanswered == {"answer": 1} and task.n == 3


GOOD = {"question": "why", "answer": "so"}


@pytest.mark.parametrize("name, rows, says", [
    ("rows.jsonl", None, "there is no"),
    ("rows.jsonl", [], "is empty"),
    ("rows.tsv", [GOOD], "says nothing about its format"),
    ("rows.jsonl", [{"problem": "why", "answer": "so"}], "the columns problem, answer, but the task tiny_text reads"),
    ("rows.jsonl", [GOOD, {"question": "how"}], "no 'answer' in row 2"),
    ("rows.jsonl", [GOOD, "not JSON"], r"rows\.jsonl, line 2, cannot be read as json \(Expecting value\); mend it"),
    ("data/test.jsonl", [GOOD, GOOD, '{"question": 1'], r"test\.jsonl, line 3, cannot be read as json \(Expecting"),
    ("rows.parquet", ["no Parquet"], r"rows\.parquet cannot be read as parquet \((?!An error)"),
    ("data/train.jsonl", [GOOD], "the splits train, but the task tiny_text is evaluated on 'test'"),
])
def test_data_that_do_not_fit_are_named(tiny_tasks, tmp_path, capfd, name, rows, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if rows is not None:
        write_rows(path, rows)
    with pytest.raises(DataError, match=says):
        load_tasks(["tiny_text"], include_path=[tiny_tasks], data=path if path.parent == tmp_path else path.parent)
    assert "rror" not in capfd.readouterr().err  # what is raised is not logged besides


@pytest.mark.parametrize("end, remedy", [
    ("9{,}500", "write 9500"), ("\u22123", "write -3"), ("18 dollars", "write 18"), ("\u20ac5", "write 5"),
    ("**7**", "write 7"), (".", "give one clear number"), (",", "give one clear number"), ("", "give one clear number"),
    ("12 or 13", "give one clear number"), ("3/4", "write 0.75"), ("\uff17", "write 7"),
])
def test_references_that_equal_no_answer_are_named(tiny_tasks, tmp_path, end, remedy):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"question": "why", "answer": f"so\n#### {each}"} for each in ("72.", "$1,234.50", "-3", end)])
    with pytest.raises(DataError, match=f"in row 4 an entry 'answer' that ends with .* behind its ####, .*; {remedy}$"):
        load_tasks(["tiny_text"], include_path=[tiny_tasks], data=path)
    with path.open("a") as file:  # without the mark in all rows, and in the task, it is a heading in Markdown
        file.write(json.dumps({"question": "why", "answer": "so"}) + "\n")
    load_tasks(["tiny_text"], include_path=[tiny_tasks], data=path)


def test_local_data_take_the_place_of_a_tasks_own(tiny_tasks, tmp_path):
    rows = [{"question": f"what {n}", "answer": str(n)} for n in range(5)]
    write_rows(tmp_path / "rows.jsonl", rows[:3])
    loaded = load_tasks(["tiny_text", "tiny_rolling"], include_path=[tiny_tasks], num_fewshot=2,
                        data=[f"tiny_text={tmp_path / 'rows.jsonl'}"])
    task = loaded["tasks"]["tiny_text"]
    assert [doc["question"] for doc in task.eval_docs] == ["what 0", "what 1", "what 2"]
    for doc in task.eval_docs:  # examples come from the same file, without the row that is asked
        shown = task.fewshot_context(doc, 2)
        assert shown.count(doc["question"]) == 1 and shown.count("q: ") == 3
    assert len(loaded["tasks"]["tiny_rolling"].eval_docs) == len(QUESTIONS)
    assert not loaded["groups"]
    (tmp_path / "splits").mkdir()
    write_rows(tmp_path / "splits" / "test.jsonl", rows[:2])
    write_rows(tmp_path / "splits" / "train.jsonl", rows[2:])
    config = dict(TASKS["tiny_text"], task="with_train", dataset_path="nobody/nothing", test_split="test",
                  training_split="train", fewshot_split="train", num_fewshot=3)
    (tmp_path / "with_train.yaml").write_text(json.dumps(config))
    task = load_tasks(["with_train"], include_path=[tmp_path], data=tmp_path / "splits")["tasks"]["with_train"]
    assert all(f"what {n}" in task.fewshot_context(task.eval_docs[0], 3) for n in (0, 2, 3, 4))


@pytest.mark.parametrize("name, asked, questions, says", [
    ("tiny_text", 3, "abc", "'tiny_text' shows 3 examples .* 3 rows, 2 besides .*--num-fewshot. to 2, or give"),
    ("tiny_text", 2, "abb", "shows 2 examples .* 3 rows, 1 besides"),  # b is not shown to b
    ("tiny_text", 1, "a", "hold 1 row, 0 besides the one that is asked; give more rows"),
    ("gsm8k_cot8_rows", None, "abc", "'gsm8k_cot8_rows' shows 8 examples .* 3 rows, 2 besides"),
    ("listed", 2, "abc", "'listed' shows 2 examples .* the data they come from hold 1 row; lower"),
])
def test_more_examples_than_rows_are_refused_before_any_work(tiny_tasks, tmp_path, name, asked, questions, says):
    listed = dict(TASKS["tiny_text"], task="listed", dataset_path="nobody/nothing", test_split="test",
                  fewshot_config=dict(sampler="first_n", samples=[{"question": "q", "answer": "a"}]))
    (tmp_path / "listed.yaml").write_text(json.dumps(listed))
    data = write_rows(tmp_path / "rows.jsonl", ({"question": q, "answer": "#### 1"} for q in questions))
    load = lambda count: load_tasks([name], include_path=[tiny_tasks, tmp_path], num_fewshot=count, data=data)  # noqa: E731
    with pytest.raises(DataError, match=says):
        load(asked)
    if name == "tiny_text":  # one less is shown to every row
        task = load(asked - 1)["tasks"][name]
        assert all(task.fewshot_context(doc, asked - 1).count("q: ") == asked for doc in task.eval_docs)


@pytest.mark.parametrize("kind", [str, Path, lambda path: [str(path)], lambda path: (path,), lambda path: iter([path])])
def test_a_name_or_a_folder_by_itself_is_one(tiny_tasks, kind):
    assert set(load_tasks("tiny_text", include_path=kind(tiny_tasks))["tasks"]) == {"tiny_text"}


@pytest.mark.parametrize("given", [dict(include_path=5), dict(include_path={"a": 1}), dict(include_path=b"ab"),
                                   dict(include_path=[5]), dict(include_path=None), dict(names=5), dict(names=b"ab"),
                                   dict(names=[["tiny_text"]]), dict(names={"tiny_text": 1})], ids=str)
def test_what_is_no_list_of_names_is_refused(given):
    with pytest.raises(SettingError, match=r"must be one or several (folders|names of tasks); name"):
        load_tasks(**{"names": "tiny_text", **given})


@pytest.mark.parametrize("names, given, says", [
    (["tiny_texts"], {}, "no task 'tiny_texts'; did you mean tiny_text"),
    (["tiny_text", "tiny_text"], {}, "named twice"),
    ([], {}, "no task was given"),
    (["tiny_text"], {"data": "other=rows.jsonl"}, "data are given for other, but the tasks are tiny_text"),
    (["tiny_text", "tiny_choice"], {"data": "rows.jsonl"}, "TASK=PATH"),
    (["tiny_text"], {"include_path": ["nowhere"]}, "no folder nowhere"),
    (["tiny_text"], {"data": ["tiny_text=a.jsonl", "tiny_text=b.jsonl"]}, "twice for 'tiny_text', a.jsonl and b.jsonl"),
    (["tiny_text"], {"data": ["a.jsonl", "b.jsonl"]}, "twice for 'tiny_text', a.jsonl and b.jsonl"),
    (["tiny_text", "sled_demo"], {"metadata": {"problems": 2, "nosuch": 1}}, "'nosuch', .* one of problems, seed, ver"),
    (["factor_news"], {"metadata": {"primer_file": "x"}, "data": "FACTOR"}, "'primer_file', which no task here reads"),
    *(([task], {"data": "OTHER"}, rf"^row 1 of the split '\w+' of the data of the task {task} \(/.*/rows\.jsonl\) has "
       rf"no column '{column}', but 'full_prefix', 'answer'; ") for task, column in (
        ("factor_expert", "turncated_prefixes"), ("factor_news", "completion"), ("truthfulqa_mc123_rows", "question"),
        ("strategyqa_cot6_rows", "question"), ("gsm8k_cot8_rows", "question"))),
])
def test_tasks_that_cannot_be_had_are_named(tiny_tasks, tmp_path, names, given, says):
    if given.get("data") == "FACTOR":
        columns = ("full_prefix", "turncated_prefixes", "completion", *(f"contradiction_{n}" for n in range(3)))
        given = {**given, "data": write_rows(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "a")])}
    if given.get("data") == "OTHER":
        given = {**given, "data": write_rows(tmp_path / "rows.jsonl", [{"full_prefix": "a", "answer": "b"}] * 9)}
    with pytest.raises((EvaluationError, DataError), match=says):
        load_tasks(names, **{"include_path": [tiny_tasks], **given})
