"""The harness's questions, answered as its own Hugging Face backend answers them; and what cannot be asked."""

import copy
import dataclasses
import datetime
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install sled-jax[eval]")

import lm_eval
import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM as HarnessModel
from tokenizers import decoders, models, processors

import sled
from sled import cli
from sled.cli.evaluate import Eval
from sled.cli.options import FusionOptions, SamplingOptions
from sled.demo.problems import problems
from sled.errors import DataError, EvaluationError, SettingError
from sled.eval.harness import tasks as loading
from sled.eval.harness.adapter import SledLM
from sled.eval.harness.cache import Cache
from sled.eval.harness.chat import TokenizerSettings, render
from sled.eval.harness.requests import GenerationSettings
from sled.eval.harness.tasks import load_tasks
from sled.eval.methods import Method, baselines
from sled.eval.report.report import report_folder
from sled.eval.report.run import evaluate
from sled.io import written_whole
from sled.text.tokenizer import Tokenizer

RECORDED = Path(__file__).parent / "fixtures" / "eval_hflm.json"
NO_TRANSFORMERS = "transformers is not installed: pip install sled-jax[parity]"

# A model so small that it says nothing gets a tokenizer of one token per character, and tasks of its own.
SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS = " \n.,?:#=*0123456789abcdefghijklmnopqrstuvwxyz"
QUESTIONS = ["what is 2 times three", "how many stones are 7", "is it so with stones", "nine less four is",
             "why are there stones", "x " * 60]  # of like lengths, but for the last, which is beyond the context
TASKS = {
    "tiny_text": dict(output_type="generate_until", doc_to_text="q: {{question}}\na:", doc_to_target="answer",
                      generation_kwargs=dict(until=["\n", "ab", "<unk>"], max_gen_toks=12, do_sample=False),
                      metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)]),
    "tiny_choice": dict(output_type="multiple_choice", doc_to_text="q: {{question}}\na: ", doc_to_target=0,
                        doc_to_choice="{{[answer, 'no', 'it is so']}}", target_delimiter="",
                        metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)]),
    "tiny_rolling": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="question",
                         metric_list=[dict(metric="byte_perplexity", aggregation="weighted_perplexity",
                                           higher_is_better=False)]),
}


def write_tokenizer(folder: Path, **config) -> None:
    """tokenizer.json, which begins texts with <s>, and tokenizer_config.json with these fields besides."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False) | config))


def write_tasks(folder: Path) -> Path:
    """YAML files of `TASKS`, which read rows.jsonl beside them. JSON is YAML too."""
    rows = [dict(question=question, answer=str(7 * n)) for n, question in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(folder / "rows.jsonl"))))
        (folder / f"{name}.yaml").write_text(json.dumps(dict(task=name, test_split="test", **data, **task)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    path = tmp_path_factory.mktemp("model")
    for file in tiny_folder("llama").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def lm(folder):
    return sled.load(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def loaded(tasks):
    return load_tasks(list(TASKS), include_path=[tasks])


@pytest.fixture(autouse=True)
def no_listing(monkeypatch):
    """The harness's own tasks take seconds to list."""
    manager = loading.TaskManager
    monkeypatch.setattr(loading, "TaskManager", lambda **given: manager(**{**given, "include_defaults": False}))
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)


def answers(model, loaded):
    """By task, what a model answers: per sample a list of answers."""
    results = lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)
    return {name: [sample["resps"] for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])]
            for name in TASKS}


def same(found, expected):
    assert found["tiny_text"] == expected["tiny_text"]
    for name in ("tiny_choice", "tiny_rolling"):
        for of_one, of_other in zip(found[name], expected[name], strict=True):
            for [one], [other] in zip(of_one, of_other, strict=True):
                assert np.asarray(one) == pytest.approx(np.asarray(other), abs=1e-3)  # is_greedy too: 0 or 1


def hflm(folder, batch_size):
    """The harness's own backend."""
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install sled-jax[parity] accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)


