"""The command line: prompts among options, help, misuse, and errors in the words of the one who typed them."""

import functools
import types
from pathlib import Path

import jax
import pytest
from tyro.conf import UseAppendAction

import sled
from sled.calibration.tune import Trial, Tuned
from sled.cli import main
from sled.cli.calibrate import Calibrate
from sled.cli.commands import SLED, Group
from sled.cli.evaluate import Eval
from sled.cli.generate import Generate
from sled.cli.lens import Lens
from sled.cli.line import in_options, options_of, parse
from sled.cli.programs import keep_programs
from sled.cli.score import Score
from sled.cli.sweep import Sweep
from sled.cli.train import Train
from sled.cli.tune import Tune, fastest
from sled.cli.values import REGISTRY, spec_of
from sled.exits import FullDepth


def commands(group=SLED, prog="sled"):
    for name in group.commands:
        if isinstance(command := group[name], Group):
            yield from commands(command, f"{prog} {name}")
        else:
            yield f"{prog} {name}", command


ALL, LENS = dict(commands()), "lens"


@pytest.mark.parametrize(("words", "prompts", "options"), [
    (["--threshold", "0.5", "Hi"], ("Hi",), dict(threshold=(0.5,))),
    (["--exit-layers", "2", "4", "Hi"], ("Hi",), dict(exit_layers=(2, 4))),
    (["--exit_layers", "2", "Hi", "you", "--json"], ("Hi", "you"), dict(exit_layers=(2,), json=True)),
    (["Hi", "--exit-layers", "2", "4"], ("Hi",), dict(exit_layers=(2, 4))),
    (["--exit-layers=2", "4", "3 apples"], ("3 apples",), dict(exit_layers=(2, 4))),
    (["--layers", "low", "high and low", "-n", "3"], ("high and low",), dict(layers="low", max_new_tokens=3)),
    (["--layers", "1", "3", "all of it"], ("all of it",), dict(layers=(1, 3))),
    (["--stop", "a", "--stop", "b", "Hi"], ("Hi",), dict(stop=("a", "b"))),
    (["--threshold", "0.5", "0.9", "--", "0.7", "-x", "--json"], ("0.7", "-x", "--json"), dict(threshold=(0.5, 0.9))),
    (["--threshold", ".5", "--", "--threshold", "1"], ("--threshold", "1"), dict(threshold=(0.5,))),
    (["--norm-early", "Hi"], ("Hi",), dict(norm_early=True)),
    (["--no-norm-early", "--lower-bound", "-inf", ""], ("",), dict(norm_early=False, lower_bound=float("-inf"))),
    (["--exits", "early", "--kv", "exact", "é 漢"], ("é 漢",), dict(exits="early", kv="exact")),
])
def test_prompts_stand_first_or_last(words, prompts, options):
    made = parse(Generate, "sled generate", words)
    groups = [made, made.exit_options, made.fusion_options]
    assert made.prompts == prompts
    for name, value in options.items():
        assert [getattr(group, name) for group in groups if hasattr(group, name)] == [value]


def test_other_texts_stand_last_too():
    assert parse(Lens, "sled lens", ["--layers", "0", "4", "The text"]).text == "The text"
    score = parse(Score, "sled score", ["--layers", "all", "The", " one", " two"])
    assert score.texts == ("The", " one", " two")


@pytest.mark.parametrize(("words", "sets"), [
    ([], None), (["--exit-layers"], ()), (["--exit-layers", "2"], ((2,),)),
    (["--exit-layers", "2", "4", "2,4"], ((2,), (4,), (2, 4))), (["--exit-layers=1,2,3", "5"], ((1, 2, 3), (5,))),
])
def test_layers_joined_by_commas_are_one_setting(words, sets):
    assert parse(Sweep, "sled sweep", words).exit_layers == parse(Tune, "sled tune", words).exit_layers == sets


@pytest.mark.parametrize("word", ["2,x", "2,", ",", "2;4", "all", "2.5"])
def test_what_is_no_set_of_layers_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        parse(Sweep, "sled sweep", ["--exit-layers", "2", word])
    assert "is no layer's number" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("prog", ALL)
