"""Exits as a user meets them: the command's options, the layers of a text in colours or marks, the streamed layers."""

import json
import re
from types import SimpleNamespace

import pytest
from lens_samples import contrast

import sled
from sled.cli.exit_options import ExitOptions
from sled.cli.generate import end_line
from sled.cli.paint import SCALE, Paint, PaintedRow, has_colours
from sled.demo.problems import problems, prompt
from sled.errors import SettingError
from sled.results import Stats

ANSI = re.compile(r"\x1b\[[0-9;]*m")
MARK = re.compile(r"\[\d\]")


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
    assert end_line(plain, 8, exits=False) == "10 tokens, 5.0 tokens/s, compilation included"
    early = Stats(5, 10, 1, 1, 2.5, deferred=9, held=3)
    assert end_line(early, 8, exits=True).endswith(
        "; mean depth 2.50 of 8 layers, 9 tokens left before the last; 3 steps spent waiting for deeper layers")
    guessed = Stats(5, 10, 1, 1, 4, drafted=8, accepted=6, verifications=4, deferred=6)
    assert "included; 6 of 8 drafts accepted (75%), 1.50 per verification; 0 steps" in end_line(guessed, 8, exits=True)


@pytest.fixture(scope="module")
def questions():
    return [prompt(p.question) for p in problems("heldout", 2)]


EARLY = ("--exits", "early", "--exit-layers", "1", "--threshold", "0.7")


def test_show_exits_changes_no_text(command, monkeypatch, questions):
    """Marks for one prompt and for two, colours while it streams: the same texts, the same layers."""
    code, lines, err = command("generate", *questions, *EARLY, "--json")
    rows = [json.loads(line) for line in lines.splitlines()]
    said = [layer for row in rows for layer in row["exit_layers"]]
    assert code == 0 and set(said) == {1, 8} and "mean depth" in err.splitlines()[-1]
    assert [len(row["exit_layers"]) for row in rows] == [len(row["tokens"]) for row in rows]

    code, marked, _ = command("generate", *questions, *EARLY, "--show-exits")
    text, legend = marked.rstrip("\n").rsplit("\n", 1)
    assert code == 0 and f"[1] {said.count(1)}, [8] {said.count(8)}" in legend
    whole = "".join(f"{question}{row['text']}\n\n" for question, row in zip(questions, rows, strict=True))
    assert MARK.sub("", text) + "\n" == whole and {"[1]", "[8]"} <= set(MARK.findall(text))

    code, alone, _ = command("generate", questions[0], *EARLY, "--show-exits")
    assert code == 0 and marked.startswith(alone.rstrip("\n").rsplit("\n", 1)[0])

    monkeypatch.setattr("sled.cli.generate.has_colours", lambda out: True)
    code, coloured, _ = command("generate", questions[0], *EARLY, "--show-exits")
    text, legend = coloured.rstrip("\n").rsplit("\n", 1)
    assert ANSI.sub("", text) == questions[0] + rows[0]["text"] and ANSI.search(text)
    assert f"layer 1: {rows[0]['exit_layers'].count(1)} " in legend


@pytest.mark.parametrize("arguments", [("--show-exits",), (*EARLY, "--show-exits", "--json")])
def test_show_exits_needs_exits_and_text(command, arguments):
    code, _, err = command("generate", "x", *arguments)
    assert code == 1 and "--show-exits" in err