def record(folder, loaded):
    """Writes the recorded answers anew. Call it where the tasks were changed."""
    RECORDED.write_text(json.dumps(answers(hflm(folder, 1), loaded)) + "\n")


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_those_recorded_from_hflm(lm, loaded, batch_size):
    model = SledLM(lm, batch_size=batch_size, progress=False)
    same(answers(model, loaded), json.loads(RECORDED.read_text()))
    assert model.counts.truncated == 1 + 3 and model.counts.cut_tokens > 0  # the long question, asked and with choices


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_hflm_still_answers_so(folder, loaded):
    same(answers(hflm(folder, 8), loaded), json.loads(RECORDED.read_text()))


def test_tokens_are_those_of_transformers(lm, folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    for config in ({}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}):
        path = tmp_path / str(len(config))
        path.mkdir()
        write_tokenizer(path, **config)
        other = copy.copy(lm)
        other.text = Tokenizer.from_folder(path)
        model, theirs = SledLM(other, progress=False), transformers.AutoTokenizer.from_pretrained(path)
        assert model.tok_encode("a b") == theirs.encode("a b")
        assert model.tok_encode("<s>a b") == theirs.encode("<s>a b", add_special_tokens=False)
        assert model.tok_encode("a b", add_special_tokens=False) == theirs.encode("a b", add_special_tokens=False)
        assert (model.eot_token_id, model.prefix_token_id) == (theirs.eos_token_id, theirs.bos_token_id)


TEMPLATE = """{{ bos_token }}{%- for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}
    {%- if m.role == 'assistant' %}{% generation %}a: {{ m.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}q: {{ m.content | trim | tojson }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}a: {% endif %}"""
NOW = datetime.datetime(2025, 1, 2)
CHAT = [{"role": "user", "content": "one <b>"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": " three "}]


@pytest.mark.parametrize("messages, prompt", [(CHAT, True), ([*CHAT, {"role": "assistant", "content": "so "}], False)])
def test_chat_templates_read_as_in_transformers(tmp_path, messages, prompt):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    settings = TokenizerSettings.read(tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt)
    assert render(settings.template, messages, settings.tokens, add_generation_prompt=prompt, now=NOW) == expected


def test_a_template_writes_the_same_day_throughout(lm, tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    other = copy.copy(lm)
    other.text = Tokenizer.from_folder(tmp_path)
    assert SledLM(other, progress=False, now=NOW).apply_chat_template(CHAT[:1]) == "02 Jan 2025 one <b>"


def test_chat_templates_of_the_configuration_and_their_lack(lm, tmp_path):
    with pytest.raises(EvaluationError, match="no chat template"):
        SledLM(lm, progress=False).apply_chat_template(CHAT)
    write_tokenizer(tmp_path, chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "x", "template": ""}])
    other = copy.copy(lm)
    other.text = Tokenizer.from_folder(tmp_path)
    model = SledLM(other, progress=False)
    system = [{"role": "system", "content": "be brief"}]
    assert model.apply_chat_template(system + CHAT) == model.apply_chat_template(CHAT)  # which the template refuses
    with pytest.raises(EvaluationError, match="refuses these messages"):
        model.apply_chat_template([{"role": "tool", "content": ""}])
    write_tokenizer(tmp_path, chat_template=[{"name": "x", "template": ""}])
    with pytest.raises(EvaluationError, match="none of them the default"):
        TokenizerSettings.read(tmp_path)


def text_request(context, doc=0, repeats=1, **given):
    return Instance("generate_until", {}, (context, dict(until=["\n"], max_gen_toks=12) | given), 0,
                    ("t", doc, repeats))


def test_a_special_stop_string_ends_the_text(lm):
    prompt = f"q: {QUESTIONS[0]}\na:"
    [whole] = SledLM(lm, progress=False).generate_until([text_request(prompt)])
    out = lm.generate([SledLM(lm, progress=False).tok_encode(prompt)], max_new_tokens=12, stop=["\n"])
    assert whole == out.texts[0]
    special = next((t for t in out.tokens[0] if t < 2), None)
    [text] = SledLM(lm, progress=False).generate_until([text_request(prompt, until=["\n", "<unk>", "<s>"])])
    assert text == (whole if special is None else lm.text.decode(out.tokens[0][:out.tokens[0].index(special)]))


def test_what_is_drawn_depends_on_the_document_alone(lm):
    warm = dict(do_sample=True, temperature=1.5)
    prompt = f"q: {QUESTIONS[0]}\na:"
    twice = lambda *docs: [text_request(prompt, doc, 2, **warm) for doc in docs for _ in range(2)]  # noqa: E731
    model = SledLM(lm, batch_size=6, progress=False)
    texts = model.generate_until(twice(0, 1, 2))
    assert len(set(texts)) > 3 and model.counts.computed == 6
    others = SledLM(lm, batch_size=6, progress=False).generate_until(twice(3, 2, 1))
    assert others[2:] == [*texts[4:6], *texts[2:4]]
    of_method = SledLM(lm, Method("warm", sampling=sled.Sampling(temperature=1.5)), batch_size=6, progress=False)
    assert of_method.generate_until([text_request(prompt, 0, 2)]) == texts[:1]


@pytest.mark.parametrize("given, says", [
    ({"num_beams": 4}, "num_beams, which mean nothing here"),
    ({"do_sample": True}, "no temperature above 0"),
    ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, "Sampling.top_p is 2.0"),
])
def test_what_cannot_be_generated_is_named(given, says):
    with pytest.raises(EvaluationError, match=says):
        GenerationSettings.of(dict(until=["\n"], **given))


