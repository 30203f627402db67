"""Conversations as prompts: written out as transformers writes them, whatever the template; and templates that fail."""

import copy
import json
import shutil

import numpy as np
import pytest
from chat_styles import CONVERSATIONS, STYLES, said, write_tokenizer

import sled
from sled.errors import PromptError, TemplateError, TokenizerError
from sled.export.forms import export_hf
from sled.lm import LM
from sled.text import renderer
from sled.text.chat import ChatTemplates
from sled.text.prompts import pair_ids, prompt_ids
from sled.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def lm(tiny_folder, tmp_path_factory):
    lm = copy.copy(sled.load(tiny_folder("llama")))
    lm.text = Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("text"), STYLES["chatml"]))
    return lm


@pytest.fixture(scope="module")
def auto():
    transformers = pytest.importorskip("transformers",
                                       reason="transformers is not installed: pip install sled-jax[parity]")
    return transformers.PreTrainedTokenizerFast.from_pretrained  # what AutoTokenizer finds here, and imported sooner


def ask(folder, chat):
    return Tokenizer.from_folder(folder).encode_chat(chat)[0]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("style", STYLES)
def test_templates_write_what_transformers_writes(style, tmp_path, auto):
    theirs = auto(write_tokenizer(tmp_path, STYLES[style]))
    text, written = Tokenizer.from_folder(tmp_path), 0
    for messages in CONVERSATIONS:
        goes_on = messages[-1]["role"] == "assistant"
        how = dict(add_generation_prompt=not goes_on, continue_final_message=goes_on)
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **how)
        except Exception:  # the template's own refusal, or that of Python in it
            with pytest.raises((TemplateError, PromptError)):
                text.encode_chat(sled.Chat(messages))
            continue
        chat = sled.Chat(messages)
        assert text.chats.prompt(chat.messages) == expected
        assert text.encode_chat(chat)[0] == theirs.apply_chat_template(messages, **how)["input_ids"]
        written += 1
    assert written >= 3


@pytest.mark.parametrize("variables", [
    dict(enable_thinking=False), dict(date_string="yesterday"), dict(tools=[{"name": "add", "n": 1.5, "é": None}]),
    dict(chat_template="tool_use"), dict(chat_template="other", bos_token="!"), dict(documents=[{"title": "t"}]),
])
def test_variables_and_named_templates(variables, tmp_path, auto):
    theirs = auto(write_tokenizer(tmp_path, chat_template=[
        {"name": "default", "template": STYLES["headers"] + "{{ documents }}{{ enable_thinking }}"},
        {"name": "tool_use", "template": "{{ tools | tojson(sort_keys=true) }}"},
        {"name": "other", "template": "{{ bos_token }}{{ date_string }}"}]))
    messages = said("b", system="a")
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, **variables)["input_ids"]
    assert ask(tmp_path, sled.Chat(messages, variables=variables)) == expected
    assert ask(tmp_path, sled.Chat("b", "a", variables)) == expected


WHERE = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}"


@pytest.mark.parametrize(("files", "config"), [
    ({}, dict(chat_template="settings " + WHERE)),
    ({"chat_template.jinja": "file " + WHERE}, dict(chat_template="settings")),
    ({"chat_template.jinja": "file\r\n", "additional_chat_templates/rag.jinja": "rag"}, {}),
    ({"additional_chat_templates/default.jinja": "folder", "additional_chat_templates/x.txt": "no"}, {}),
    ({"additional_chat_templates/rag.jinja": "rag"}, dict(chat_template="settings")),  # the default is lost there, too
    ({"special_tokens_map.json": json.dumps(dict(bos_token="</s>", pad_token={"content": "<unk>"}))},
     dict(chat_template=WHERE, sep_token="#")),
    ({"special_tokens_map.json": json.dumps(dict(bos_token="</s>"))},
     dict(chat_template=WHERE, added_tokens_decoder={})),
    ({}, dict(chat_template=WHERE, bos_token=None, image_token="<s>")),
])
def test_templates_and_special_tokens_are_found_where_transformers_finds_them(files, config, tmp_path, auto):
    write_tokenizer(tmp_path, **config)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    found, theirs = ChatTemplates.read(tmp_path), auto(tmp_path)
    named = theirs.chat_template if isinstance(theirs.chat_template, dict) else {"default": theirs.chat_template}
    assert found.templates == named
    if "default" in named:
        assert found.prompt(said("a")) == theirs.apply_chat_template(said("a"), tokenize=False)
    else:
        with pytest.raises(TemplateError, match="no chat template 'default', but rag"):
            found.prompt(said("a"))


def read(folder, content):
    (folder / "chat_template.jinja").write_bytes(content)
    return Tokenizer.from_folder(folder).encode_chat(sled.Chat("a"))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9999) %}"
DOUBLE = "{% set ns = namespace(a='12345678') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"