def test_no_option_of_several_values_takes_a_prompt_for_one(prog):
    options = list(options_of(ALL[prog]))
    if all(option.spellings for option in options):
        return
    with REGISTRY:
        specs = [spec_of(o.kind) for o in options if o.spellings and UseAppendAction not in o.beside]
    for spec in (spec for spec in specs if spec.nargs == "*"):
        with pytest.raises(ValueError, match="The"):
            spec.instance_from_str(["The capital = Paris"])


@pytest.mark.parametrize(("words", "says"), [
    (["--threshold", "Hi"], "'Hi' is no number"), (["--exit-layers", "two", "Hi"], "'two' is no layer's number"),
    (["--layers", "some", "Hi"], "nor one of all, blocks, low, high"), (["-n", "many", "Hi"], "'many' is no whole"),
    (["Hi", "--treshold", "0.5"], "has no option --treshold; did you mean --threshold?"),
    (["Hi", "--kv", "none"], "'exact', 'propagate'"), (["Hi", "--model"], "Missing value"),
    (["Hi", "--alpha=2"], "did you mean --rate?"), (["Hi", "--max_tokens", "2"], "did you mean --max-new-tokens?"),
    (["Hi", "-z"], "has no option -z ("), (["Hi", "--xyz", "5"], "has no option --xyz ("),
    ([LENS, "Hi", "you"], "takes no further word, but 'you' was given"), ([LENS], "Missing from sled lens: TEXT ("),
    *(([*words, "no/folder/x.png"], "there is no folder 'no/folder' for x.png; make it") for words in (
        [LENS, "Hi", "--picture"], [LENS, "Hi", "--html"], ["demo", "-o"], ["sweep", "--out"],
        ["calibrate", "--exit-layers", "1", "--out"],
        ["train", "-o"], ["export", "demo", "--out"], ["eval", "--tasks", "a", "-o"],
        ["eval", "--tasks", "a", "--cache"], ["bench layers", "--picture"], ["bench fusion", "--json"])),
])
@pytest.mark.parametrize("columns", ["60", "200"])
def test_misuse_is_told_in_a_line(columns, words, says, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    command, words = (words[0], words[1:]) if f"sled {words[0]}" in ALL else ("generate", words)
    with pytest.raises(SystemExit) as end:
        main([*command.split(), *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and says in said and said.endswith(f"(sled {command} --help explains it)\n")
    assert "None" not in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["bench"], ["bench", "--help"]])
def test_groups_show_their_commands(words, capsys):
    assert main(words) == 0
    group = SLED.commands["bench"] if "bench" in words else SLED
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in group.commands)


@pytest.mark.parametrize(("words", "says"), [
    (["generat", "Hi"], "did you mean sled generate?"), (["Generate"], "did you mean sled generate?"),
    (["bench", "layer"], "did you mean sled bench layers?"), (["xyz"], "there are demo, generate"),
    (["bench", "xyz"], "there are fusion, decode"), (["--model", "demo", "generate"], "options stand behind"),
    ([""], "there are demo"), (["--versio"], "options stand behind"),
])
def test_what_is_no_command_is_named(words, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "") and says in err and err.count("\n") == 1