def test_generation_settings_are_read_as_the_harness_means_them():
    read, cold = GenerationSettings.of, {"do_sample": False, "temperature": 0.5, "top_p": 0.9}
    assert read({"until": "x", "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": None}) == (
        GenerationSettings(("x",), 7, sled.Sampling(temperature=0.5, top_p=0.9)))
    assert read(cold) == GenerationSettings((), 256, sled.Sampling())
    assert read({"max_gen_toks": 7}, at_most=5).max_new_tokens == 5
    assert read({}, at_most=500).max_new_tokens == 500


def test_an_answer_longer_than_the_context_is_named(lm):
    with pytest.raises(EvaluationError, match=r"64 tokens long, but the context of .* holds 64"):
        SledLM(lm, max_new_tokens=64, progress=False).generate_until([text_request("a", max_gen_toks=None)])


@pytest.mark.parametrize("method, idle", [
    (Method("early", exits=sled.EarlyExit((1,), threshold=0.5)), "exits"),
    (Method("guess", exits=sled.SelfSpeculation(1)), "exits"),
    (Method("warm", sampling=sled.Sampling(temperature=1.0)), "sampling"),
])
def test_log_likelihoods_are_refused_where_a_setting_would_do_nothing(lm, tasks, method, idle):
    with pytest.raises(EvaluationError, match=f"'tiny_choice' asks for log-likelihoods, which never depend on "
                                              f"the {idle} of a method: the figures of '{method.name}' would"):
        evaluate(lm, "tiny_choice", [method], include_path=[tasks], progress=False)


@pytest.mark.parametrize("given, name", [
    (dict(), "greedy"), (dict(sampling_options=SamplingOptions(seed=3)), "greedy"),
    (dict(sampling_options=SamplingOptions(temperature=0.5, top_k=4, seed=3)), "final layer, temperature 0.5, top k 4"),
    (dict(sampling_options=SamplingOptions(temperature=1), fusion_options=FusionOptions("sled", rate=2.0)),
     "SLED, rate 2, temperature 1"),
])
def test_the_command_calls_a_method_by_its_options(given, name):
    assert Eval(tasks=("sled_demo",), **given)._name() == name


def test_a_model_is_no_name():
    with pytest.raises(SettingError, match=r"lm is 'demo', but must be an instance, .* give what sled\.load returns"):
        evaluate("demo", "sled_demo", [Method("greedy")])


def test_baselines_are_plain_decoding_and_the_clamp():
    method = Method("mine", fusion=sled.SLED(rate=3.0, scale=20, lower_bound=-500.0), exits=sled.SelfSpeculation(2))
    assert [(b.name, b.fusion, b.exits) for b in baselines(method)] == [
        ("greedy", sled.FinalLayer(), None), ("clamp only", sled.ClampOnly(scale=20, lower_bound=-500.0), None)]
    assert [b.name for b in baselines(Method("dola", fusion=sled.DoLa()))] == ["greedy"]
    assert baselines(Method("g")) == ()
    with pytest.raises(SettingError, match=r"Method\.fusion"):
        Method("x", fusion="sled")


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


