"""The card of an exported folder: what a run measured, and a calibration that came along."""

import json

import huggingface_hub
import numpy as np
import pytest
from export_models import same

import sled
from sled.calibration.fingerprint import fingerprint
from sled.calibration.record import Step
from sled.errors import CalibrationError
from sled.export.card import Card, Measured
from sled.export.forms import export_hf
from sled.lm import LM
from sled.train.run.folder import read_checkpoint

pytest_plugins = ["export_folders"]


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
                  "assistant_early_exit=2", "for 1 steps, from `someone/base`"):
        assert words in card.text
    assert json.loads((tmp_path / "model" / "sled_export.json").read_text())["step"] == 1
    assert sled.load(tmp_path / "model").text.available

    export_hf(run_folder, tmp_path / "model")
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "measured no held-out data at step 2" in card.text and "from random weights" in card.text
    assert "was not measured" in card.text and "| 1 |" not in card.text


def test_recommended_exits_are_within_the_margin_of_the_last_layer():
    found = Measured([3.0, 2.0, 2.0, 1.0], [0.25, 0.75, 0.5, 0.75])
    assert found.within(0) == [2] and found.within(0.25) == [2, 3] and found.within(1) == [1, 2, 3]


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
