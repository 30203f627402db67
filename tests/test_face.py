"""What a user meets: loading, generating from text, errors that say what to do, the command."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lm import CAPACITY, PROMPTS, generate, talking_lm, tiny_lm

import sled
from sled import _check_versions, cli
from sled.demo.problems import problems, prompt
from sled.errors import CheckpointError, DownloadError, PromptError, SettingError, TokenizerError, VersionError
from sled.eval.numbers import final_answer
from sled.io import writable
from sled.plots import writable_picture

DEMO = Path(__file__).parent.parent / "sled" / "demo" / "model"


@pytest.fixture(scope="module")
def lm(demo):
    return demo


def test_the_bundled_model_solves_held_out_problems(lm):
    asked = problems("heldout", 20)
    for fusion in (sled.FinalLayer(), sled.SLED()):
        out = lm.generate([prompt(p.question) for p in asked], max_new_tokens=96, fusion=fusion)
        right = sum(final_answer(text) == p.answer for text, p in zip(out.texts, asked, strict=True))
        assert right >= 12
        assert out.stats.new_tokens == sum(map(len, out.tokens)) and out.stats.tokens_per_second > 0


def test_stop_strings_cut_text_and_tokens():
    lm, settings = talking_lm(), dict(max_new_tokens=CAPACITY)
    prompts = [lm.text.decode(prompt) for prompt in PROMPTS]
    whole = lm.generate(prompts, **settings).texts
    stop = whole[2][9:11]
    out = lm.generate(prompts, stop=[stop, "never"], **settings)
    assert out.texts == [text.split(stop)[0] for text in whole] != whole
    assert out.finish_reasons[2] == "stop"
    assert out.texts == [lm.text.decode(tokens).split(stop)[0] for tokens in out.tokens]
    streamed = list(lm.stream(prompts, stop=stop, chunk=2, **settings))
    assert ["".join(texts) for texts in zip(*(chunk.texts for chunk in streamed), strict=True)] == out.texts


def test_token_ids_may_be_in_arrays():
    ids = [[20 + i, 21, 22] for i in range(4)]
    lists = generate(ids).tokens
    for array in (np.array(ids), jnp.array(ids)):
        assert generate(array).tokens == lists
        assert generate(array[0]).tokens == lists[:1]


def test_the_largest_seed_and_chunk_are_taken():
    settings = dict(max_new_tokens=CAPACITY, seed=2**32 - 1, sampling=sled.Sampling(temperature=1.0))
    [chunk] = tiny_lm().stream(PROMPTS[0], chunk=2**40, **settings)
    assert chunk.tokens == generate(PROMPTS[0], **settings).tokens


def test_scores_prefer_the_right_answer(lm):
    p = problems("heldout", 1)[0]
    wrong = p.solution.replace(f"#### {p.answer}", f"#### {p.answer + 1}")
    scores = lm.score(prompt(p.question), [" " + p.solution, " " + wrong], batch_size=1)
    assert scores.totals[0] > scores.totals[1]
    assert scores.greedy[0]
    one = lm.score(prompt(p.question), " " + p.solution)
    assert one.totals == pytest.approx(scores.totals[:1], abs=1e-3)


@pytest.fixture(scope="module")
def lens(lm):
    return lm.lens(prompt("Ash buys 6 toys at 10 tokens each. How much?"), fusion=sled.SLED())


def test_lens_picture_is_written(lens, tmp_path):
    path = sled.lens.picture(lens, tmp_path / "deep" / "lens.png", count=8)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_picture_too_wide_is_named(lens, tmp_path, monkeypatch):
    monkeypatch.setattr("sled.lens.plot.CELL_WIDTH", 100)
    with pytest.raises(SettingError, match=f"{len(lens.tokens)} positions"):
        sled.lens.picture(lens, tmp_path / "x.png")


def test_a_lens_shows_positions_of_the_text(lens):
    count = len(lens.tokens)
    assert lens.columns(count - 1, 99) == range(count - 1, count)
    for first, shown in ((count, 1), (-1, 1), (0, 0)):
        with pytest.raises(SettingError, match=r"first is|count is"):
            lens.table(first=first, count=shown)


class Unregistered(sled.FinalLayer):
    """A strategy that was not made a pytree."""


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda lm: lm.generate(""), PromptError, "empty"),
    (lambda lm: lm.generate([]), PromptError, "no prompt"),
    (lambda lm: lm.generate(None), PromptError, "a prompt must be .* but None was given; of a generator"),
    (lambda lm: lm.stream(text for text in "ab"), PromptError, r"give list\(\.\.\.\)"),
    (lambda lm: lm.generate({"input_ids": [1]}), PromptError, "a tokenizer returned its input_ids"),
    (lambda lm: lm.generate({"a", "b"}), PromptError, "must be a string"),
    (lambda lm: lm.generate([1.5]), PromptError, "whole numbers"),
    (lambda lm: lm.score("a", None), PromptError, "a continuation must be"),
    (lambda lm: lm.score(["a"], [3]), PromptError, "a continuation must be .* but 3 was"),
    (lambda lm: lm.lens(["a", "b"]), PromptError, "one text, but 2"),
    (lambda lm: lm.generate("a", stop=5), SettingError, "stop is 5"),
    (lambda lm: lm.generate("a", stop=None), SettingError, "leave it out"),
    (lambda lm: lm.generate("a", exits=(2, 4)), SettingError, r"exits is \(2, 4\), which is no Policy; give sled"),
    (lambda lm: sled.load(""), SettingError, "source is ''"),
    (lambda lm: sled.load(None), SettingError, "source is None"),
    (lambda lm: sled.Limits(show_exits="no"), SettingError, "show_exits is 'no', but must be True or False"),
    (lambda lm: lm.generate([[1, 2], [3, 10**6]]), PromptError, "1000000"),
    (lambda lm: lm.generate([[1, -1]]), PromptError, "-1"),
    (lambda lm: lm.generate([1] * 256), PromptError, "256"),
    (lambda lm: lm.generate("a", max_new_tokens=0), SettingError, "max_new_tokens"),
    (lambda lm: lm.generate("a", batch_size=0), SettingError, "batch_size"),
    (lambda lm: lm.generate("a", stop=""), SettingError, "stop"),
    (lambda lm: lm.generate("a", fusion=sled.DoLa(layers=(99,))), SettingError, "99"),
    (lambda lm: lm.score("a", []), PromptError, "no"),
    (lambda lm: lm.score(["a", "b"], ["c"]), PromptError, "2 prompts"),
    (lambda lm: lm.score("a", [[1]]), PromptError, "both"),
    (lambda lm: lm.score([1] * 200, [[1] * 100]), PromptError, "300"),
    (lambda lm: lm.generate("a", fusion=sled.SLED), SettingError, r"class 'sled.*SLED'>.* give a strategy"),
    (lambda lm: lm.generate("a", fusion="sled"), SettingError, r"'sled', but must be an instance.* sled\.SLED\(\)"),
    (lambda lm: lm.generate("a", fusion=sled.EarlyExit(2)), SettingError, "fusion is EarlyExit"),
    (lambda lm: lm.generate("a", fusion=Unregistered()), SettingError, "that jax can trace"),
    (lambda lm: lm.generate("a", exits="early"), SettingError, r"exits is 'early'.* sled\.EarlyExit"),
    (lambda lm: lm.generate("a", exits=sled.EarlyExit), SettingError, r"sled\.EarlyExit\(\.\.\.\)"),
    (lambda lm: lm.stream("a", schedule=3), SettingError, r"schedule is 3.* sled\.Gather"),
    (lambda lm: lm.generate("a", schedule=sled.Lockstep), SettingError, r"sled\.Lockstep\(\)"),
    (lambda lm: lm.generate("a", sampling=0.7), SettingError, r"sampling is 0\.7.* sled\.Sampling"),
    (lambda lm: lm.score("a", " b", fusion=sled.DoLa), SettingError, "DoLa"),
    (lambda lm: lm.lens("a", fusion=sled.DoLa), SettingError, "DoLa"),
    (lambda lm: sled.Sampling(temperature=-1), SettingError, "temperature"),
    (lambda lm: sled.Sampling(top_p=0), SettingError, "top_p"),
    (lambda lm: sled.Sampling(top_k=1.5), SettingError, "top_k"),
    (lambda lm: sled.Sampling(top_k=2**40), SettingError, "top_k"),
    (lambda lm: lm.generate("a", seed=-1), SettingError, "seed is -1"),
    (lambda lm: lm.generate(["a", "b"], seed=2**32 - 1), SettingError, "from 0 to 4294967294"),
    (lambda lm: lm.stream("a", seed=2**32), SettingError, "seed is 4294967296"),
    (lambda lm: lm.generate("a", seed=0.5), SettingError, "seed is 0.5"),
    (lambda lm: sled.Sampling(min_p=2), SettingError, "min_p"),
    (lambda lm: sled.Sampling(repetition_penalty=0), SettingError, "repetition_penalty"),
    (lambda lm: sled.load("./nowhere"), CheckpointError, "nowhere"),
    (lambda lm: sled.load("demo", dtype="int8"), SettingError, "int8"),
])
def test_bad_input_is_named(lm, call, error, says):
    with pytest.raises(error, match=says):
        call(lm)


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, folder)
    return folder


def test_a_folder_without_tokenizer_takes_ids_only(without_tokenizer):
    lm = sled.load(without_tokenizer)
    assert lm.generate([5, 6, 7], max_new_tokens=2).texts is None
    for call in (lm.generate, lm.stream, lm.lens, lambda text: lm.score(text, "more")):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            call("text")


@pytest.mark.parametrize("arguments", [("generate", "x"), ("generate", "x", "--json"), ("generate", "x", "y"),
                                       ("score", "x", "y"), ("score", "x", "y", "--json"), ("lens", "x")], ids=" ".join)
def test_the_command_needs_a_tokenizer(capsys, without_tokenizer, arguments):
    code, out, err = run(capsys, *arguments, "--model", str(without_tokenizer))
    assert (code, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("sled: ")] == err.splitlines()[-1:]
    assert "sled: TokenizerError: " in err and "tokenizer.json" in err


def test_a_damaged_tokenizer_is_named(tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        sled.load(tmp_path / "m")


def test_versions_that_do_not_fit_are_refused():
    _check_versions("0.10.2", "0.12.8")
    _check_versions("0.11.2", "0.12.9")
    with pytest.raises(VersionError, match="move in pairs"):
        _check_versions("0.11.1", "0.12.8")
    with pytest.raises(VersionError, match="too old"):
        _check_versions("0.4.30", "0.12.8")


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_command(capsys, tmp_path):
    question = prompt(problems("heldout", 1)[0].question)
    code, out, _ = run(capsys, "generate", question, "--fusion", "sled", "--rate", "1.5")
    assert code == 0 and "####" in out
    (tmp_path / "p.txt").write_text("Question: a\\nAnswer:\nQuestion: b\\nAnswer:\n")
    code, out, _ = run(capsys, "generate", "--file", str(tmp_path / "p.txt"), "--json", "-n", "4")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 2 and rows[0]["prompt"] == "Question: a\nAnswer:"


def test_score_and_lens_commands(capsys, tmp_path):
    code, out, _ = run(capsys, "score", "Question: 2*3?\\nAnswer:", " 2*3=6", " 2*3=7")
    assert code == 0 and "2*3=6" in out
    code, out, _ = run(capsys, "lens", "Question: 2*3?", "--fusion", "sled", "-o", str(tmp_path / "l.png"))
    assert code == 0 and "layer 8" in out and (tmp_path / "l.png").is_file()


@pytest.mark.parametrize("arguments", [
    ("generate",),
    ("generate", "x", "--model", "./nowhere"),
    ("generate", "x", "--fusion", "dola", "--rate", "1"),
    ("generate", "x", "--fusion", "sled", "--rate", "-1"),
    ("generate", "x", "-n", "0"),
    ("generate", "x", "--fusion", "sled", "--layers", "99"),
    ("score", "x"),
    ("demo", "--problems", "0"),
    ("demo", "--show", "-1"),
    ("demo", "--output", "a-file"),
    ("lens", "x", "--last", "0"),
    ("lens", "x", "--picture", "x.xyz"),
    ("lens", "x", "--picture", "no-ending"),
    ("lens", "x", "--picture", "a-file/x.png"),
    ("lens", "x", "--picture", "a-folder.png"),
    ("bench", "decode", "--rounds", "0"),
    ("bench", "decode", "--new-tokens", "993"),
    ("bench", "decode", "--json", "a-file/x.json"),
    ("bench", "fusion", "--json", "a-folder.png"),
])
def test_the_command_prints_one_line_and_fails(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("a-folder.png").mkdir()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("sled: ")
    assert sum(line.startswith("sled: ") for line in err.splitlines()) == 1


def test_a_path_is_tried_without_a_trace(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "folder" / "new.svg"
    old.write_text("{}")
    assert (writable("old", old), writable_picture("new", new)) == (old, new)
    assert old.read_text() == "{}" and not new.exists()


def test_a_hub_id_without_network_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError):
        sled.load("owner/no-such-model")


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"sled \d+\.\d+\S*\n", capsys.readouterr().out)


def command_that(does: str) -> subprocess.Popen:
    """`sled generate hi`, which does this instead."""
    code = f"import sys, sled.cli as c\ndef run(self): {does}\nc.Generate.run = run\nsys.exit(c.main())"
    return subprocess.Popen([sys.executable, "-c", code, "generate", "hi"], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_a_reader_that_has_had_enough_ends_the_command_quietly():
    with command_that("print('long ' * 10**6)") as command:
        command.stdout.read(1)
        command.stdout.close()
        assert command.wait(60) == 1 and command.stderr.read() == ""


def test_an_interrupted_command_says_so_and_ends_at_once():
    command = command_that("import atexit; atexit.register(print, 'late'); print('early'); raise KeyboardInterrupt")
    assert command.communicate(timeout=60) == ("early\n", "sled: interrupted\n") and command.returncode == 130


@pytest.mark.parametrize("command", ["demo", "generate", "score", "lens", "bench"])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert len(capsys.readouterr().out) > 100
