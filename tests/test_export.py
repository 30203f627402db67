"""Exported folders: Hugging Face ones that transformers runs alike, Orbax ones bit for bit; their cards; refusals."""

import dataclasses
import json
import re

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from export_folders import PROMPTS, random_decoder, same
from safetensors.numpy import load_file

import sled
from sled.calibration.fingerprint import fingerprint
from sled.calibration.record import Step
from sled.cli import main
from sled.errors import CalibrationError, CheckpointError, SettingError
from sled.export.card import Card, Measured, model_card
from sled.export.forms import export_hf, export_orbax
from sled.export.source import read_source
from sled.export.target import replacing
from sled.lm import LM
from sled.models import load_folder, load_orbax, save_folder, save_orbax
from sled.models.digest import digest_of_weights
from sled.survey.result import Drafting, Spoken, Survey
from sled.train.run.folder import read_checkpoint

pytest_plugins = ["export_folders"]


def test_orbax_to_hugging_face_to_orbax_is_identical(decoder, tmp_path):
    given = save_folder(decoder, tmp_path / "given", dtype="bfloat16")
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    export_orbax(given, first)
    export_hf(first, second)
    export_orbax(second, third)
    read = load_orbax(first)
    assert same(read, load_folder(given)) and same(read, load_orbax(third))
    assert read.embedding.weight.dtype == "bfloat16"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (second, given))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert same(load_orbax(save_orbax(decoder.stack(), tmp_path / "stacked")), decoder)


def test_orbax_folders_hold_exit_heads_and_their_tokenizer_and_load(headed_folder, tmp_path):
    export_orbax(headed_folder, tmp_path / "headed")
    assert same(load_orbax(tmp_path / "headed"), load_folder(headed_folder))
    ours, theirs = sled.load(tmp_path / "headed", dtype="bfloat16"), sled.load(headed_folder, dtype="bfloat16")
    assert digest_of_weights(ours.params) == digest_of_weights(theirs.params) and ours.text.digest == theirs.text.digest