@pytest.mark.parametrize("columns", ["60", "100"])
@pytest.mark.parametrize("prog", ALL)
def test_help_fits_and_speaks_no_python(prog, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main([*prog.split()[1:], "--help"])
    said = capsys.readouterr().out
    too_wide = [line for line in said.splitlines() if len(line) > int(columns)]
    assert not [line for line in too_wide if '"' not in line and "usage" not in line]  # one does not cut a quoted text
    assert not [word for word in ("None|", "{None", "default: None", "options options", "STR", "[[", "True", "False")
                if word in said]
    assert not ragged(said, int(columns))


def ragged(said, columns):
    """The lines of options' help that end within a sentence though the next word would have had room."""
    lines = [line.replace("│", " ").rstrip() for line in said.splitlines()]  # it has no boxes where they have no code
    indents = [len(line) - len(line.lstrip()) for line in lines]
    return [line for line, below, left, under in zip(lines, lines[1:], indents, indents[1:], strict=False)
            if left == under > 8 and line[-1] != "." and len(line) + 1 + len(below.split()[0]) <= columns - 2]


@pytest.mark.parametrize(("command", "message", "said"), [
    (Generate, "max_new_tokens is 0, but must be", "--max-new-tokens is 0, but must be"),
    (Generate, "EarlyExit.threshold[1] is 2, but", "number 2 of --threshold is 2, but"),
    (Generate, "SelfSpeculation.layer is 9", "--exit-layers is 9"),
    (Generate, "seed is -1, but must be", "--seed is -1, but must be"),
    (Generate, "prompts[0] is wrong", "prompts[0] is wrong"),  # has no option
    (Generate, "the model's seed is in seed.txt and seed_file", "the model's seed is in seed.txt and seed_file"),
    (Generate, "SharedHead.shards is 3", "SharedHead.shards is 3"),
    (Calibrate, "grid has 0.9 after 0.8, and delta is 2", "--grid has 0.9 after 0.8, and delta is 2"),
    (Eval, "limit is 0, but must be None or a whole number", "--limit is 0, but must be a whole number"),
    (Train, "Recipe.learning_rate is 0", "--learning-rate is 0"),
    (Train, "NewModel.width is 5, which", "--width is 5, which"),
    (Train, "'max_steps' and save_every=3 are in a/save_every.json",
     "'max_steps' and save_every=3 are in a/save_every.json"),
    (Train, "recipe.steps was 5 and is 6; data.prompt_weight was 0", "--steps was 5 and is 6; --prompt-weight was 0"),
    (Train, "columns are named by Source.prompt and data.jsonl, config.json", "columns are named by --prompt and "
     "data.jsonl, config.json"),
    (Generate, "EarlyExit.layers is (2, 40), but 40 is", "--exit-layers is 2 40, but 40 is"),
    (Generate, "it is (2, 40), or EarlyExit.threshold is (0.5,) there", "it is (2, 40), or --threshold is 0.5 there"),
    (Train, "AllExits.layers is ()", "--exit-layers is ()"), (Train, "LayerDropout.rate is 1", "--layer-dropout is 1"),
    (Train, "Mesh.data and Mesh.fsdp are -1", "--data-parallel and --fsdp are -1"),
    (Sweep, "example 1, has no column 'x'; by Source.completion name one", "example 1, has no column 'x'; by --answer "
     "name one"),
    (Sweep, "EarlyExit.layers is (9,)", "--exit-layers is 9"),
    (Sweep, "SelfSpeculation.draft is 0", "--drafts is 0"),
    (Sweep, "rounds is 0; give batch_size too", "--rounds is 0; give --batch-size too"),
])
def test_errors_name_options(command, message, said):
    assert in_options(message, command, []) == said


def test_an_option_is_named_as_it_was_typed():
    assert in_options("max_new_tokens is 0", Generate, ["hi", "-n", "0"]) == "-n is 0"
    assert in_options("Recipe.batch_size is 0", Train, ["-b", "0"]) == "-b is 0"


@pytest.mark.parametrize("prog", ALL)
def test_options_of_a_command_are_told_apart(prog):
    names = [name for option in options_of(ALL[prog]) for name in option.spellings]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("exits", "schedule"), [
    (sled.EarlyExit((2, 4), 0.7, "margin", min_layer=3), sled.Gather(2)),
    (sled.EarlyExit(1, 0.5, kv="propagate", decay="calm-code"), sled.Immediate()),
    (sled.EarlyExit((1, 3), (0.5, 0.9)), sled.Gather(patience=0)),
    (sled.SelfSpeculation(2), sled.Lockstep()), (sled.SelfSpeculation((2, 4), 3, 0.25, adaptive=True), sled.Gather()),
])
def test_the_fastest_way_is_told_in_options_that_make_it(exits, schedule):
    tuned = Tuned((Trial(exits, schedule, 1.0, 1.0, 5, 2.0, 1.0),))
    made = parse(Generate, "sled generate", [*fastest(tuned).split(), "Hi"])
    assert made.prompts == ("Hi",) and made.exit_options.settings() == dict(exits=exits, schedule=schedule)


