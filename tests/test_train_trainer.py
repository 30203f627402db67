"""Whole runs: killed, resumed, extended, on meshes, over processes, exported; and what they refuse."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from programs import Forks, free_address, on_devices, run_together, until
from safetensors.numpy import load_file

import sled
from sled.cli import main
from sled.cli.train import RecipeOptions
from sled.demo.problems import problems
from sled.errors import CheckpointError, ConfigError, DataError, SettingError, TrainingError
from sled.models import ExitHeads, save_folder
from sled.train.data.sources import Source
from sled.train.initial_model import NewModel
from sled.train.objective.exit_weights import (
    AllExits,
    FixedExits,
    LayerSkipWeights,
    Rotational,
    UniformWeights,
    WeightedExits,
)
from sled.train.objective.layer_dropout import FixedRows, layerskip
from sled.train.recipes import named
from sled.train.rehearsal import rehearse
from sled.train.run.checkpoint import complete_steps
from sled.train.run.folder import read_checkpoint
from sled.train.run.metrics import read_metrics
from sled.train.run.preemption import EXIT_CODE, preemption
from sled.train.trainer import TrainingRun, train

PROGRAM = Path(__file__).parent / "training_runs.py"
STEPS = 30


def latest(checkpoints: Path) -> int:
    return max(complete_steps(checkpoints), default=0)


def half_written(checkpoints: Path) -> set[Path]:
    return {path for path in checkpoints.glob("*") if not path.name.isdecimal()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, split, count in (("train", "train", 200), ("held_out", "heldout", 20)):
        lines = (json.dumps({"text": p.question}) for p in problems(split, count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def runs(data):
    runs = Forks(data / "errors.txt", [PROGRAM, "serve", data], on_devices(1, XDG_CACHE_HOME=str(data / "cache")))
    yield runs
    runs.stop()


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs.whole("train", folder=folder)
    return folder


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's steps; step 0, before them, is only measured."""
    begin, *lines = read_metrics(folder / "metrics.jsonl")
    assert begin["step"] == 0 and begin.keys() == {"step", "held_out", "held_out_accuracy"}
    for line in lines:
        assert line.pop("tokens_per_second") > 0
    return lines


def check_same_end(one: Path, other: Path):
    name = Path("model") / "model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    assert metrics_of(one) == metrics_of(other)


def exported(run: Path, to: Path, step: int | None = None) -> Path:
    trained = read_checkpoint(run, step)
    return save_folder(trained.decoder, to, tokenizer_from=trained.model_config)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(kills, runs, uninterrupted, tmp_path):
    """By SIGKILL: by turns while a checkpoint is being written, and at random moments, the first before any."""
    dice, torn = random.Random(kills), 0
    for kill in range(kills):
        left, reached = half_written(tmp_path / "checkpoints"), latest(tmp_path / "checkpoints")
        pid = runs.start("train", folder=tmp_path)
        if kill % 2:
            until(lambda: latest(tmp_path / "checkpoints") > reached)  # noqa: B023
            until(lambda: half_written(tmp_path / "checkpoints") - left)  # noqa: B023
            time.sleep(dice.uniform(0, 0.01))
        else:
            time.sleep(dice.uniform(0, 1.5))
        os.kill(pid, signal.SIGKILL)
        assert runs.ended() == -signal.SIGKILL, runs.errors.read_text()
        assert reached <= latest(tmp_path / "checkpoints") < STEPS
        torn += bool(half_written(tmp_path / "checkpoints") - left)
    assert torn >= kills // 3
    runs.whole("train", folder=tmp_path)
    check_same_end(tmp_path, uninterrupted)
    assert not half_written(tmp_path / "checkpoints")


