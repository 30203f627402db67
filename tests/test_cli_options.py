"""Options of the command that derive from declared settings: their types, defaults, help, and what they build."""

import copy
import dataclasses
import functools
import re

import pytest

import sled
from sled.cli.derived import offers
from sled.cli.exit_options import ExitOptions
from sled.cli.generate import Generate
from sled.cli.line import parse
from sled.cli.options import SAMPLING, FusionOptions, PromptOptions, SamplingOptions
from sled.cli.score import Score
from sled.cli.train import DataOptions, NewModelOptions, RecipeOptions
from sled.errors import SettingError, SledError
from sled.exits import POLICIES, SCHEDULES
from sled.fusion import FUSIONS
from sled.settings.decorator import declared


@pytest.mark.parametrize(("options", "texts"), [
    (FusionOptions, ["take part, k; 5, 10 or 20 is usual. (default: 10)", "(default: -1000 for sled and clamp, -inf",
                     "which are all but the embeddings; 0 is the embeddings. dola: early layers to use"]),
    (ExitOptions, ["gather: how many steps a row waits at most; 0 never waits. (default: 16)",
                   "--adaptive, --no-adaptive speculate: whether each row", "early: layers after which a token may"]),
    (SamplingOptions, ["--top-k N Keep the k most likely tokens; 0 keeps all tokens. (default: 0)"]),
    (NewModelOptions, ["--kv-heads N Key/value heads; they divide the query heads. (default: as many as heads)"]),
    (RecipeOptions, ["--context N Tokens of a row; a row holds a token and its target at least. (default: the "
                     "recipe's, or as many as the model holds, at most 512)",
                     "50,000 is usual. (default: the recipe's) "]),
], ids=lambda of: getattr(of, "__name__", None))
def test_help_tells_whose_setting_it_is_and_its_default(options, texts, capsys):
    with pytest.raises(SystemExit):
        parse(options, "sled", ["--help"])
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert all(text in said for text in texts)


@pytest.mark.parametrize("of", [*offers(FUSIONS | POLICIES | SCHEDULES).values(), SAMPLING],
                         ids=lambda of: of.kind.__name__)
def test_every_option_of_the_command_is_a_setting_with_a_help(of):
    for field in of.options.values():
        assert declared(of.kind)[field].help, field


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--fusion", "dola", "--layers", "high", "--lower-bound", "-2500"], sled.DoLa(layers="high", lower_bound=-2500)),
    (["--fusion", "sled", "--layers", "1", "3", "--norm-early"], sled.SLED(layers=(1, 3), norm_early=True)),
    (["--fusion", "sled", "--layers", "blocks"], sled.SLED.preset("paper")),
    (["--fusion", "sled", "--lower-bound", "-2500"], sled.SLED(lower_bound=-2500)),
    (["--fusion", "clamp", "--lower-bound", "-5"], sled.ClampOnly(lower_bound=-5)),
])
def test_fusions(arguments, expected):
    assert parse(FusionOptions, "sled", arguments).strategy() == expected


def test_exits_and_draws(demo):
    early = parse(ExitOptions, "sled", ["--exits", "early", "--exit-layers", "2", "4", "--threshold", "0.7"])
    assert early.settings() == dict(exits=sled.EarlyExit((2, 4), threshold=0.7), schedule=None)
    drafts = parse(ExitOptions, "sled", ["--exits", "speculate", "--exit-layers", "2", "--draft", "3", "--adaptive",
                                         "--schedule", "gather", "--gather-rows", "2"])
    assert drafts.settings() == dict(exits=sled.SelfSpeculation(2, draft=3, adaptive=True), schedule=sled.Gather(2))
    draws = parse(SamplingOptions, "sled", ["--top-k", "5", "--seed", "3"])
    assert draws.chosen(demo) == sled.Sampling(top_k=5) and draws.seed == 3
    assert dataclasses.replace(draws, top_k=0).chosen(demo) == sled.Sampling()
    lm = copy.copy(demo)
    lm.generation = dict(do_sample=True, temperature=0.7)
    words = ["--sampling", "checkpoint", "--top-k", "0", "--temperature", "0"]  # numbers that are the usual defaults
    assert parse(SamplingOptions, "sled", words).chosen(lm) == sled.Sampling()
    with pytest.raises(SystemExit):  # its weights are in no option
        parse(ExitOptions, "sled", ["--exits", "early", "--exit-layers", "2", "--measure", "classifier"])
    with pytest.raises(SettingError, match="--lower-bound has no meaning"):
        FusionOptions(lower_bound=-2500.0).strategy()


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\\n"])
def test_only_a_line_break_ends_a_prompt_of_a_file(inside, tmp_path):
    (tmp_path / "p.txt").write_bytes(f"a{inside}b\r\n\nc\n".encode())
    assert PromptOptions(tmp_path / "p.txt").read() == [f"a{inside}b".replace("\\n", "\n"), "c"]


@pytest.mark.parametrize(("words", "found"), [
    ("a --data rows.jsonl", "given as arguments and by --data"), ("--file p.txt --data rows.jsonl", "by --file and by"),
    ("--prompt q", "--prompt is for --data"), ("a --limit 2", "--limit is for --data"),
    ("--file rows.jsonl", "holds rows, not a prompt per line; give it by --data"), ("a b\\nc", ["a", "b\nc"]),
    ("--data rows.jsonl", "has no column 'prompt'; by Source.text name one that it has: 'q', 'a'"),
    ("--data rows.jsonl --prompt q", "example 2, has no value in its column 'q'"),
    ("--data rows.jsonl --prompt {q}:\\n{a}", "example 2, has no value in its column 'q'"),
    ("--data rows.jsonl --prompt a", "example 3, has an empty prompt"),
    ("--data no.csv --prompt q", "no.csv holds no rows; give one per prompt"),
    ("--data rows.jsonl --prompt {q}:\\n{a} --limit 1", ["one:\n1"]), ("--file p.txt", ["one", "two"]), ("", []),
])
def test_prompts_come_from_one_place_and_whole_rows(words, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": 1}\n{"q": null, "a": "2"}\n{"q": "three", "a": ""}\n')
    (tmp_path / "no.csv").write_text("q,a\n")
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    made = parse(Generate, "sled generate", words.split())
    read = functools.partial(made.prompt_options.read, made.prompts)
    if isinstance(found, list):
        assert read() == found
    else:
        with pytest.raises(SledError, match=re.escape(found)):
            read()


def test_scores_need_whole_rows(tmp_path):
    for row, says in (('{"prompt": "a", "continuation": null}', "example 2, has no value in its column 'continuation'"),
                      ('{"prompt": "a", "continuation": ""}', "example 2, has an empty continuation")):
        (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a", "continuation": "b"}}\n{row}\n')
        with pytest.raises(SledError, match=says):
            Score(data=str(tmp_path / "rows.jsonl")).run()


def test_templates_of_training_data_may_hold_line_breaks_as_a_prompt_may():
    options = parse(DataOptions, "sled", ["--data", "a.jsonl", "--held-out", "b.jsonl", "--prompt", r"Q: {q}\nA:",
                                          "--completion", r" {a}\n"])
    assert [(data.prompt, data.completion) for data in options.sources()] == [("Q: {q}\nA:", " {a}\n")] * 2
