"""The harness's questions, answered as its own Hugging Face backend answers them; and what cannot be asked."""

import copy
import datetime
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness_tasks import QUESTIONS, TASKS, Instance, lm_eval, text_request, write_tokenizer

import sled
from sled.errors import EvaluationError, TemplateError, TokenizerError
from sled.eval.harness.adapter import SledLM
from sled.eval.harness.cache import Cache
from sled.eval.harness.tasks import load_tasks
from sled.eval.methods import Method
from sled.text.tokenizer import Tokenizer

pytest_plugins = ["harness_tasks"]
pytestmark = pytest.mark.usefixtures("no_listing")
RECORDED = Path(__file__).parent / "fixtures" / "eval_hflm.json"


@pytest.fixture(scope="module")
def loaded(tiny_tasks):
    return load_tasks(list(TASKS), include_path=[tiny_tasks])


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install sled-jax[parity]")


def answered(lm, requests, *method, **how):
    return SledLM(lm, *method, progress=False, **how).generate_until(requests)


def with_tokenizer(lm, folder, now=None, **config):
    """The model with a tokenizer of this configuration."""
    write_tokenizer(folder, **config)
    other = copy.copy(lm)
    other.text = Tokenizer.from_folder(folder)
    return SledLM(other, progress=False, now=now)


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
def test_answers_are_those_recorded_from_hflm(lm, loaded, batch_size, monkeypatch):
    model, kept = SledLM(lm, batch_size=batch_size, progress=False), []
    add = model._answers.add
    monkeypatch.setattr(model._answers, "add", lambda found: kept.append(len(found)) or add(found))
    same(answers(model, loaded), json.loads(RECORDED.read_text()))
    # 6 texts, 6 questions with 3 choices, and 6 texts to score, one in two windows: a batch is kept, and told, at once
    assert kept == ([6, 8, 8, 2, 7] if batch_size == 8 else [1] * 31)
    assert model.counts.truncated == 1 + 3 and model.counts.cut_tokens > 0  # the long question, asked and with choices


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_hflm_still_answers_so(tiny_model, loaded):
    same(answers(hflm(tiny_model, 8), loaded), json.loads(RECORDED.read_text()))


OTHER_EOS = [(question, until) for question in QUESTIONS for until in ([], ["\n"], "ab", ["<unk>"], ["<s>\n", "b"])]


def other_eos(lm, folder, eos="<s>"):
    """The model in a folder whose tokenizer names an EOS token that is not the model's, and requests for it."""
    model = with_tokenizer(lm, folder, eos_token=eos)
    return model, [text_request(q, n, until=until, do_sample=False) for n, (q, until) in enumerate(OTHER_EOS)]


@pytest.mark.parametrize("eos", ["<s>", "<unk>", "e", "</s>", None, "<nowhere>"])
def test_the_tokenizers_eos_token_ends_a_text_too(lm, tmp_path, eos):
    model, requests = other_eos(lm, tmp_path, eos)
    named = [text_request(q, n, until=[until] if isinstance(until, str) else [*until, *filter(None, [eos])])
             for n, (q, until) in enumerate(OTHER_EOS)]
    assert model.generate_until(requests) == answered(lm, named)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_hflm_ends_such_texts_so(lm, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    model, requests = other_eos(lm, tmp_path)
    requests = requests[::7]  # of every kind one, of another question
    assert model.generate_until(requests) == hflm(tmp_path, 1).generate_until(requests)


def test_tokens_are_those_of_transformers(lm, tmp_path, transformers):
    for config in ({}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}):
        model = with_tokenizer(lm, tmp_path, **config)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
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
def test_chat_templates_read_as_in_transformers(lm, tmp_path, messages, prompt, transformers):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt)
    assert with_tokenizer(lm, tmp_path, NOW).apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_chat_templates_of_the_configuration_and_their_lack(lm, tmp_path):
    with pytest.raises(TemplateError, match="no chat template"):
        SledLM(lm, progress=False).apply_chat_template(CHAT)
    model = with_tokenizer(lm, tmp_path, NOW, chat_template="{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert model.apply_chat_template(CHAT[:1]) == "02 Jan 2025 one <b>"  # the same day throughout
    model = with_tokenizer(lm, tmp_path, chat_template=[{"name": "default", "template": TEMPLATE},
                                                        {"name": "x", "template": ""}])
    system = [{"role": "system", "content": "be brief"}]
    assert model.apply_chat_template(system + CHAT) == model.apply_chat_template(CHAT)  # which the template refuses
    with pytest.raises(TemplateError, match="refuses these messages"):
        model.apply_chat_template([{"role": "tool", "content": ""}])
    model = with_tokenizer(lm, tmp_path, chat_template=[{"name": "x", "template": ""}])
    with pytest.raises(TemplateError, match="no chat template 'default', but x"):
        model.chat_template()


def test_a_special_stop_string_ends_the_text(lm):
    [whole] = answered(lm, [text_request(QUESTIONS[0])])
    prompt = SledLM(lm, progress=False).tok_encode(f"q: {QUESTIONS[0]}\na:")
    out = lm.generate([prompt], max_new_tokens=12, stop=["\n"])
    assert whole == out.texts[0]
    special = next((t for t in out.tokens[0] if t < 2), None)
    [text] = answered(lm, [text_request(QUESTIONS[0], until=["\n", "<unk>", "<s>"])])
    assert text == (whole if special is None else lm.text.decode(out.tokens[0][:out.tokens[0].index(special)]))


def test_what_is_drawn_depends_on_the_document_alone(lm):
    warm = dict(do_sample=True, temperature=1.5)
    twice = lambda *docs: [text_request(QUESTIONS[0], doc, 2, **warm) for doc in docs for _ in range(2)]  # noqa: E731
    model = SledLM(lm, batch_size=6, progress=False)
    texts = model.generate_until(twice(0, 1, 2))
    assert len(set(texts)) > 3 and model.counts.computed == 6
    assert answered(lm, twice(3, 2, 1), batch_size=6)[2:] == [*texts[4:6], *texts[2:4]]
    method = Method("warm", sampling=sled.Sampling(temperature=1.5))
    assert answered(lm, [text_request(QUESTIONS[0], 0, 2)], method, batch_size=6) == texts[:1]


def test_an_answer_longer_than_the_context_is_named(lm):
    with pytest.raises(EvaluationError, match=r"64 tokens long, but the context of .* holds 64"):
        answered(lm, [text_request("a", max_gen_toks=None)], max_new_tokens=64)


def scored_alone(model, context, continuation):
    return model.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0, ("t", 7, 1))])


