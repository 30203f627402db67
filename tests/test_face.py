"""What a user meets: loading, generating from text, scoring, the command."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from lens_samples import contrast
from tiny_lm import CAPACITY, PROMPTS, generate, talking_lm, tiny_lm

import sled
from sled import _check_versions
from sled.cli.exit_options import ExitOptions
from sled.cli.generate import end_line
from sled.cli.paint import SCALE, Paint, PaintedRow, has_colours
from sled.demo.problems import problems, prompt
from sled.errors import SettingError, TokenizerError, VersionError
from sled.eval.numbers import final_answer
from sled.io import writable
from sled.plots import writable_picture
from sled.results import Stats
from sled.text.stop_strings import StopStrings

DEMO = Path(sled.__file__).parent / "demo" / "model"


def test_the_bundled_model_solves_held_out_problems(demo):
    asked = problems("heldout", 12)
    for fusion in (sled.FinalLayer(), sled.SLED()):
        out = demo.generate([prompt(p.question) for p in asked], max_new_tokens=96, fusion=fusion)
        right = sum(final_answer(text) == p.answer for text, p in zip(out.texts, asked, strict=True))
        assert right >= 7
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


@pytest.mark.parametrize("stop, text, tokens", [
    (["E"], "ab", "abE"), (["Ec"], "ab", "abEc"), (["bE"], "a", "abE"), (["c", "E"], "ab", "abE"),
    (["b", "E"], "a", "ab"), (["bc"], "a", "abEc"), (["dE"], "abc", "abEcdE"),
    (["cE"], "abcd", "abEcdE"), (["EE", "z"], "abcd", "abEcdE"), ([], "abcd", "abEcdE")])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_stop_string_may_name_a_special_token(stop, text, tokens, step):
    ids = [ord(letter) - 64 for letter in "abEcdE"]  # E is special, so no part of the text
    row = StopStrings(talking_lm().text, stop, ())
    for end in range(step, len(ids) + step, step):
        row.update(ids[:end])
    assert (row.text(), row.tokens) == (text, ids[:len(tokens)])
    assert row.finish_reason() == ("length" if text == "abcd" else "stop")


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


def test_scores_prefer_the_right_answer(demo):
    p = problems("heldout", 1)[0]
    wrong = p.solution.replace(f"#### {p.answer}", f"#### {p.answer + 1}")
    scores = demo.score(prompt(p.question), [" " + p.solution, " " + wrong], batch_size=1)
    assert scores.totals[0] > scores.totals[1]
    assert scores.greedy[0]
    one = demo.score(prompt(p.question), " " + p.solution)
    assert one.totals == pytest.approx(scores.totals[:1], abs=1e-3)


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


def test_commands(command, tmp_path):
    question = prompt(problems("heldout", 1)[0].question)
    code, out, _ = command("generate", question, "--fusion", "sled", "--rate", "1.5")
    assert code == 0 and "####" in out
    (tmp_path / "p.txt").write_text("Question: a\\nAnswer:\nQuestion: b\\nAnswer:\n")
    code, out, _ = command("generate", "--file", str(tmp_path / "p.txt"), "--json", "-n", "4")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 2 and rows[0]["prompt"] == "Question: a\nAnswer:"

    code, out, _ = command("score", "Question: 2*3?\\nAnswer:", " 2*3=6", " 2*3=7")
    assert code == 0 and "2*3=6" in out
    code, out, _ = command("lens", "Question: 2*3?", "--fusion", "sled", "--picture", str(tmp_path / "l.png"))
    assert code == 0 and "layer 8" in out and (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = command("--version")
    assert code == 0 and re.fullmatch(r"sled \d+\.\d+\S*\n", out)


@pytest.mark.parametrize("line", [
    "generate",
    "generate x --model ./nowhere",
    "generate x --model no-tokenizer",
    "generate x --json --model no-tokenizer",
    "generate x --fusion dola --rate 1",
    "generate x --show-exits",
    "generate x --show-exits --json --exits early --exit-layers 1",
    "score x",
    "score x y --model no-tokenizer",
    "score x y --json --model no-tokenizer",
    "demo --problems 0",
    "demo --show -1",
    "demo --out a-file",
    "lens x --last 0",
    "lens x --model no-tokenizer",
    "lens x --picture x.xyz",
    "lens x --picture no-ending",
    "lens x --picture a-folder.png",
    "bench decode --rounds 0",
    "bench decode --new-tokens 993",
    "bench fusion --json a-folder.png",
])
def test_the_command_prints_one_line_and_fails(command, tmp_path, monkeypatch, without_tokenizer, line):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("a-folder.png").mkdir()
    Path("no-tokenizer").symlink_to(without_tokenizer)
    code, out, err = command(*line.split())
    assert (code, out) == (1, "")
    assert [said for said in err.splitlines() if said.startswith("sled: ")] == err.splitlines()[-1:]
    assert ("TokenizerError" in err and "tokenizer.json" in err) == ("no-tokenizer" in line)
    assert ("--show-exits" in err) == ("--show-exits" in line)


def test_a_path_is_tried_without_a_trace(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "folder" / "new.svg"
    old.write_text("{}")
    assert (writable("old", old), writable_picture("new", new)) == (old, new)
    assert old.read_text() == "{}" and not new.parent.exists()


def command_that(does: str, words: Sequence[str] = ("generate", "hi")) -> subprocess.Popen:
    """`sled generate hi`, which does this instead."""
    code = (f"import sys, sled.cli, sled.cli.generate as c\ndef run(self): {does}\nc.Generate.run = run\n"
            "sys.exit(sled.cli.main())")
    return subprocess.Popen([sys.executable, "-c", code, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.parametrize("words", [("generate", "hi"), ("generate", "--help")])
def test_a_reader_that_has_had_enough_ends_the_command_quietly(words):
    with command_that("print('long ' * 10**6)", words) as command:
        command.stdout.close()
        assert command.wait(60) == 1 and command.stderr.read() == ""


def test_an_interrupted_command_says_so_and_ends_at_once():
    command = command_that("import atexit; atexit.register(print, 'late'); print('early'); raise KeyboardInterrupt")
    assert command.communicate(timeout=60) == ("early\n", "sled: interrupted\n") and command.returncode == 130


# Exits: the command's options, the layers of a text in colours or marks.

ANSI = re.compile(r"\x1b\[[0-9;]*m")
MARK = re.compile(r"\[\d+\]")


@pytest.mark.parametrize(("options", "exits", "schedule"), [
    (ExitOptions(exits="early", exit_layers=(2,)), sled.EarlyExit(2), None),
    (ExitOptions(exits="early", exit_layers=(4, 2), threshold=(0.5,), measure="margin", kv="propagate",
                 decay="calm-code", schedule="lockstep"),
     sled.EarlyExit((2, 4), 0.5, "margin", "calm-code", kv="propagate"), sled.Lockstep()),
    (ExitOptions(exits="early", exit_layers=(2, 4), threshold=(0.5, 0.9), schedule="gather", gather_rows=2),
     sled.EarlyExit((2, 4), (0.5, 0.9)), sled.Gather(2)),
    (ExitOptions(exits="speculate", exit_layers=(2, 3), draft=4, draft_confidence=0.5, adaptive=True,
                 schedule="gather", patience=3),
     sled.SelfSpeculation((2, 3), 4, 0.5, adaptive=True), sled.Gather(patience=3)),
])
def test_options_make_the_policy_and_keep_its_defaults(options, exits, schedule):
    assert options.settings() == {"exits": exits, "schedule": schedule}
    assert ExitOptions().settings() == {}


@pytest.mark.parametrize(("options", "says"), [
    (dict(threshold=(0.5,)), "--threshold has no meaning for --exits none"),
    (dict(schedule="lockstep"), "--schedule has no meaning for --exits none"),
    (dict(exits="early"), "--exit-layers"),
    (dict(exits="early", exit_layers=(2,), draft=3), "--draft has no meaning for --exits early"),
    (dict(exits="early", exit_layers=(2,), adaptive=True), "--adaptive"),
    (dict(exits="early", exit_layers=(2,), threshold=(0.5, 0.9)), "2 numbers for 1 exits"),
    (dict(exits="speculate", exit_layers=(2,), kv="exact"), "--kv has no meaning for --exits speculate"),
    (dict(exits="speculate", exit_layers=(2, 4)), "adaptive"),
    (dict(exits="early", exit_layers=(2,), gather_rows=2), "--gather-rows has no meaning without --schedule"),
    (dict(exits="early", exit_layers=(2,), schedule="lockstep", patience=2), "--patience"),
])
def test_a_setting_without_meaning_is_named(options, says):
    with pytest.raises(SettingError, match=says):
        ExitOptions(**options).settings()


def rgb(xterm: int) -> list[int]:
    """A colour of xterm's 6 x 6 x 6 cube."""
    return [(0, 95, 135, 175, 215, 255)[((xterm - 16) // step) % 6] for step in (36, 6, 1)]


def test_colours_are_readable_and_ordered_by_lightness():
    backs = [contrast(rgb(back), (0, 0, 0)) for back, _ in SCALE]
    assert backs == sorted(backs, reverse=True) and len(set(backs)) == len(SCALE)
    assert all(contrast(rgb(back), rgb(front)) >= 4.5 for back, front in SCALE)


@pytest.mark.parametrize("exits", [(8,), (4, 8), (1, 2, 4, 8), tuple(range(1, 33))])
def test_the_scale_spans_any_exits(exits):
    paint = Paint(exits, colours=True)
    painted = [paint.text("x", layer) for layer in exits]
    assert painted[0].startswith(f"\x1b[48;5;{SCALE[0][0]};")
    assert len(exits) == 1 or painted[-1].startswith(f"\x1b[48;5;{SCALE[-1][0]};")
    assert len(set(painted)) == min(len(exits), len(SCALE))


def test_colours_end_before_a_line_does_and_marks_stand_before_it():
    painted = Paint((2, 8), colours=True).text("a\n\nb", 2)
    assert [ANSI.sub("", line) for line in painted.split("\n")] == ["a", "", "b"]
    assert all(line.endswith("\x1b[0m") for line in painted.split("\n") if line)
    assert Paint((2, 8), colours=False).text(" a\n", 2) == " a[2]\n"


@pytest.mark.parametrize(("pieces", "marked"), [
    # A character of many tokens is said by the last of them.
    ([("a€b", [*"a€b\0".encode()], [1, 2, 2, 4, 2, 1])], ["a[1]€[4]b[2]"]),
    ([("a", [*b"a\xe2\x82"], [1, 2, 2]), ("€b", [*b"\xacb\x00"], [4, 2, 1])], ["a[1]", "€[4]b[2]"]),
    # Text that lags behind, or is cut, keeps its layers.
    ([("ab", [*b"abc"], [1, 1, 2]), ("cd", [*b"de!"], [4, 4, 4])], ["ab[1]", "c[2]d[4]"]),
    # Text that no token accounts for is the last token's.
    ([("\ufffd", [0xE2, 0x82], [1, 2])], ["\ufffd[2]"]),
])
def test_text_is_said_by_the_layers_of_its_tokens(pieces, marked):
    decode = lambda tokens: bytes(t for t in tokens if t).decode(errors="replace")  # noqa: E731  bytes, 0 without text
    row = PaintedRow(decode, Paint((1, 2, 4), colours=False))
    assert [row.more(*piece) for piece in pieces] == marked


def test_colours_need_a_terminal_and_no_refusal(monkeypatch):
    terminal, file = (SimpleNamespace(isatty=lambda tty=tty: tty) for tty in (True, False))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colours(terminal) and not has_colours(file)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(terminal)


def test_the_end_line_says_what_exits_did():
    plain = Stats(prompt_tokens=5, new_tokens=10, prefill_seconds=1, decode_seconds=1, mean_depth=8)
    assert end_line(plain, 8, exits=False) == "10 tokens, 5.0 tokens/s"
    compiled = dataclasses.replace(plain, compile_seconds=1)
    assert end_line(compiled, 8, exits=False) == "10 tokens, 5.0 tokens/s, besides 1.0 s of compilation"
    early = Stats(5, 10, 1, 1, 2.5, deferred=9, held=3)
    assert end_line(early, 8, exits=True).endswith(
        "; mean depth 2.50 of 8 layers, 9 tokens left before the last; 3 steps spent waiting for deeper layers")
    guessed = Stats(5, 10, 1, 1, 4, drafted=8, accepted=6, verifications=4, deferred=6)
    assert end_line(guessed, 8, exits=True).endswith("tokens/s; 6 of 8 drafts accepted (75%), 1.50 per verification")


EARLY = ("--exits", "early", "--exit-layers", "1", "--threshold", "0.7", "-n", "32")


def test_show_exits_changes_no_text(command, monkeypatch):
    """Marks for one prompt and for two, colours while it streams: the same texts, the same layers."""
    questions = [prompt(p.question) for p in problems("heldout", 2)]
    code, lines, err = command("generate", *questions, *EARLY, "--json")
    rows = [json.loads(line) for line in lines.splitlines()]
    said = [layer for row in rows for layer in row["exit_layers"]]
    assert code == 0 and set(said) == {1, 16} and "mean depth" in err.splitlines()[-1]
    assert [len(row["exit_layers"]) for row in rows] == [len(row["tokens"]) for row in rows]

    code, marked, _ = command("generate", *questions, *EARLY, "--show-exits")
    text, legend = marked.rstrip("\n").rsplit("\n", 1)
    assert code == 0 and f"[1] {said.count(1)}, [16] {said.count(16)}" in legend
    whole = "".join(f"{question}{row['text']}\n\n" for question, row in zip(questions, rows, strict=True))
    assert MARK.sub("", text) + "\n" == whole and {"[1]", "[16]"} <= set(MARK.findall(text))

    code, alone, _ = command("generate", questions[0], *EARLY, "--show-exits")
    assert code == 0 and marked.startswith(alone.rstrip("\n").rsplit("\n", 1)[0])

    monkeypatch.setattr("sled.cli.generate.has_colours", lambda out: True)
    code, coloured, _ = command("generate", questions[0], *EARLY, "--show-exits")
    text, legend = coloured.rstrip("\n").rsplit("\n", 1)
    assert ANSI.sub("", text) == questions[0] + rows[0]["text"] and ANSI.search(text)
    assert f"layer 1: {rows[0]['exit_layers'].count(1)} " in legend