def test_a_task_that_keeps_to_no_examples_says_so(lm, capsys):
    told = dict(metadata={"problems": 2}, max_new_tokens=4, limit=1)
    report = evaluate(lm, "sled_demo", [Method("greedy")], num_fewshot=3, **told)
    assert report.tasks["greedy"][0].num_fewshot == 0
    assert "warning: 3 examples before each question were asked for, but the task 'sled_demo' keeps to the 0 that" in \
        capsys.readouterr().err
    evaluate(lm, "sled_demo", [Method("greedy")], num_fewshot=0, **told)
    assert "warning" not in capsys.readouterr().err


class Solver(HarnessModel):
    """Answers with the solution, with another number, or with none."""

    def generate_until(self, requests):
        solution = {p.question: p.solution for p in problems("heldout", 3)}
        texts = [" " + solution[r.args[0].removeprefix("Question: ").removesuffix("\nAnswer:")] for r in requests]
        return [texts[0], texts[1] + "9", "I think so. #### none"]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_the_demo_task_counts_an_answer_without_a_number_wrong():
    from sled.eval.report.scores import TaskResult

    loaded = load_tasks(["sled_demo"], metadata={"problems": 3})
    results = lm_eval.evaluate(lm=Solver(), task_dict=loaded, bootstrap_iters=0)
    task = TaskResult.of(results, "sled_demo", loaded["tasks"]["sled_demo"])
    [scores] = task.scores().values()
    assert scores.tolist() == [1, 0, 0] and task.unanswered == {"answer": 1} and task.n == 3


