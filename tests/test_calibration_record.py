"""The record of a calibration: kept, read again, refused where anything is not as it was; and the command."""

import copy
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sled
from sled.demo.problems import problems, prompt
from sled.errors import CalibrationError, SettingError
from sled.exits import FullDepth
from sled.io import json_digest
from sled.models import Rope
from sled.models.decoder import ARITHMETIC
from sled.models.digest import digest_of_weights
from sled.settings.describe import describe
from sled.text.tokenizer import Tokenizer

EXITS = sled.EarlyExit(2)
PROMPTS = [prompt(p.question) for p in problems("train", 16, seed=3)]
SERVING = dict(max_new_tokens=40)  # as in test_calibration: the same programs


@pytest.fixture(scope="module")
def record(demo):
    return sled.calibrate(demo, PROMPTS, exits=EXITS, delta=0.2, epsilon=0.1, grid=(0.95, 0.9), batch_size=16,
                          progress=False, **SERVING)


@pytest.fixture
def saved(record, tmp_path):
    path = tmp_path / "calibration.json"
    record.save(path)
    return path


def test_a_record_comes_back_whole(demo, record, saved):
    again = sled.Calibration.load(saved)
    assert again == record and again.threshold == 0.9
    for asked in ({}, dict(exits=sled.EarlyExit(2, threshold=0.1)), dict(schedule=None)):
        assert again.policy(demo, **asked, **SERVING) == sled.EarlyExit(2, threshold=0.9)
    dataclasses.replace(record, threshold=None).save(saved)
    assert sled.Calibration.load(saved).policy(demo, **SERVING) == FullDepth()


def test_a_record_says_what_where_and_when(record, saved):
    found = json.loads(saved.read_text())
    assert found["format"] == 1 and found["threshold"] == 0.9 and found["steps"][1]["mean_loss"] < 0.2
    assert set(found["versions"]) >= {"sled-jax", "jax", "flax", "python"} and found["date"].endswith("+00:00")
    assert found["serving"]["exits"]["layers"] == [2] and "threshold" not in found["serving"]["exits"]
    assert len(found["serving"]["weights"]) == len(found["sha256"]) == 64
    saved.write_text(json.dumps(found, sort_keys=True))  # the layout of the file does not matter
    assert sled.Calibration.load(saved) == record


@pytest.mark.parametrize(("change", "says"), [
    (dict(exits=sled.EarlyExit(1)), r"exits.layers was \[2\] and is \[1\]"),
    (dict(exits=sled.EarlyExit(2, kv="propagate")), "exits.kv was 'exact' and is 'propagate'"),
    (dict(exits=sled.EarlyExit(2, measure="margin")), "exits.measure was"),
    (dict(exits=sled.EarlyExit(2, min_layer=1)), "exits.min_layer was 0 and is 1"),
    (dict(fusion=sled.SLED()), "fusion was sled.FinalLayer and is sled.SLED"),
    (dict(schedule=sled.Gather(2)), "schedule was sled.Immediate and is sled.Gather"),
    (dict(sampling=sled.Sampling(temperature=0.7)), r"sampling.temperature was 0.0 and is 0.7"),
    (dict(max_new_tokens=41), "max_new_tokens was 40 and is 41"),
    (dict(stop="\n"), r"stop was \[\] and is"),
    (dict(exits=sled.EarlyExit(2, kv="propagate"), fusion=sled.SLED(), max_new_tokens=41),
     r"exits\.kv.*fusion.*max_new_tokens"),
])
def test_other_settings_are_refused_by_name(demo, record, change, says):
    with pytest.raises(CalibrationError, match=f"does not hold here: {says}.*calibrate again"):
        record.policy(demo, **{**SERVING, **change})


@pytest.mark.parametrize("before", [{"arithmetic": 1}, {}], ids=["another", "none told"])
def test_another_arithmetic_is_refused(before, demo, record):
    serving = {name: value for name, value in record.serving.items() if name != "arithmetic"} | before
    says = f"arithmetic was {before.get('arithmetic')} and is {ARITHMETIC}.*calibrate again"
    with pytest.raises(CalibrationError, match=says):
        dataclasses.replace(record, serving=serving).policy(demo, **SERVING)


def test_another_model_is_refused(demo, record):
    params = jax.tree.map(lambda array: array, demo.params)  # another tree of the same arrays
    norm = params["layers"][3]["mlp_norm"]
    norm["weight"] = norm["weight"].at[5].set(np.nextafter(norm["weight"][5], np.float32(9)))
    for change, says in ((dict(params=params), "weights was .* and is [^;]*"),
                         (dict(config=dataclasses.replace(demo.config, rope=Rope(500.0))),
                          "model.rope.theta was 10000.0 and is 500.0")):
        other = copy.copy(demo)
        vars(other).update(change)
        with pytest.raises(CalibrationError, match=f"does not hold here: {says}; serve"):
            record.policy(other, **SERVING)