def lines_in(file):
    """Whole lines of a file that a run may be about to make: to see whether it can, it makes and removes one first."""
    with contextlib.suppress(FileNotFoundError):
        return file.read_bytes().count(b"\n")
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_a_signal_saves_and_the_same_command_goes_on(number, runs, uninterrupted, tmp_path):
    pid = runs.start("train", folder=tmp_path, save_every=1000)
    until(lambda: lines_in(tmp_path / "metrics.jsonl") > 1)
    os.kill(pid, number)
    assert runs.ended() == EXIT_CODE
    stopped = latest(tmp_path / "checkpoints")
    assert 0 < stopped < STEPS and not (tmp_path / "model").exists()
    assert f"stopped after step {stopped}" in runs.errors.read_text()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == stopped
    exported(tmp_path, tmp_path / "early")
    expected = exported(uninterrupted, tmp_path / "expected", stopped)
    assert (tmp_path / "early" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    runs.whole("train", folder=tmp_path, save_every=1000)
    ours, others = metrics_of(tmp_path), metrics_of(uninterrupted)
    assert [line["loss"] for line in ours] == [line["loss"] for line in others]


def test_ctrl_c_is_answered_and_once_more_stops(capfd):
    with pytest.raises(KeyboardInterrupt), preemption() as reached:
        os.kill(os.getpid(), signal.SIGINT)
        assert reached(1)
        os.kill(os.getpid(), signal.SIGINT)
    assert "stopping after this step and what is being measured" in capfd.readouterr().err


def test_a_run_tells_each_step_and_the_held_out_loss_of_every_layer(uninterrupted):
    lines = metrics_of(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(len(line["held_out"]) == len(line["held_out_accuracy"]) == 3 for line in lines)
    assert lines[-1]["held_out"][-1] < lines[0]["held_out"][-1] - 0.3 and lines[-1]["loss"] < lines[0]["loss"]
    assert [line["exits"] for line in lines[:2]] == [[1, 3], [2, 3]]
    assert (uninterrupted / "layers.png").stat().st_size > 1000


def test_what_a_run_ends_with_is_a_model_with_its_tokenizer(uninterrupted, tmp_path, capsys):
    lm = sled.load(uninterrupted / "model")
    assert lm.config.num_layers == 3 and lm.text.decode(lm.text.encode("Ash has 7 toys.")) == "Ash has 7 toys."
    assert main(["export", str(uninterrupted), "--out", str(tmp_path / "model")]) == 0
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (uninterrupted, tmp_path))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert sled.load(tmp_path / "model").text.digest == lm.text.digest


@pytest.mark.exhaustive
def test_more_steps_within_the_constant_part_end_as_if_asked_for_at_once(runs, uninterrupted, tmp_path):
    runs.whole("train", folder=tmp_path, steps=12)
    first = (tmp_path / "model" / "model.safetensors").read_bytes()
    runs.whole("train", folder=tmp_path)
    check_same_end(tmp_path, uninterrupted)
    folder = exported(tmp_path, tmp_path / "exported", 12)
    assert (folder / "model.safetensors").read_bytes() == first


def test_a_folder_of_another_run_is_refused_by_name_and_left_as_it_is(runs, uninterrupted):
    form = {path: path.read_bytes() for path in (uninterrupted / "model_config").iterdir()}
    for changes, words in (({"seed": 1}, "recipe.seed was 0 and is 1"), ({"steps": 20}, "step 30 is behind it"),
                           ({"width": 16}, "settings: model.width was 32 and is 16. Give"),
                           ({"context": 60}, "settings: recipe.context was 64 and is 60. Give"),
                           ({"accumulate": 2}, "recipe.accumulate was 1 and is 2")):
        said = runs.refused("train", folder=uninterrupted, **changes)
        assert "CheckpointError" in said and words in said, said
    assert {path: path.read_bytes() for path in (uninterrupted / "model_config").iterdir()} == form


def test_two_processes_train_save_and_resume_and_one_process_goes_on(runs, uninterrupted, data, tiny_folder, tmp_path):
    address = free_address()
    run_together([(on_devices(1, XDG_CACHE_HOME=str(data / "cache")),
                   [PROGRAM, "two", data, address, str(index), tiny_folder("llama"), tmp_path]) for index in range(2)])
    runs.whole("train", folder=tmp_path / "two", save_every=2, steps=6)
    ours, others = (metrics_of(folder) for folder in (tmp_path / "two", uninterrupted))
    assert [line["step"] for line in ours] == list(range(1, 7))
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in others[:6]], atol=1e-4)
    assert complete_steps(tmp_path / "two" / "checkpoints") == [2, 4, 6]


def by_command(runs, out, data, held_out, options):
    """`sled train` with these options."""
    runs.whole("command", arguments=["train", "--out", out, "--data", data, "--held-out", held_out, *options.split()])