@pytest.mark.parametrize(("template", "says"), [
    (LOOP + "{% endfor %}" * 3, "does not end within 0.3 seconds"),
    ("{{ (10 ** 5000000) | string | length }}", "does not end|Exceeds the limit"),
    ("{{ 7 ** 7 ** 9 }}{{ 7 ** (7 ** 9) }}", "does not end|Exceeds the limit"),
    ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 2) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
    ("{{ 'x' * 10 ** 12 }}", "needs too much memory"),
    ("{{ 'x'.ljust(10 ** 11) }}", "needs too much memory"),
    ("{{ '%10000000000d' % 1 }}", "needs too much memory|too big|does not end"),
    ("{{ [messages] * 10 ** 10 }}", "needs too much memory"),
    ("{{ 'x' | indent(10 ** 11) | center(10 ** 11) }}", "needs too much memory"),
    (DOUBLE, "needs too much memory|does not end"),
    ("{{ 'x' * 3000000 }}", "writes far more than the messages hold .3,000,000 characters"),
    ("{% if %}", "cannot be read"),
    ("{{ 'open", "cannot be read"),
    ("{% nosuch %}", "cannot be read"),
    ("{{ x | nosuch }}", "cannot be read"),
    ("{{" + "(" * 4000 + ")" * 4000 + "}}", "cannot be read .RecursionError"),
    ("x" * 2 ** 21, "2,097,152 characters long, but at most"),
    ("{{ raise_exception('not today ' * 1000) }}", "refuses these messages .not today"),
    ("{{ messages.x.y }}", "refuses these messages"),
    ("{{ ''.__class__.__mro__ }}", "refuses these messages .*unsafe"),
    ("{{ messages.append(1) }}", "refuses these messages .*unsafe"),
    ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "refuses these messages"),
    ("{{ messages + 1 }}", "fails on these messages .TypeError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 2.0 ** 99999 }}", "OverflowError"),
    ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ("{{ messages[0].content.index('z') }}", "ValueError"),
    ("{{ nothing | tojson }}", "TypeError"),
    ("{% include 'other' %}", "TypeError"),
    ("{{ strftime_now(1) }}", "TypeError"),
])
def test_a_template_that_fails_is_named_in_time(template, says, tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(TemplateError, match=says):
        patch.setattr(renderer, "SECONDS", 0.3 if "does not end" in says else renderer.SECONDS)
        read(tmp_path, template.encode())
    assert read(tmp_path, b"{{ bos_token }}q")[0] == [1, 38]


@pytest.mark.parametrize(("content", "says"), [
    (b"\xff\xfe{\x00", "UTF-8"), ("{{ '\u00e9' }}".encode("latin-1"), "UTF-8"), (b"\x80", "UTF-8"), (None, "folder"),
])
def test_a_template_that_is_no_text_matters_to_chats_alone(content, says, tmp_path, lm):
    write_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.mkdir() if content is None else path.write_bytes(content)
    other = copy.copy(lm)
    other.text = Tokenizer.from_folder(tmp_path)
    assert other.text.encode("a") == lm.text.encode("a")
    with pytest.raises(TemplateError, match=says):
        other.chat("a")


@pytest.mark.parametrize("value", [1, [], [1], [{"name": "default"}], [{"name": 1, "template": "x"}], {"a": "b"}, True])
def test_settings_that_hold_no_template(value, tmp_path):
    with pytest.raises(TemplateError, match=r"no chat template|neither a template nor a list"):
        ask(write_tokenizer(tmp_path, chat_template=value), sled.Chat("a"))


def test_an_interrupted_rendering_answers_nobody_else(lm, monkeypatch):
    lm.text.encode_chat(sled.Chat("first"))

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(renderer.json, "loads", lambda line: interrupt())
        lm.text.encode_chat(sled.Chat("second"))
    assert "third" in lm.text.chats.prompt(sled.Chat("third").messages)
    renderer.render_template._process.kill()
    renderer.render_template._process.wait()
    assert "fourth" in lm.text.chats.prompt(sled.Chat("fourth").messages)


@pytest.mark.parametrize(("ending", "says"), [
    ("sys.exit(1)", "does not end within 3 seconds"), ("sys.exit(3)", "jinja2.*cannot be imported; install it"),
    ("sys.exit(4)", "ends the process that renders it"), ("os.kill(os.getpid(), 9)", "ends the process that renders"),
    (None, "jinja2.*cannot be imported; install it")])
def test_how_a_rendering_ended_is_told_by_its_process(ending, says, lm, tmp_path, monkeypatch):
    renderer.render_template.stop()
    with monkeypatch.context() as patch:
        if ending is None:
            (tmp_path / "jinja2.py").write_text("raise ImportError")
            patch.syspath_prepend(tmp_path)
        else:
            (tmp_path / "ends.py").write_text(f"import os, sys; sys.stdin.readline(); {ending}")
            patch.setattr(renderer, "SCRIPT", tmp_path / "ends.py")
        with pytest.raises(TemplateError, match=says):
            lm.text.chats.prompt(said("a"))
    assert "b" in lm.text.chats.prompt(said("b"))


def test_chat_is_generate_of_the_ids_that_the_template_writes(lm, monkeypatch):
    ids = lm.text.encode("<s>system\nbe kind</s>\n<s>user\nhi</s>\n<s>assistant\n", special=False)
    assert ids[0] == 1 and ids.count(1) == 3  # no other BOS
    settings = dict(max_new_tokens=4, exits=sled.EarlyExit((1,)), sampling=sled.Sampling(0.5), stop=["x"], seed=3,
                    batch_size=2, fusion=sled.SLED(), schedule=sled.Immediate(), progress=True)
    monkeypatch.setattr(LM, "decode", lambda self, prompts, decoding, **how: (
        [ids.tolist() for ids in prompt_ids(prompts, self.text, self.config)], decoding, how))
    one = said("hi", system="be kind")
    for messages, system in ((one, None), ("hi", "be kind"), (said("hi"), "be kind")):
        assert lm.chat(messages, system=system, **settings) == lm.generate(ids, **settings)
    assert lm.chat([one, "hi"])[0] == [ids, lm.generate(sled.Chat("hi"))[0][0]]


def test_a_chat_stands_wherever_a_prompt_does(lm):
    chat = sled.Chat("hi", "be kind")
    ids, answer = lm.text.encode_chat(chat)[0], lm.text.encode("so it is", special=False)
    for continuation in ("so it is", answer):
        assert [part.tolist() for part in pair_ids(chat, continuation, lm.text, lm.config)] == [ids, answer]
    assert [x.tolist() for x in prompt_ids([chat, "a", ids], lm.text, lm.config)] == [ids, lm.text.encode("a"), ids]
    [more] = prompt_ids(chat.answered("so it is"), lm.text, lm.config)
    assert more.tolist() == ids + answer


@pytest.mark.parametrize(("messages", "named"), [
    ([], {}), ({}, {}), (None, {}), (5, {}), ({"role": "user", "content": "a"}, {}), ([[]], {}), ([{}], {}), ([5], {}),
    ([[{"content": "a"}]], {}), ([said("a"), 7], {}), ([*said("a"), "b"], {}), ([{"role": 1, "content": "a"}], {}),
    ("a", dict(system=5)), (said("a", system="b"), dict(system="c")), ("a", dict(variables=5)),
    ("a", dict(variables={"messages": []})), ("a", dict(variables={"x": {1, 2}})),
    ("a", dict(variables={"x": np.ones(2)})),
    ([{"role": "user"}], {}), ([{"role": "user", "text": "a"}], {}), ([{"role": "user", "content": 3}], {}),
    ([[{"role": "user"}], said("a")], {}), ([{"role": "system", "content": True}, *said("a")], {}),
    ([{"role": "user", "content": object()}], {}), ([{"role": "assistant", "content": None}], {}),
    ([{"role": "assistant", "content": [{"type": "image"}]}], {}), (iter("a"), {}), (b"a", {}),
])
def test_what_is_no_conversation_is_refused(lm, messages, named):
    with pytest.raises(PromptError):
        lm.chat(messages, **named)


def test_text_that_no_tokenizer_takes_and_a_model_without_templates(lm, tmp_path):
    with pytest.raises(TokenizerError, match="surrogates"):
        lm.chat("\ud800")
    with pytest.raises(TemplateError, match="has no chat template"):
        ask(write_tokenizer(tmp_path), sled.Chat("a"))
    with pytest.raises(PromptError, match="cannot be given"):
        deep = []
        for _ in range(100_000):
            deep = [deep]
        lm.chat([{"role": "user", "content": deep}])


@pytest.fixture(scope="module")
def chatty(tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path_factory.mktemp("chatty") / "model")
    return str(write_tokenizer(folder, STYLES["chatml"]))


def test_templates_go_with_the_model(lm, chatty, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(chatty, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    found = ChatTemplates.read(source).templates
    assert set(found) == {"default", "rag"}
    for _ in range(2):  # the second time over the first
        sled.load(source).save(tmp_path / "saved")
        assert ChatTemplates.read(tmp_path / "saved").templates == found
    for _ in range(2):
        export_hf(source, tmp_path / "exported")
    assert ChatTemplates.read(tmp_path / "exported").templates == found


@pytest.mark.parametrize("line", ["generate a -n 2", "generate a --chat -n 2", "score a b --chat",
                                  "lens a --chat --answer b --system c"])
def test_the_command_hints_at_chats_and_asks_so(command, chatty, line):
    code, out, err = command(*line.split(), "-m", chatty)
    assert code == 0 and err.count("--chat asks so") == ("--chat" not in line)
    assert out


@pytest.mark.parametrize("line", ["generate a --system b", "score a b --chat-variables c=1", "lens a --answer b",
                                  "generate a --chat --chat-variables c", "generate a --chat", "lens a --chat",
                                  "calibrate --exit-layers 1 --system x", "sweep --system x",
                                  "tune --chat-variables a=1"])
def test_the_command_refuses_what_has_no_meaning(command, line):
    code, out, err = command(*line.split())
    assert (code, out) == (1, "") and "chat" in err