@pytest.mark.parametrize("ask, error, says", [
    *((lambda model, blank=blank: scored_alone(model, blank, "yes"), EvaluationError, "is white space alone, which the")
      for blank in (" ", "\n", "  ", " \n\n", "\n ")),
    (lambda model: scored_alone(model, "a", ""), EvaluationError, "of an empty text is asked for, after 'a'"),
    (lambda model: scored_alone(model, "a", "b" * 65), EvaluationError, "is 65 tokens long, but the model's"),
    (lambda model: scored_alone(model, "a\ud800", "b"), TokenizerError, "lone surrogates"),
    (lambda model: model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("\ud800",), 0, ("t", 7, 1))]),
     TokenizerError, "lone surrogates"),
    (lambda model: model.generate_until([Instance("generate_until", {}, ("", dict(max_gen_toks=2)), 0, ("t", 7, 1))]),
     EvaluationError, "the prompt is empty"),
    (lambda model: model.generate_until([text_request("a", 7, top_k="x", do_sample=True, temperature=1)]),
     EvaluationError, "top_k is 'x'"),
], ids=range(11))
def test_what_a_sample_cannot_have_names_the_sample(lm, tmp_path, ask, error, says):
    model = with_tokenizer(lm, tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}  # no <s> before a text
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    model.lm.text = Tokenizer.from_folder(tmp_path)
    with pytest.raises(error, match=f"sample 7 of the task 't': .*{says}"):
        ask(model)


def test_self_speculation_writes_the_same_texts(lm, loaded):
    method = Method("draft", exits=sled.SelfSpeculation(1, draft=3), schedule=sled.Lockstep())
    requests = [text_request(question, doc, until=["\n", "ab", "<unk>"]) for doc, question in enumerate(QUESTIONS)]
    recorded = json.loads(RECORDED.read_text())["tiny_text"]
    assert answered(lm, requests, method, batch_size=8) == [text for [[text]] in recorded]


def test_what_was_interrupted_goes_on_where_it_was(lm, tmp_path, monkeypatch):
    requests = [text_request(f"{question}{n}", n) for n in (1, 2) for question in QUESTIONS]
    cache = Cache(tmp_path / "answers.sqlite")
    model = SledLM(lm, batch_size=6, cache=cache, progress=False)
    decode, calls = lm.decode, []

    def once(prompts, decoding, **settings):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(prompts, decoding, **settings)

    monkeypatch.setattr(lm, "decode", once)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(requests)
    cache.close()
    resumed = SledLM(lm, batch_size=6, cache=Cache(tmp_path / "answers.sqlite"), progress=False)
    texts = resumed.generate_until(requests)
    assert model.counts.computed == resumed.counts.computed == 6 and calls == [6, 6, 6]
    assert texts == answered(lm, requests, batch_size=6)