def test_only_an_early_exit_has_a_calibrated_threshold(demo, record):
    with pytest.raises(SettingError, match="exits is FullDepth, which has no threshold"):
        record.policy(demo, FullDepth(), **SERVING)


def test_names_types_shapes_and_bytes_of_weights_all_count():
    params = {"a": nnx.Param(jnp.zeros((2, 3))), "b": nnx.Param(jnp.ones(2))}
    variants = [params, {"a": params["a"], "c": params["b"]}, {"a": params["b"], "b": params["a"]},
                {**params, "a": nnx.Param(jnp.zeros((3, 2)))}, {**params, "b": nnx.Param(jnp.ones(2, jnp.int32))},
                {**params, "b": nnx.Param(jnp.ones(2, jnp.bfloat16))}]
    digests = [digest_of_weights(nnx.State(v)) for v in variants]
    assert len(set(digests)) == len(variants)
    assert digests[0] == digest_of_weights(nnx.State(dict(reversed(params.items()))))  # the order does not


def test_a_trained_classifier_is_bound_by_digest(demo, record):
    def exits(weight):
        return sled.EarlyExit(2, measure="classifier", classifier=sled.Classifier(
            jnp.full((1, 128), weight), jnp.zeros(1)))

    serving = {**record.serving, "exits": json.loads(json.dumps(describe(exits(0.5), leave_out=("threshold",))))}
    of_classifier = dataclasses.replace(record, serving=serving)
    assert of_classifier.policy(demo, exits(0.5), **SERVING).threshold == 0.9
    with pytest.raises(CalibrationError, match=r"only a digest of EarlyExit.classifier; give the very settings"):
        of_classifier.policy(demo, **SERVING)
    with pytest.raises(CalibrationError, match=r"exits.classifier.weight_ED was an array with SHA-256"):
        of_classifier.policy(demo, exits(0.25), **SERVING)
    with pytest.raises(CalibrationError, match=r"exits.measure was 'classifier'.*was sled.Classifier and is"):
        of_classifier.policy(demo, EXITS, **SERVING)


def test_settings_of_another_version_are_refused(demo, record):
    serving = {**record.serving, "exits": {**record.serving["exits"], "hurry": 3}}
    with pytest.raises(CalibrationError, match=r"settings that this version of sled lacks.*hurry"):
        dataclasses.replace(record, serving=serving).policy(demo, **SERVING)


def test_what_has_no_value_to_compare_is_refused():
    assert describe(-np.inf) == "-inf" and describe((np.float32(0.5), True, None)) == [0.5, True, None]
    with pytest.raises(SettingError, match="frozen dataclass"):
        describe(object())


def test_any_edited_field_is_refused(saved):
    found = json.loads(saved.read_text())
    leaves, structure = jax.tree.flatten({name: value for name, value in found.items() if name != "format"},
                                         is_leaf=lambda value: value in (None, []))
    more = [leaf + 1 if isinstance(leaf, (int, float)) else [leaf] for leaf in leaves]
    edited = [{**found, **structure.unflatten([*leaves[:i], other, *leaves[i + 1:]])} for i, other in enumerate(more)]
    without = [{name: value for name, value in found.items() if name != gone} for gone in found.keys() - {"format"}]
    assert len(edited) > 40
    for fields in [*edited, *without, {**found, "more": 1}]:
        saved.write_text(json.dumps(fields))
        with pytest.raises(CalibrationError, match="was changed after it was made"):
            sled.Calibration.load(saved)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda text: text[:len(text) // 2], "cannot be read as JSON"), (lambda text: b"", "cannot be read as JSON"),
    (lambda text: b"[" * 100_000, "cannot be read as JSON"), (lambda text: b"\xff\xfe\x00", "cannot be read as UTF-8"),
    (lambda text: b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 deep"),
    (lambda text: b"[1]", "not a JSON object"), (lambda text: b"{}", "no calibration"),
    (lambda text: text.replace(b'"format": 1', b'"format": 2'), "format 2, but this version of sled reads format 1"),
])
def test_damaged_files_and_unknown_formats_are_refused(saved, damage, says):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(CalibrationError, match=says):
        sled.Calibration.load(saved)


def test_files_that_cannot_be_read_or_written_are_named(record, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("missing.json", "is not there"), (".", "is a folder, a pipe"), ("pipe", "is a folder, a pipe")):
        with pytest.raises(CalibrationError, match=f"{says}.*, where a file is needed.*calibrate again"):
            sled.Calibration.load(tmp_path / name)
    for path, says in ((tmp_path, "cannot be written"), (tmp_path / "pipe", "it is a pipe or a device"),
                       (None, "path is None, which can be no path"), (3, "path is 3, which can be no path"),
                       ("a\0b", "embedded null byte"), ("x" * 5000, "File name too long"), ("\ud800", "surrogates")):
        with pytest.raises(SettingError, match=says):
            record.save(path)
        with pytest.raises(CalibrationError):
            sled.Calibration.load(path)