def test_orbax_folders_that_do_not_fit_are_refused(decoder, tmp_path):
    folder = save_orbax(decoder, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_orbax(decoder, folder)
    written = json.loads((folder / "config.json").read_text())
    for changes, words in (({"num_hidden_layers": 4}, "lacks 9 of .*: layers/3/"),
                           ({"num_hidden_layers": 2}, "holds 9 tensors .* not account for: layers/2/"),
                           ({"vocab_size": 48}, r"embedding/weight has shape \(47, 16\), but .* \(48, 16\)")):
        (folder / "config.json").write_text(json.dumps(written | changes))
        with pytest.raises(CheckpointError, match=words):
            sled.load(folder)
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "weights" / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        sled.load(folder)
    broken = random_decoder()
    broken.norm.weight[...] = broken.norm.weight[...].at[0].set(jnp.nan)
    with pytest.raises(CheckpointError, match="norm/weight holds values that are not finite"):
        save_orbax(broken, tmp_path / "broken")


def test_transformers_says_the_same_with_and_without_early_exit(plain_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install sled-jax[parity]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install sled-jax[parity]")
    export_hf(plain_folder, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([PROMPTS[1]])
    expected = sled.load(tmp_path / "model").generate(PROMPTS[1], max_new_tokens=12).tokens[0]
    for early in ({}, {"assistant_early_exit": 1}):
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, **early)
        assert out[0, ids.shape[1]:].tolist() == expected


def test_exit_heads_go_to_transformers_only_on_demand(headed_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"layers 1, 2 have heads of their own .*--heads drop"):
        export_hf(headed_folder, tmp_path / "model")
    assert not any(tmp_path.iterdir())
    export_hf(headed_folder, tmp_path / "model", heads="drop")
    assert load_folder(tmp_path / "model").config.exit_heads is None
    assert "were left behind" in (tmp_path / "model" / "README.md").read_text()
    export_hf(headed_folder, tmp_path / "model", heads="beside")
    assert same(load_folder(tmp_path / "model"), load_folder(headed_folder))
    assert "only sled reads" in (tmp_path / "model" / "README.md").read_text()


# The card: what a run measured, and a calibration that came along

def test_a_checkpoint_gives_its_weights_without_its_optimiser(run_folder, decoder, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    targets, load = [], ocp.load
    monkeypatch.setattr(ocp, "load", lambda path, target: targets.append(target) or load(path, target))
    first, latest = read_checkpoint(run_folder, 1), read_checkpoint(run_folder)
    assert same(first.decoder.unstack(), decoder) and (first.step, latest.step) == (1, 2)
    assert np.array_equal(latest.decoder.norm.weight[...], 2 * decoder.norm.weight[...])
    assert [target["arrays"].keys() for target in targets] == [{"weights"}, {"weights"}]


def test_the_card_says_what_was_measured(run_folder, tmp_path):
    export_hf(run_folder, tmp_path / "model", Card(license="apache-2.0", base="someone/base"), step=1)
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "someone/base"
    assert card.data.library_name == "transformers" and "sled" in card.data.tags
    for words in ("| 2 | 2.2500 | 0.4375 |", "at most 0.02 below", "Here: 2;", "SelfSpeculation(2)",
                  "assistant_early_exit=2", "for 1 steps, from `someone/base`", "Held out: nothing.", "steps 2, batch ",
                  r"Data: `own.jsonl` (prompt `'Q: {q}\n'`, completion a; SHA-256 of what was read abababababababab)"):
        assert words in card.text
    assert "/home/ann" not in card.text
    assert json.loads((tmp_path / "model" / "sled_export.json").read_text())["step"] == 1
    assert sled.load(tmp_path / "model").text.available

    export_hf(run_folder, tmp_path / "model")
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "measured no held-out data at step 2" in card.text and "from random weights" in card.text
    assert "was not measured" in card.text and "| 1 |" not in card.text and "SelfSpeculation" not in card.text
    found = Measured([3.0, 2.0, 2.0, 1.0], [0.25, 0.75, 0.5, 0.75])  # within a margin of the last layer
    assert found.within(0) == [2] and found.within(0.25) == [2, 3] and found.within(1) == [1, 2, 3]


def card_of(source, name="model", margin=0.02, measured=None, heads=None, tmp_path=None):
    """The text of a card; measured: held-out accuracy of each layer, as a run would have measured it."""
    model = read_source(source)
    if measured:
        line = {"step": 3, "held_out": [1.0] * len(measured), "held_out_accuracy": measured}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        of_run = dict(model={"name": "new"}, data=dict(name="demo", digest="cd"), held_out=None, recipe={})
        model = model._replace(run=tmp_path, step=3, settings={**of_run, "prompt_weight": 0})
    return model_card(Card(margin=margin), model, model.decoder if heads != "drop" else model.decoder.with_exit_heads(
        None), name, None)


@pytest.mark.parametrize(("settings", "drafts"), [
    (dict(), None), (dict(measured=[0.0275, 0.3, 0.9]), None), (dict(measured=[0.9, 0.9, 0.9]), 1),
    (dict(measured=[0.1, 0.885, 0.9]), 2), (dict(measured=[0.1, 0.885, 0.9], margin=0.01), None),
    (dict(measured=[0.1, 0.2, 0.9], margin=1.0), 1), (dict(measured=[0.9, 0.9, 0.9], heads="drop"), None),
    *((dict(measured=hopeless, margin=margin), None) for margin in (0.02, 1.0) for hopeless in (
        [0.0, 0.0, 0.0], [0.01, 0.02, 0.02], [0.05, 0.03, 0.04], [0.2, 0.3, 0.24])),
    (dict(measured=[0.22, 0.24, 0.25]), 2),
], ids=str)
def test_the_card_drafts_only_at_a_layer_that_was_measured_and_is_good(settings, drafts, plain_folder, headed_folder,
                                                                      tmp_path):
    card = card_of(headed_folder if "heads" in settings else plain_folder, tmp_path=tmp_path, **settings)
    shown = set(re.findall(r"(?:SelfSpeculation\(|assistant_early_exit=)(\d+)", card))
    assert shown == (set() if drafts is None else {str(drafts)})
    assert ("not measured" in card) == ("measured" not in settings)
    assert ("the last layer's own is below 0.25" in card) == (settings.get("measured", [1])[-1] < 0.25)


@pytest.mark.parametrize("kind", ["token ids, plain", "text, drafted",
                                  pytest.param("text, plain", marks=pytest.mark.exhaustive)])
def test_the_code_of_the_card_runs_as_it_stands(kind, plain_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if kind.startswith("text"):
        export_hf("demo", "model")
        card = card_of("demo", measured=[0.5, 0.9, *[0.9] * 6] if "drafted" in kind else None, tmp_path=tmp_path)
    else:
        export_hf(plain_folder, "model")
        card = (tmp_path / "model" / "README.md").read_text()
    ours, theirs = re.findall(r"```python\n(.*?)```", card, re.S)
    assert ("SelfSpeculation(2)" in ours) == ("assistant_early_exit=2" in theirs) == ("drafted" in kind)
    exec(ours, {})
    said = capsys.readouterr().out.strip()
    assert said
    pytest.importorskip("transformers", reason="transformers is not installed: pip install sled-jax[parity]")
    exec(theirs, {})
    whole = capsys.readouterr().out.strip()
    if kind.startswith("text"):
        assert said in whole
    else:
        assert json.loads(whole) == [1, 2, 3, *json.loads(said)]


@pytest.fixture(scope="module")
def calibration(decoder, tmp_path_factory):
    serving = fingerprint(LM(decoder), sled.Decoding(sled.SLED(), sled.EarlyExit(1), max_new_tokens=8))
    record = sled.Calibration(0.9, delta=0.1, epsilon=0.05, loss="exact", prompts=100, grid=(0.9, 0.5), steps=(
        Step(0.9, 0.01, 0.001, 2.5), Step(0.5, 0.2, 0.9, 1.5)), full_depth=3, serving=serving, model="tiny", seed=0,
        batch_size=8, date="2026-11-24", versions={}, hardware="cpu")
    path = tmp_path_factory.mktemp("calibration") / "record.json"
    record.save(path)
    return path


def test_a_calibration_comes_along_with_its_own_weights_and_no_others(calibration, run_folder, headed_folder,
                                                                      plain_folder, tmp_path):
    export_hf(plain_folder, tmp_path / "model", calibration=calibration)
    card = (tmp_path / "model" / "README.md").read_text()
    record = sled.Calibration.load(tmp_path / "model" / "calibration.json")
    assert record.verdict() in card and record.table() in card and record.serving["weights"] in card
    export_hf(run_folder, tmp_path / "of-run", step=1, calibration=calibration)
    with pytest.raises(CalibrationError, match="weights have another digest; calibrate this model"):
        export_hf(run_folder, tmp_path / "other", calibration=calibration)
    with pytest.raises(CalibrationError, match="exit_heads"):
        export_hf(headed_folder, tmp_path / "other", heads="beside", calibration=calibration)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(CalibrationError, match="no calibration"):
        export_hf(plain_folder, tmp_path / "other", calibration=tmp_path / "broken.json")
    assert not (tmp_path / "other").exists()


# Where it is written, and the command


def test_a_folder_is_written_whole_or_not_at_all_and_over_exports_only(tmp_path):
    to = tmp_path / "a" / "to"
    with pytest.raises(RuntimeError), replacing(to) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not any((tmp_path / "a").iterdir())
    for content in ("one.safetensors", "two.safetensors"):
        with replacing(to) as folder:
            (folder / "sled_export.json").write_text('{"form": "hf"}')
            (folder / content).touch()
    assert sorted(path.name for path in to.iterdir()) == ["sled_export.json", "two.safetensors"]
    with pytest.raises(RuntimeError), replacing(to):
        raise RuntimeError
    assert (to / "two.safetensors").exists() and [path.name for path in to.parent.iterdir()] == ["to"]
    with pytest.raises(SettingError, match="cannot be written"), replacing("/proc/nothing/here"):
        pass


@pytest.mark.parametrize(("mine", "says"), [
    *((name, f"also holds {re.escape(name)}, which would go") for name in (
        "mine.txt", "weights/mine/notes.txt", "weights/notes.txt", "own/config.json")),
    ("sled_export.json", r"no earlier export \(it holds sled_export"), ("../to2", "is a file")])
def test_what_is_no_export_stays(mine, says, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    (to / "sled_export.json").write_text('{"form": "hf"}')
    (to / mine).parent.mkdir(parents=True, exist_ok=True)
    (to / mine).write_text('{"somebody": "else"}')
    with pytest.raises(CheckpointError, match=says), replacing(to / mine if mine.startswith("..") else to):
        pass
    assert (to / mine).read_text() == '{"somebody": "else"}'


@pytest.mark.parametrize("arguments, words", [
    (["{empty}"], "neither a training run's folder"),
    (["nowhere"], "'nowhere' is no folder here"),
    (["demo", "--step", "3"], "demo is no training run"),
    (["demo", "--form", "orbax", "--license", "mit"], "--license has no meaning for --form orbax"),
    (["demo", "--fusion", "sled"], "--fusion has no meaning for --form hf"),
    (["demo", "--margin", "2"], "--margin is 2.0"),
    (["demo", "--license", " "], "--license is empty"),
    (["{run}", "--step", "9"], "no checkpoint of step 9"),
])
def test_the_command_says_what_it_refuses(arguments, words, run_folder, tmp_path, capsys):
    arguments = [argument.format(empty=tmp_path, run=run_folder) for argument in arguments]
    assert main(["export", *arguments, "--out", str(tmp_path / "to")]) == 1
    assert words in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_command_writes_every_form(run_folder, tmp_path, capsys):
    for name, options in (("hf", ["--dtype", "bfloat16"]), ("orbax", ["--form", "orbax"]),
                          ("program", ["--form", "program", "--fusion", "average", "--step", "1"])):
        assert main(["export", str(run_folder), "--out", str(tmp_path / name), *options]) == 0
    assert load_folder(tmp_path / "hf").embedding.weight.dtype == jnp.bfloat16
    about = json.loads((tmp_path / "program" / "program.json").read_text())
    assert about["source"] == {"source": run_folder.name, "step": 1}
    assert about["settings"]["fusion"]["kind"] == "sled.LayerAverage" and about["tokenizer"]["file"] == "tokenizer.json"
    assert "the program export is in" in capsys.readouterr().err


def test_the_card_takes_the_word_of_a_survey_of_these_weights(plain_folder, tmp_path):
    lm, path = sled.load(plain_folder), tmp_path / "layers.json"
    found = Survey("m", 3, 2, 9, 1, tuple(Spoken(n, n / 3, 0.1, 0.0, None, 0.5) for n in (1, 2)),
                   (Drafting(1, 4, None, 0.5, 1.2, 0.9, 1.0), Drafting(2, 8, None, 0.9, 4.0, 1.5, 1.6)), (), None,
                   digest_of_weights(lm.params))
    slow = dataclasses.replace(found, drafting=tuple(dataclasses.replace(way, speed=0.9, bound_speed=1.0)
                                                     for way in found.drafting))
    for survey, drafts in ((found, "2, draft=8"), (slow, None)):
        survey.save(path)
        export_hf(plain_folder, tmp_path / "model", survey=path)
        card = (tmp_path / "model" / "README.md").read_text()
        assert "| 1 | 0.3333 | 0.1000 | 4 | 0.5000 | 0.90 |" in card and "was not measured" not in card
        assert set(re.findall(r"lm.generate\(.*SelfSpeculation\((.*?)\)", card)) == ({drafts} if drafts else set())
        assert ("assistant_early_exit=2" in card) == bool(drafts) == ("none: " not in card)
    dataclasses.replace(found, weights="0" * 64).save(path)
    with pytest.raises(CalibrationError, match="the survey of layers is of m and does not belong to"):
        export_hf(plain_folder, tmp_path / "model", survey=path)