def test_the_command_writes_a_report_and_computes_nothing_twice(folder, tasks, tmp_path, capsys):
    arguments = ["eval", "--tasks", "tiny_text", "--model", str(folder), "--include-path", str(tasks),
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
    assert "tiny_text: 6 samples" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [m["counts"]["computed"] for m in again["methods"]] == [0, 0, 0]
    assert again["comparisons"] == report["comparisons"]


def test_a_report_is_replaced_whole_or_not_at_all(lm, tasks, tmp_path):
    report = evaluate(lm, "tiny_text", [Method("greedy")], include_path=[tasks], batch_size=6, progress=False)
    report.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 4
    other = dataclasses.replace(report, date="today")

    class Broken:
        def json(self):
            return {}

        def markdown(self, **_):
            return ""

        tested = 0

        def picture(self, path):
            path.write_text("half of it")
            raise OSError(28, "No space left on device")

    other.__dict__["comparisons"] = {"tiny_text: exact_match": Broken()}
    with pytest.raises(SettingError, match="No space left"):
        other.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    del other.__dict__["comparisons"]
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


def test_self_speculation_writes_the_same_texts(lm, loaded):
    method = Method("guess", exits=sled.SelfSpeculation(1, draft=3), schedule=sled.Lockstep())
    model = SledLM(lm, method, batch_size=8, progress=False)
    texts = model.generate_until([text_request(f"q: {question}\na:", doc, until=["\n", "ab", "<unk>"])
                                  for doc, question in enumerate(QUESTIONS)])
    recorded = json.loads(RECORDED.read_text())["tiny_text"]
    assert texts == [text for [[text]] in recorded]


def test_what_was_interrupted_goes_on_where_it_was(lm, tmp_path, monkeypatch):
    requests = [text_request(f"q: {question}{n}\na:", n) for n in (1, 2) for question in QUESTIONS]
    cache = Cache(tmp_path / "answers.sqlite")
    model = SledLM(lm, batch_size=6, cache=cache, progress=False)
    generate, calls = lm.generate, []

    def once(prompts, **settings):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(prompts, **settings)

    monkeypatch.setattr(lm, "generate", once)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(requests)
    cache.close()
    resumed = SledLM(lm, batch_size=6, cache=Cache(tmp_path / "answers.sqlite"), progress=False)
    texts = resumed.generate_until(requests)
    assert model.counts.computed == resumed.counts.computed == 6 and calls == [6, 6, 6]
    assert texts == SledLM(lm, batch_size=6, progress=False).generate_until(requests)


GOOD = {"question": "why", "answer": "so"}


@pytest.mark.parametrize("name, rows, says", [
    ("rows.jsonl", None, "there is no"),
    ("rows.jsonl", [], "is empty"),
    ("rows.txt", [GOOD], "says nothing about its format"),
    ("rows.jsonl", [{"problem": "why", "answer": "so"}], "the columns problem, answer, but the task tiny_text reads"),
    ("rows.jsonl", [GOOD, {"question": "how"}], "no 'answer' in row 2"),
    ("rows.jsonl", [GOOD, "not JSON"], r"rows\.jsonl, line 2, cannot be read as json \(JSON parse error: "),
    ("data/test.jsonl", [GOOD, GOOD, '{"question": 1'], r"test\.jsonl, line 3, cannot be read as data \((?!An error)"),
    ("rows.parquet", ["no Parquet"], r"rows\.parquet cannot be read as parquet \((?!An error)"),
    ("data/train.jsonl", [GOOD], "the splits train, but the task tiny_text is evaluated on 'test'"),
])
def test_data_that_do_not_fit_are_named(tasks, tmp_path, capfd, name, rows, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if rows is not None:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    with pytest.raises(DataError, match=says):
        load_tasks(["tiny_text"], include_path=[tasks], data=path if path.parent == tmp_path else path.parent)
    assert "rror" not in capfd.readouterr().err  # what is raised is not logged besides


def test_local_data_take_the_place_of_a_tasks_own(tasks, tmp_path):
    rows = [{"question": f"what {n}", "answer": str(n)} for n in range(5)]
    write = lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write(tmp_path / "rows.jsonl", rows[:3])
    loaded = load_tasks(["tiny_text", "tiny_rolling"], include_path=[tasks], num_fewshot=2,
                        data=[f"tiny_text={tmp_path / 'rows.jsonl'}"])
    task = loaded["tasks"]["tiny_text"]
    assert [doc["question"] for doc in task.eval_docs] == ["what 0", "what 1", "what 2"]
    for doc in task.eval_docs:  # examples come from the same file, without the row that is asked
        shown = task.fewshot_context(doc, 2)
        assert shown.count(doc["question"]) == 1 and shown.count("q: ") == 3
    assert len(loaded["tasks"]["tiny_rolling"].eval_docs) == len(QUESTIONS)
    assert not loaded["groups"]
    (tmp_path / "splits").mkdir()
    write(tmp_path / "splits" / "test.jsonl", rows[:2])
    write(tmp_path / "splits" / "train.jsonl", rows[2:])
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
def test_more_examples_than_rows_are_refused_before_any_work(tasks, tmp_path, name, asked, questions, says):
    listed = dict(TASKS["tiny_text"], task="listed", dataset_path="nobody/nothing", test_split="test",
                  fewshot_config=dict(sampler="first_n", samples=[{"question": "q", "answer": "a"}]))
    (tmp_path / "listed.yaml").write_text(json.dumps(listed))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n"
                                                 for q in questions))
    load = lambda count: load_tasks([name], include_path=[tasks, tmp_path], num_fewshot=count,  # noqa: E731
                                    data=tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=says):
        load(asked)
    if name == "tiny_text":  # one less is shown to every row
        task = load(asked - 1)["tasks"][name]
        assert all(task.fewshot_context(doc, asked - 1).count("q: ") == asked for doc in task.eval_docs)


def test_every_method_sees_the_same_examples(lm, tasks, tmp_path):
    """Examples are drawn at random: the second method finds all answers of the first only if its prompts are alike."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": f"w {n}", "answer": str(n)}) + "\n"
                                                 for n in range(8)))
    report = evaluate(lm, "tiny_text", [Method("one"), Method("two")], include_path=[tasks], num_fewshot=2,
                      data=tmp_path / "rows.jsonl", max_new_tokens=4, batch_size=8, progress=False)
    one, two = (method["counts"] for method in report.methods)
    assert one["computed"] == 8 and two["computed"] == 0 and not any(m["verifies"] for m in report.methods)
    assert report.tasks["one"][0].documents() == report.tasks["two"][0].documents()


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
])
def test_tasks_that_cannot_be_had_are_named(tasks, tmp_path, names, given, says):
    if given.get("data") == "FACTOR":
        given = {**given, "data": tmp_path / "rows.jsonl"}
        given["data"].write_text(json.dumps({"full_prefix": "a", "turncated_prefixes": "a", "completion": "b",
                                             **{f"contradiction_{n}": str(n) for n in range(3)}}) + "\n")
    with pytest.raises(EvaluationError, match=says):
        load_tasks(names, **{"include_path": [tasks], **given})
