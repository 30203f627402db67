"""What a user meets: loading, generating from text, scoring, the command."""

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
from sled import _check_versions
from sled.demo.problems import problems, prompt
from sled.errors import TokenizerError, VersionError
from sled.eval.numbers import final_answer
from sled.io import writable
from sled.plots import writable_picture

DEMO = Path(sled.__file__).parent / "demo" / "model"


def test_the_bundled_model_solves_held_out_problems(demo):
    asked = problems("heldout", 20)
    for fusion in (sled.FinalLayer(), sled.SLED()):
        out = demo.generate([prompt(p.question) for p in asked], max_new_tokens=96, fusion=fusion)
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


def test_generate_command(command, tmp_path):
    question = prompt(problems("heldout", 1)[0].question)
    code, out, _ = command("generate", question, "--fusion", "sled", "--rate", "1.5")
    assert code == 0 and "####" in out
    (tmp_path / "p.txt").write_text("Question: a\\nAnswer:\nQuestion: b\\nAnswer:\n")
    code, out, _ = command("generate", "--file", str(tmp_path / "p.txt"), "--json", "-n", "4")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 2 and rows[0]["prompt"] == "Question: a\nAnswer:"


def test_score_and_lens_commands(command, tmp_path):
    code, out, _ = command("score", "Question: 2*3?\\nAnswer:", " 2*3=6", " 2*3=7")
    assert code == 0 and "2*3=6" in out
    code, out, _ = command("lens", "Question: 2*3?", "--fusion", "sled", "-o", str(tmp_path / "new" / "l.png"))
    assert code == 0 and "layer 8" in out and (tmp_path / "new" / "l.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("line", [
    "generate",
    "generate x --model ./nowhere",
    "generate x --model no-tokenizer",
    "generate x --json --model no-tokenizer",
    "generate x y --model no-tokenizer",
    "generate x --fusion dola --rate 1",
    "generate x --fusion sled --rate -1",
    "generate x -n 0",
    "generate x --fusion sled --layers 99",
    "score x",
    "score x y --model no-tokenizer",
    "score x y --json --model no-tokenizer",
    "demo --problems 0",
    "demo --show -1",
    "demo --output a-file",
    "lens x --last 0",
    "lens x --model no-tokenizer",
    "lens x --picture x.xyz",
    "lens x --picture no-ending",
    "lens x --picture a-file/x.png",
    "lens x --picture a-folder.png",
    "bench decode --rounds 0",
    "bench decode --new-tokens 993",
    "bench decode --json a-file/x.json",
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


def test_a_path_is_tried_without_a_trace(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "folder" / "new.svg"
    old.write_text("{}")
    assert (writable("old", old), writable_picture("new", new)) == (old, new)
    assert old.read_text() == "{}" and not new.exists()


def test_the_version_is_told(command):
    code, out, _ = command("--version")
    assert code == 0 and re.fullmatch(r"sled \d+\.\d+\S*\n", out)


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