def layers_that_promise(*most: int):
    """`sled.layers`, as if these layers promised most."""
    return lambda lm, prompts, *, max_new_tokens, profile: types.SimpleNamespace(speaking_layers=lambda count: most)


@pytest.mark.parametrize(("words", "policies"), [
    ([], [sled.EarlyExit(2, 0.9), sled.EarlyExit(4, 0.9), sled.SelfSpeculation(2, 6), sled.SelfSpeculation(4, 6)]),
    (["--exit-layers", "2", "2,4", "--thresholds", "0.8", "--drafts"], [sled.EarlyExit(2, 0.8),
                                                                        sled.EarlyExit((2, 4), 0.8)]),
    (["--thresholds", "--draft-layers", "3", "--drafts", "2", "4"], [sled.SelfSpeculation(3, 2),
                                                                     sled.SelfSpeculation(3, 4)]),
    (["--thresholds", "--drafts", "2", "--draft-layers", "3", "--draft-first-ids", "64"],
     [sled.SelfSpeculation(3, 2), sled.SelfSpeculation(3, 2, first_ids=64)]),
])
def test_tune_tries_what_was_asked_for(words, policies, demo, monkeypatch, capsys):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo)
    asked = {}

    @functools.wraps(sled.tune)
    def tune(lm, prompts, **settings):
        asked.update(settings, prompts=prompts)
        return Tuned((Trial(FullDepth(), sled.Immediate(), 1.0, 1.0, 5, 8.0, 1.0),))

    monkeypatch.setattr(sled, "tune", tune)
    monkeypatch.setattr(sled, "layers", layers_that_promise(2, 4))
    assert main(["tune", "--problems", "3", "--rounds", "2", "--stop", "\\n", *words]) == 0
    assert asked["exits"] == policies and len(asked["prompts"]) == 3 and (asked["rounds"], asked["stop"]) == (2, ["\n"])
    assert "\nfastest here: no early exit\n" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "says"), [
    (["--thresholds", "--drafts"], "give --thresholds or --drafts"), (["--rounds", "0"], "--rounds is 0"),
    (["--thresholds", "2"], "--thresholds is 2"), (["--exit-layers", "16"], "--exit-layers"),
    (["--drafts", "0"], "--drafts is 0"), (["--file", "nowhere"], "nowhere"), (["-m", "./x"], "name a file"),
    (["--problems", "0"], "--problems is 0"), (["-n", "0", "--problems", "2"], "-n is 0"),
])
def test_tune_refuses_in_the_users_words(words, says, demo, monkeypatch, capsys):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo)
    monkeypatch.setattr(sled, "layers", layers_that_promise(2, 3))
    assert main(["tune", *words]) == 1
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("variables, folder", [
    ({}, "home/sled/programs"), ({"SLED_COMPILATION_CACHE": "0"}, None), ({"SLED_COMPILATION_CACHE": "own"}, "own"),
    ({"XDG_CACHE_HOME": "file"}, None), ({"JAX_COMPILATION_CACHE_DIR": "jax"}, "jax")])
def test_programs_are_kept_where_the_environment_says(variables, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    names = ["jax_compilation_cache_dir", "jax_compilation_cache_max_size",
             "jax_persistent_cache_min_compile_time_secs"]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("SLED_COMPILATION_CACHE", raising=False)
    for name, value in {"XDG_CACHE_HOME": "home", **variables}.items():
        monkeypatch.setenv(name, value)
    try:
        jax.config.update(names[0], variables.get("JAX_COMPILATION_CACHE_DIR"))  # read where jax is imported
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == folder
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