FORGED = [
    (dict(threshold=0.123), "threshold is 0.123, but its steps choose"), (dict(threshold="0.9"), "threshold is '0.9'"),
    (dict(delta=2), "delta is 2"), (dict(epsilon=float("nan")), "epsilon is nan"),
    (dict(grid=[0, 1]), "must be those of grid"),
    (dict(grid=3), "grid is 3"), (dict(steps=[]), r"steps are at \(\)"), (dict(steps=[{}]), "missing 4 required"),
    (dict(steps=3), "not iterable"), (dict(prompts=-1), "prompts is -1"), (dict(full_depth=True), "full_depth is True"),
    (dict(serving=[1]), r"serving is \[1\]"), (dict(serving={}), "serving.exits is None"),
    (dict(serving={"exits": {"kind": 3}}), "serving.exits.kind is 3"), (dict(versions="1"), "versions is '1'"),
    (dict(model=None), "model is None"), (dict(seed=1.5), "seed is 1.5"),
]


@pytest.mark.parametrize(("wrong", "says"), FORGED, ids=str)
def test_a_forged_record_is_refused_though_its_digest_fits(saved, wrong, says):
    found = {name: value for name, value in json.loads(saved.read_text()).items() if name != "sha256"} | wrong
    saved.write_text(json.dumps({**found, "sha256": json_digest(found)}))
    with pytest.raises(CalibrationError, match=f"none that sled made, though its digest fits .*{says}"):
        sled.Calibration.load(saved)


def test_without_a_tokenizer_token_ids_are_calibrated(demo, record):
    ids = list(map(demo.text.encode, PROMPTS))
    blind = copy.copy(demo)
    blind.text = Tokenizer(None, "blind")
    seen = []
    made = sled.calibrate(blind, ids, exits=EXITS, delta=0.2, epsilon=0.1, grid=(0.95,), batch_size=16, progress=False,
                           loss=lambda early, full: seen.append(early) or early != full, **SERVING)
    assert all(isinstance(tokens, list) for tokens in seen) and len(seen) == 2 * 16 and made.serving == record.serving


ARGUMENTS = ("calibrate", "--exit-layers", "2", "--delta", "0.2", "--epsilon", "0.1", "--grid", "0.95", "0.01", "-n",
             "40", "--batch-size", "16")


def test_the_command_writes_a_record_and_says_what_it_chose(demo, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo)
    path = tmp_path / "c.json"
    code, out, err = command(*ARGUMENTS, "--problems", "16", "-o", str(path))
    assert code == 0 and "<- chosen" in out and "With 90% confidence" in out and str(path) in err
    made = sled.Calibration.load(path)
    assert made.grid == (0.95, 0.01) and made.prompts == 16 and out.startswith(made.table())
    assert made.policy(demo, **SERVING).threshold == made.threshold

    (tmp_path / "prompts.txt").write_text("\n".join(text.replace("\n", "\\n") for text in PROMPTS))
    code, _, _ = command(*ARGUMENTS, "--file", str(tmp_path / "prompts.txt"), "-o", str(path), "--loss", "exact",
                         "--schedule", "gather", "--gather-rows", "2")
    made = sled.Calibration.load(path)
    assert code == 0 and made.loss == "exact" and made.prompts == 16
    assert made.serving["schedule"] == dict(kind="sled.Gather", rows=2, patience=16)


def test_generate_leaves_as_a_record_says(demo, record, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo)
    gathering = dict(kind="sled.Gather", rows=2, patience=16)
    saved = tmp_path / "gather.json"
    dataclasses.replace(record, serving=dict(record.serving, schedule=gathering)).save(saved)
    question = prompt(problems("heldout", 1)[0].question)
    asked = ("generate", question, "--calibration", str(saved))
    code, out, _ = command(*asked, "--json", "-n", "40")
    assert code == 0 and json.loads(out)["exit_layers"] == demo.generate(
        question, exits=sled.EarlyExit(2, record.threshold), **SERVING).exit_layers[0]
    for more, says in ((["-n", "41"], "-n was 40 and is 41"), (["-n", "40", "--fusion", "sled"], "fusion"),
                       (["-n", "40", "--exits", "early", "--exit-layers", "2"], "give one of the two"),
                       (["-n", "40", "--schedule", "lockstep"], "--schedule and --calibration were both given")):
        code, out, err = command(*asked, *more)
        assert code == 1 and says in err and not out


@pytest.mark.parametrize(("arguments", "says"), [
    (("-m", "owner/name"), "PromptError: no prompts were given for owner/name"),
    (("--problems", "3", "--file", "x"), "PromptError: --problems was given beside --file or --data"),
    (("--problems", "0"), "SettingError: --problems is 0"),
    (("--problems", "3"), "CalibrationError: 3 prompts show nothing"),
    (("--patience", "3"), "--patience has no meaning without --schedule"),
    (("-o", "/proc/c.json"), "SettingError: --out is"),
])
def test_the_command_names_what_is_wrong(arguments, says, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*ARGUMENTS, *arguments)
    assert code == 1 and says in err and not out and not list(tmp_path.iterdir())
