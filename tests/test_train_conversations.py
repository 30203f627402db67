"""Conversations to train on: which tokens are learnt, behind what, whatever the template does."""

import dataclasses
import json

import datasets
import pytest
from chat_styles import CHARACTERS, SPECIAL, STYLES, said, write_tokenizer
from training_data import CONFIG, documents_of

from sled.errors import DataError, SettingError, TemplateError
from sled.text.tokenizer import Tokenizer
from sled.train.data.conversations import tokenised, written
from sled.train.data.packing import Layout
from sled.train.data.sources import Source

pytest_plugins = ["training_data"]
TOKENS = [*SPECIAL, *CHARACTERS]
TURNS = said("a", "b", "c", "d")
THOUGHT = said("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")


@pytest.fixture
def text(tmp_path):
    return lambda template, **config: Tokenizer.from_folder(write_tokenizer(tmp_path, template, **config))


def marked(text, spans):
    """With what is learnt in brackets."""
    for start, end in reversed(spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text


KIND = "<s>system\nBe kind.</s>\n"


@pytest.mark.parametrize(("style", "messages", "expected"), [
    ("chatml", TURNS, [KIND + "<s>user\na</s>\n<s>assistant\n[b</s>]\n<s>user\nc</s>\n<s>assistant\n[d</s>]"]),
    ("chatml", [*said("a", "b"), *said("e")], [KIND + "<s>user\na</s>\n<s>assistant\n[b</s>]"]),
    ("chatml", [{"role": "assistant", "content": "x"}, *said("a", "b")],
     [KIND + "<s>assistant\nx</s>\n<s>user\na</s>\n<s>assistant\n[b</s>]"]),
    ("chatml", [*said("a", ""), {"role": "assistant", "content": "b\n "}],
     [KIND + "<s>user\na</s>\n<s>assistant\n[</s>]\n<s>assistant\n[b\n </s>]"]),
    ("roles", TURNS, ["<|user|>\na</s>\n<|assistant|>\n[b</s>]\n<|user|>\nc</s>\n<|assistant|>\n[d</s>]"]),
    ("turns", said("a", " b "), ["<s><t>user\na</t>\n<t>model\n[b</t>]"]),
    ("names", said("a", "b", system="s"), ["s\nUSER: a ASSISTANT:[ b</s>]"]),
    ("brackets", said("a", "b", "c", "d", system="s"), ["<s>[ask] s\na [/ask][ b </s>]<s>[ask] c [/ask][ d </s>]"]),
    ("thinking", THOUGHT, [
        "<s>user\na</s>\n<s>assistant\n[<think>\nwhy\n</think>\n\nb</s>]",
        "<s>user\na</s>\n<s>assistant\nb</s>\n<s>user\nc</s>\n<s>assistant\n[<think>\nso\n</think>\n\nd</s>]"]),
    ("opened", THOUGHT, ["<s><U>a<A>[\n\nb</s>]<U>c<A>[\n\nd</s>]"]),
    ("marked", TURNS, ["<s>user\na</s>\n<s>assistant\n[b</s>]\n<s>user\nc</s>\n<s>assistant\n[d</s>]"]),
    ("chatml", said("a"), []),
])
def test_each_answer_is_learnt_once_behind_what_it_is_asked_behind(style, messages, expected, text):
    assert [marked(*document) for document in written(messages, text(STYLES[style]).chats)] == expected


@pytest.mark.parametrize("template", [
    STYLES["marked"],
    "{% for m in messages %}{{ m.role }}{%- generation -%} {{ m.content }} {%- endgeneration %}.{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}q{{ m.content }}{% else %}a{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% endif %}{% endfor %}"])
def test_marked_answers_are_those_of_transformers(template, text, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install sled-jax[parity]")
    tokenizer, messages = text(template), said("a b", "c d", "e", "f. g")
    [(ids, learnt)] = tokenised(written(messages, tokenizer.chats), tokenizer)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
        messages, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"][:len(ids)] and learnt == [bool(x) for x in theirs["assistant_masks"][:len(ids)]]
    assert not any(theirs["assistant_masks"][len(ids):])


def test_the_weight_of_what_is_not_learnt_and_truncation(text, load):
    tokenizer, layout = text(STYLES["chatml"]), Layout(128, prompt_weight=0.25)
    rows = load([{"c": TURNS}, {"c": said("x", "y")}], layout, tokenizer=tokenizer, messages="c",
                config=dataclasses.replace(CONFIG, eos_ids=(2,)))
    [(tokens, weights), (_, other)] = documents_of(rows.batch([0], 1, 128))
    assert [TOKENS[t] for t, w in zip(tokens, weights, strict=True) if w == 1] == ["b", "</s>", "d", "</s>"]
    assert set(weights) == set(other) == {0, 0.25, 1} and weights[0] == 0
    cut = load([{"c": TURNS}], Layout(52, too_long="truncate"), tokenizer=tokenizer, messages="c",
               config=dataclasses.replace(CONFIG, eos_ids=(2,)))
    [(short, of_short)] = documents_of(cut.batch([0], 1, 52))
    assert short == tokens[:52] and of_short == [float(w == 1) for w in weights[:52]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "rows"])
def test_files_of_conversations(kind, text, load, tmp_path):
    rows = [{"messages": TURNS}, {"messages": said("no answer")}, {"messages": []}, {"messages": None},
            {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]}]
    path = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    found = load(rows if kind == "rows" else path, Layout(128), tokenizer=text(STYLES["chatml"]), messages="messages")
    assert found.report.examples == 2 and found.report.skipped == {"no answer": 3}


def test_another_template_is_another_cache(text, load):
    args = dict(data=[{"messages": TURNS}], layout=Layout(128), messages="messages")
    first = load(**args, tokenizer=text(STYLES["chatml"]))
    assert load(**args, tokenizer=text(STYLES["chatml"])).digest == first.digest
    assert load(**args, tokenizer=text(STYLES["marked"])).digest != first.digest


@pytest.mark.parametrize(("messages", "template", "error", "says"), [
    ("a", STYLES["chatml"], DataError, "example 1, in its column 'messages': a conversation is 'a'"),
    ([1], STYLES["chatml"], DataError, "a message is 1"),
    ([{"from": "human", "value": "a"}], STYLES["chatml"], DataError, "must have a role"),
    (TURNS, None, TemplateError, "no chat template"),
    (TURNS, "{{ raise_exception('no') }}", TemplateError, "example 1, the model's chat template refuses"),
    (said("a", "b", system="c"), STYLES["turns"], TemplateError, "no system here"),
    (TURNS, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", DataError, "changes what is"),
    (TURNS, "{{ messages[-1].content }}", DataError, "changes what is before"),
    ([{"role": "user"}, {"role": "assistant"}], STYLES["chatml"], DataError, "text as content"),
])
def test_what_cannot_be_learnt_is_named(messages, template, error, says, text, load):
    with pytest.raises(error, match=says):
        load([{"messages": messages}], Layout(64), tokenizer=text(template), messages="messages")


def test_one_kind_of_column():
    with pytest.raises(SettingError, match=r"Source\.messages"):
        Source([], messages="a", text="b")
