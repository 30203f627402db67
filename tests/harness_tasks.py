"""A plugin of pytest: a model so small that it has nothing to tell, one token a character, and tasks for it."""

import json
import logging
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install sled-jax[eval]")

import lm_eval  # noqa: F401 - tests take it from here, and are skipped where it is not
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM as HarnessModel
from tokenizers import Tokenizer, decoders, models, processors

import sled
from sled.eval.harness import tasks as loading

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


def write_rows(path: Path, rows) -> Path:
    """JSON Lines; a row that is a text stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_tokenizer(folder: Path, **config) -> None:
    """tokenizer.json, which begins texts with <s>, and tokenizer_config.json with these fields besides."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False) | config))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_folder) -> Path:
    """The folder of the model."""
    path = shutil.copytree(tiny_folder("llama"), tmp_path_factory.mktemp("model") / "tiny")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def lm(tiny_model):
    return sled.load(tiny_model)


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory) -> Path:
    """The folder of TASKS, as YAML files that read rows.jsonl beside them. JSON is YAML too."""
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder / "rows.jsonl", (dict(question=q, answer=str(7 * n)) for n, q in enumerate(QUESTIONS)))
    for name, task in TASKS.items():
        data = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(folder / "rows.jsonl"))))
        (folder / f"{name}.yaml").write_text(json.dumps(dict(task=name, test_split="test", **data, **task)))
    return folder


@pytest.fixture
def no_listing(monkeypatch):
    """The harness's own tasks take seconds to list."""
    manager = loading.TaskManager
    monkeypatch.setattr(loading, "TaskManager", lambda **given: manager(**{**given, "include_defaults": False}))
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)


class Scripted(HarnessModel):
    """A model of the harness that says what it is told, in turn, and keeps what it was asked."""

    def __init__(self, said):
        super().__init__()
        self.said, self.asked = said, []

    def answer(self, requests):
        self.asked += [request.args for request in requests]
        return list(self.said)

    loglikelihood = generate_until = loglikelihood_rolling = answer


def text_request(question, doc=0, repeats=1, **given):
    """A request of the harness to answer."""
    return Instance("generate_until", {}, (f"q: {question}\na:", dict(until=["\n"], max_gen_toks=12) | given), 0,
                    ("t", doc, repeats))