def test_the_demo_model_is_finetuned_by_one_command(runs, tmp_path):
    lines = [{"question": f"Say {word} backwards.", "answer": f" {word[::-1]}."}
             for word in ("level", "reward", "lemon")]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines * 8)))
    by_command(runs, tmp_path / "run", file, file, "--prompt question --completion answer --steps 12 --warmup 2 "
               "--learning-rate 1e-3 --batch-size 4 --context 32 --save-every 4")
    held_out = [line["held_out"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out" in line]
    assert len(held_out) == 4 and held_out[-1][-1] < held_out[0][-1] / 1.5
    assert sled.load(tmp_path / "run" / "model").config.num_layers == 16


def tune(runs, folder, data, model, steps):
    by_command(runs, folder, data / "train.jsonl", data / "held_out.jsonl",
               f"--recipe tune-exits --exit-heads 1 2 --head-kind mlp --model {model} --steps {steps} --batch-size 8 "
               "--context 64 --warmup 2 --learning-rate 1e-2 --schedule constant --save-every 1 --log-every 1")


@pytest.mark.exhaustive
def test_tuning_in_two_parts_is_tuning_at_once(runs, uninterrupted, data, tmp_path):
    for folder, lengths in (("once", [6]), ("twice", [3, 6])):
        for steps in lengths:
            tune(runs, tmp_path / folder, data, uninterrupted / "model", steps)
    once, twice = (tmp_path / name / "model" / "exit_heads.safetensors" for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()


def test_exit_heads_are_tuned_and_exported_and_nothing_else_moves(runs, uninterrupted, data, tmp_path):
    model, once = uninterrupted / "model", tmp_path / "once"
    tune(runs, once, data, model, 8)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, once / "model"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    lines = metrics_of(once)
    assert all(line["exits"] == [1, 2] for line in lines)
    first, last = (np.array(lines[at]["held_out"]) for at in (0, -1))
    assert (last[:2] < first[:2]).all() and last[2] == first[2]
    folder = exported(once, tmp_path / "exported")
    heads = [load_file(path / "exit_heads.safetensors") for path in (folder, once / "model")]
    assert all(np.array_equal(heads[0][name], heads[1][name]) for name in heads[1])
    assert sled.load(folder).config.exit_heads.layers == (1, 2)


def test_options_change_the_recipe():
    made = lambda *recipe, **changes: RecipeOptions(*recipe, **changes).made()  # noqa: E731
    assert made("finetune", layer_dropout=0.2, drop="fixed").dropout == layerskip(0.2, strategy=FixedRows())
    assert made("plain", layer_dropout=0.3).dropout == layerskip(0.3)
    assert made("finetune", layer_dropout=0.0).dropout is None
    own = made("finetune", exit_layers=(2, 4)).exits  # weighted as the recipe does
    assert own == WeightedExits(LayerSkipWeights(1.0), AllExits((2, 4)))
    assert made("plain", exit_layers=(3,)).exits == WeightedExits(UniformWeights(), AllExits((3,)))
    assert made("finetune").exits.curriculum == Rotational(16)
    assert made("plain", exit_layers=(2, 4), exit_weights=(0.1, 0.4), exit_initial=(0.3,), exit_warmup=9,
                exit_course="cosine").exits == FixedExits((2, 4), (0.1, 0.4), 0.3, 9, "cosine")
    for changes, says in ((dict(exit_layers=(1, 2)), "names layer 1, which learns nothing with --recipe finetune"),
                          (dict(exit_layers=(1, 2), exit_warmup=9), "--exit-warmup was given without --exit-weights"),
                          (dict(exit_weights=(0.1,)), "FixedExits.layers is"),
                          (dict(exit_layers=(1, 2), exit_weights=(0.1,)), "weights has 1 entries for 2 layers")):
        with pytest.raises(SettingError, match=says):
            made("finetune", **changes)


def run_of(tmp_path, data, recipe=None, **changes):
    """A short run of a small model; `recipe` and `changes`: of its recipe, and of the rest."""
    recipe = named("plain", **{"steps": 4, "batch_size": 2, "context": 32, **(recipe or {})})
    model, source = NewModel(layers=2, width=8, heads=2), Source(data / "train.jsonl")
    return TrainingRun(**{"folder": tmp_path / "run", "model": model, "source": source, "recipe": recipe, **changes})


@pytest.mark.parametrize("ended", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(ended, tmp_path, data, monkeypatch, capsys):
    """At the step at which SIGTERM came, and where it is to be logged."""
    every = 1000 if ended else 1
    monkeypatch.setattr("sled.train.trainer.preemption",
                        lambda: contextlib.nullcontext(lambda step: ended and step == 4))
    exits = WeightedExits(LayerSkipWeights(), AllExits())  # of 2 layers: the first counts nothing
    run = run_of(tmp_path, data, dict(steps=8, learning_rate=1e38, warmup=8, exits=exits), save_every=every,
                 log_every=every)
    with pytest.raises(TrainingError, match=r"step \d has loss .* norm (nan|inf); .* a lower learning rate than 1e\+38"
                       ) as error:
        train(run)
    reached = int(re.search(r"step (\d+) has loss", str(error.value))[1])
    assert (reached == 4 or not ended) and latest(tmp_path / "run" / "checkpoints") < (1 if ended else reached)
    assert not (tmp_path / "run" / "model").exists()
    said = capsys.readouterr().err
    assert re.search(r"  steps +8\n  batch size +2\n  context +32\n  exits +WeightedExits\(profile LayerSkip", said)
    assert "warning: no early exit learns with this recipe" in said
    assert "the learning rate rises over 8 steps, but the run has 8; give a shorter warm-up" in said
    assert re.search(r"the tokenizer has \d+ tokens, not 1000: the data gives no more", said)


def test_a_new_model_takes_a_tokenizer_that_there_is(tmp_path, data):
    form = Path(sled.__file__).parent / "demo" / "model"
    model = NewModel(layers=2, width=8, heads=2, tokenizer=form)
    folder = train(run_of(tmp_path, data, dict(steps=1, warmup=0), model=model))
    lm = sled.load(folder)
    assert lm.config.vocab_size == sled.load("demo").config.vocab_size
    assert lm.text.digest == sled.load("demo").text.digest


def test_a_rehearsal_tells_what_the_run_would_be_and_leaves_nothing(tmp_path, data, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    columns = dict(prompt="Say {text}", completion=" {text}")
    found = rehearse(run_of(tmp_path, data, dict(context=96), source=Source(data / "train.jsonl", **columns),
                            held_out=Source(data / "held_out.jsonl", **columns)))
    assert found.data.examples > found.held_out.examples > 0 and found.epochs == 4 / -(-found.data.rows // 2)
    assert found.recipe.context == 96 and found.step_seconds > 0 and found.measuring_seconds > 0
    assert (found.measurings, found.saves) == (2, 1)
    assert found.step_bytes > found.plan.state + found.plan.gradients / 2 and found.peak.bytes > found.plan.state
    assert found.measuring_bytes > found.plan.state and found.saving_bytes > found.plan.state
    text = found.text()
    assert re.search(r"\n  context +96\n(?:.*\n)*  parameters +[\d,]+\n  data +\d+ examples .*\n"
                     r"  example +Say ([^[]+)\[ \1<\|endoftext\|>\]\n  held out +\d", text), text
    assert re.search(r"  a step +\d.*gradients and activations\n    measuring .*\n    saving .*\n    measured ", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(source=Source("no/such.jsonl")), "there is no file at 'no/such.jsonl'"),
    (dict(held_out=Source("none.csv")), "there is no file at 'none.csv'"),
    (dict(column="words"), "has no column 'words'; by .*text name one"),
    (dict(content="{"), r"a\.jsonl, line 1, cannot be read as json"), (dict(content=""), r"a\.jsonl is empty"),
    (dict(content='{"text": " "}'), "no example is left"),
])
def test_a_rehearsal_reads_the_data(changes, words, tmp_path, data, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    changes, model = dict(changes), Path(sled.__file__).parent / "demo" / "model"
    if {"content", "column"} & changes.keys():
        (tmp_path / "a.jsonl").write_text(changes.pop("content", '{"text": "x"}'))
        changes["source"] = Source(tmp_path / "a.jsonl", text=changes.pop("column", "text"))
    with pytest.raises(DataError, match=words):
        rehearse(run_of(tmp_path, data, model=model, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, error, words", [
    (dict(source=Source("no/such.jsonl")), DataError, "there is no file at 'no/such.jsonl'"),
    (dict(recipe=dict(context=300), model="demo"), SettingError, "context is 300.* made for 256 positions"),
    (dict(shape="triangular"), SettingError, "shape is 'triangular'.*packed"),
    (dict(save_every=0), SettingError, "save_every is 0"),
    (dict(recipe=dict(trainable="exit-heads")), SettingError, "tunes exit heads alone, but the model has none"),
    (dict(heads=ExitHeads((2,))), ConfigError, "exit heads are given for layers"),
    (dict(heads=ExitHeads((1,))), SettingError, "after layer 1 has a head, but with LastOnly.* learns nothing"),
    (dict(recipe=dict(exits=WeightedExits(UniformWeights(), AllExits((9,))))), SettingError,
     "names 9, but the exits of this model are 1 to 2"),
    (dict(heads=3), SettingError, "heads is 3"),
    (dict(model=NewModel(positions=16)), SettingError, "positions is 16, but rows of training have 32"),
])
def test_bad_input_is_refused_by_name(changes, error, words, tmp_path, data, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    with pytest.raises(error, match=words):
        train(run_of(tmp_path, data, **changes))
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_and_no_recipe(tmp_path):
    with pytest.raises(CheckpointError, match="no folder of a training run"):
        read_checkpoint(tmp_path)
    with pytest.raises(SettingError, match="recipe is 3"):
        TrainingRun(tmp_path, "demo", Source([]), 3)


@pytest.mark.parametrize("arguments, words", [
    ([], "--data is missing"),
    (["--data", "demo", "--layers", "3"], "--layers describes a new model, but --model is demo"),
    (["--data", "demo", "--recipe", "nothing"], "recipe is 'nothing', which is unknown; choose one of"),
    (["--data", "demo", "--tensor-parallel", "3"], "--tensor-parallel 3 takes a multiple of 3"),
    (["--data", "demo", "--recipe", "plain", "--drop", "fixed"], "--drop fixed was given, but no layer is dropped"),
    (["--data", "demo", "--head-kind", "mlp"], "--head-kind was given without --exit-heads"),
])
def test_the_command_says_what_it_refuses(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
