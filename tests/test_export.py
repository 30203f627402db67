"""Exports: Hugging Face folders that transformers runs alike, Orbax folders bit for bit, programs without this library;
the card; and what is refused."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from headed_models import stirred
from safetensors.numpy import load_file

import sled
from sled.calibration.fingerprint import bind, digest_of_weights
from sled.calibration.record import Step
from sled.cli import main
from sled.decoding.network import fuse
from sled.errors import CalibrationError, CheckpointError, SettingError
from sled.export.card import Card, Measured
from sled.export.forms import export_hf, export_orbax, export_program
from sled.export.program import _export, trace_step
from sled.export.settings import take_apart
from sled.export.target import replacing
from sled.fusion import SharedHead
from sled.lm import LM
from sled.models import Decoder, DecoderConfig, ExitHeads, load_folder, load_orbax, save_folder, save_orbax
from sled.models.hub import folder_of
from sled.models.huggingface import write_form
from sled.text.tokenizer import Tokenizer
from sled.train.run.checkpoint import Checkpoints
from sled.train.run.folder import read_checkpoint

CONFIG = DecoderConfig(family="llama", vocab_size=47, width=16, mlp_width=24, num_layers=3, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=96, eos_ids=(5,), tied_head=True)
HEADS = ExitHeads((1, 2), "affine")
PROMPTS = [np.random.default_rng(7).integers(6, 47, size=n).tolist() for n in (1, 70, 9)]  # 70 is over a prefill block
NEW = 12
MIXED = [[0.05], [1], [0.2]]  # thresholds of each row
WARM = dict(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.05)
WAYS = {
    "plain": dict(fusion=sled.DoLa(layers="high")),
    "early": dict(fusion=sled.SLED(), exits=sled.EarlyExit(1, 0.1, max_deferred=1), schedule=sled.Gather(2, 3)),
    "speculation": dict(exits=sled.SelfSpeculation(1, draft=2, max_draft=3, vocabulary=np.arange(3, 47)),
                        fusion=sled.ClampOnly(scale=7)),
}
# Runs in a process that has neither this library nor flax.
DRIVER = """
import json, sys
for name in ("sled", "flax", "orbax", "optax", "tokenizers"):
    sys.modules[name] = None
import importlib.util
import numpy as np
found = {}
for folder, calls in json.loads(sys.argv[1]).items():
    spec = importlib.util.spec_from_file_location("run", folder + "/run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    program = run.Program()
    found[folder] = [program.generate(**call) for call in calls]
hidden = np.load(sys.argv[2])
found["fuse"] = np.asarray(program.fuse(hidden, {"fusion.scale": [5, 9]})).tolist()
found["refused"] = []
for numbers in ({"fusion.scale": 17}, {"fusion.scale": "abc"}, {"nosuch": 1}):
    try:
        program.numbers(1, numbers)
    except ValueError as error:
        found["refused"].append(str(error))
sys.argv = ["run.py", "7", "--ids", "--set", "fusion.scale=abc"]
try:
    run.main()
except SystemExit as end:
    found["code"] = end.code
print(json.dumps(found))
"""


def random_decoder(heads=None, seed=1):
    decoder = Decoder.init(CONFIG, rngs=nnx.Rngs(seed))
    nnx.update(decoder, jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, nnx.state(decoder)))
    return decoder if heads is None else decoder.with_exit_heads(heads, rngs=nnx.Rngs(2))


def same(one: Decoder, other: Decoder) -> bool:
    pairs = zip(*(jax.tree.leaves(nnx.state(model)) for model in (one, other)), strict=True)
    return one.config == other.config and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def decoder():
    return random_decoder()


@pytest.fixture(scope="module")
def plain_folder(decoder, tmp_path_factory):
    return save_folder(decoder, tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def headed_folder(tmp_path_factory):
    return save_folder(random_decoder(HEADS), tmp_path_factory.mktemp("headed") / "model",
                       tokenizer_from=folder_of("demo"))


@pytest.fixture(scope="module")
def run_folder(decoder, tmp_path_factory):
    """What a run of two checkpoints leaves, the first one measured."""
    run = tmp_path_factory.mktemp("run")
    (run / "model_config").mkdir()
    write_form(run / "model_config", CONFIG, "float32", folder_of("demo"))
    settings = {"model": {"kind": "sled.NewModel", "name": "new"}}
    with Checkpoints(run / "checkpoints", settings, save_every=1) as checkpoints:
        for step in (1, 2):
            weights = jax.tree.map(lambda x: x * step, nnx.state(decoder.stack()))  # noqa: B023
            checkpoints.save(step, {"weights": weights, "optimizer": {"moment": jnp.zeros(3)}}, {})
    lines = [{"step": 1, "loss": 3.0, "held_out": [3.5, 2.25, 2.125], "held_out_accuracy": [0.3, 0.4375, 0.45]},
             {"step": 2, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


# Hugging Face and Orbax


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


def test_orbax_folders_hold_exit_heads_and_their_tokenizer_and_load(headed_folder, tmp_path):
    export_orbax(headed_folder, tmp_path / "headed")
    assert same(load_orbax(tmp_path / "headed"), load_folder(headed_folder))
    ours, theirs = sled.load(tmp_path / "headed", dtype="bfloat16"), sled.load(headed_folder, dtype="bfloat16")
    assert digest_of_weights(ours.params) == digest_of_weights(theirs.params) and ours.text.digest == theirs.text.digest


def test_a_stacked_decoder_is_saved_as_its_separate_form(decoder, tmp_path):
    assert same(load_orbax(save_orbax(decoder.stack(), tmp_path / "saved")), decoder)


def test_orbax_folders_that_do_not_fit_are_refused(decoder, tmp_path):
    folder = save_orbax(decoder, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_orbax(decoder, folder)
    written = json.loads((folder / "config.json").read_text())
    for changes, words in (({"num_hidden_layers": 4}, "layers/3/.* is missing"),
                           ({"num_hidden_layers": 2}, "layers/2/.* is not accounted for"),
                           ({"vocab_size": 48}, r"embedding/weight has shape \(47, 16\), not \(48, 16\)")):
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
    expected = sled.load(tmp_path / "model").generate(PROMPTS[1], max_new_tokens=NEW).tokens[0]
    for early in ({}, {"assistant_early_exit": 1}):
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **early)
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


# Training runs and the card


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
    serving = bind(LM(decoder), exits=sled.EarlyExit(1), fusion=sled.SLED(), schedule=None, sampling=sled.Sampling(),
                   max_new_tokens=8, stop=())
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


# Programs


@pytest.fixture(scope="module")
def programs(request, headed_folder, plain_folder, tmp_path_factory):
    """Each way as a program's folder, run in a process of its own; what it said, by way and number of the call."""
    root = tmp_path_factory.mktemp("programs")
    calls = {}
    for name, way in WAYS.items():
        if name == "plain" and not request.config.getoption("--exhaustive"):
            continue
        export_program(headed_folder if name == "early" else plain_folder, root / name, **way)
        numbers = {f"sampling.{field}": value for field, value in WARM.items()}
        if name == "early":
            numbers["exits.threshold"] = MIXED
        calls[str(root / name)] = [dict(prompts=PROMPTS, max_new_tokens=NEW, seed=3, numbers=numbers),
                                   dict(prompts=PROMPTS[:1] if name == "speculation" else PROMPTS, max_new_tokens=NEW)]
    np.save(root / "hidden.npy", hidden_states())
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(calls), root / "hidden.npy"], check=False,
                          capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {"root": root, **{Path(name).name: said for name, said in found.items()}}


def hidden_states():
    return np.random.default_rng(0).standard_normal((2, 1, CONFIG.width)).astype(np.float32)


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.exhaustive), "early", "speculation"])
def test_a_program_says_what_the_library_says(name, programs, headed_folder, plain_folder):
    lm = sled.load(headed_folder if name == "early" else plain_folder)
    way = WAYS[name]
    sampled, greedy = dict(way), dict(way)
    if name == "early":
        sampled["exits"] = dataclasses.replace(way["exits"], threshold=jnp.array(MIXED))
        greedy["exits"] = dataclasses.replace(way["exits"], threshold=jnp.array([[0.1]] * 3))
    warm = lm.generate(PROMPTS, max_new_tokens=NEW, sampling=sled.Sampling(**WARM), seed=3, **sampled)
    cold = lm.generate(PROMPTS, max_new_tokens=NEW, **greedy)
    for said, out in zip(programs[name], (warm, cold), strict=True):
        count = len(said)  # one row of three, where the program ran it alone
        assert [tokens for tokens, _ in said] == out.tokens[:count]
        assert [layers for _, layers in said] == out.exit_layers[:count]
    depths = {layer for out in (warm, cold) for row in out.exit_layers for layer in row}
    assert depths == ({3} if name == "plain" else {1, 3})


def test_the_fused_step_is_the_fusion(programs, decoder):
    expected = sled.ClampOnly(scale=np.array([5, 9]), max_scale=16).logits(
        hidden_states(), SharedHead(decoder.head_weight))
    np.testing.assert_allclose(programs["fuse"], expected, rtol=1e-6, atol=1e-5)


def test_wrong_numbers_are_named_in_python_and_at_the_command(programs):
    assert programs["refused"][:2] == ["fusion.scale must be from 1 to 16, its bound at export",
                                       "fusion.scale is 'abc', but must be a number"]
    assert "no numbers called ['nosuch']; there are " in programs["refused"][2] and programs["code"] == 2


@pytest.mark.parametrize(("heads", "norm_early", "states"), [
    (ExitHeads((1,), "affine"), False, ["head", "raw", "normed"]),
    (ExitHeads((2,), "mlp"), True, ["normed", "head", "normed"]),
    (ExitHeads((1, 2), "norm", tied=False), False, ["raw", "raw", "normed"]), (None, True, ["normed"] * 3),
], ids=["affine", "mlp", "untied", "none"])
def test_the_fused_step_takes_states_in_the_form_that_it_says(heads, norm_early, states):
    lm = LM(stirred(random_decoder(heads)) if heads else random_decoder(), Tokenizer(None, "m"), name="m")
    network, fusion = lm.build(lm.params), sled.SLED(layers=(1, 2), scale=5, norm_early=norm_early)
    parts = take_apart("fusion", fusion, {})
    traced = trace_step(lm, parts, {})
    assert traced.about["layers"] == [1, 2, 3] and traced.about["states"] == states
    hidden = network.hidden_states(jnp.arange(6, 30)[None])[:, 0]
    forms = {"raw": lambda n: hidden[n], "normed": lambda n: network.normalise(hidden[n]),
             "head": lambda n: network.exit_head(n).read(hidden[n])}
    given = jnp.stack([forms[form](n) for n, form in enumerate(states, 1)], axis=1)
    numbers = {name: np.broadcast_to(number.default, (len(given), *number.default.shape))
               for name, number in parts.numbers.items()}
    said = jax.export.deserialize(bytearray(traced.data)).call(network.head_weight, numbers, given)["logits"]
    np.testing.assert_allclose(said, fuse(network, fusion, dict(enumerate(hidden)), 3), rtol=1e-5, atol=1e-5)
    other = given.at[:, 0].set(hidden[1] if states[0] != "raw" else network.normalise(hidden[1]))
    swapped = fusion.logits(other, SharedHead(network.head_weight))
    assert not np.allclose(said, swapped, rtol=1e-2, atol=1e-2)  # the form matters


def test_a_program_describes_itself(programs, decoder):
    about = json.loads((programs["root"] / "speculation" / "program.json").read_text())
    whole = about["programs"]["generate"]
    assert whole["platforms"] == ["cpu", "cuda", "tpu"]
    arguments = {line["name"]: (line["dtype"], line["shape"]) for line in whole["arguments"]}
    assert arguments["prompts/tokens"] == ("int32", ["b", "s"]) and arguments["prompts/seeds"] == ("uint32", ["b"])
    assert arguments["weights/layers.0.mlp.up.weight"] == ("float32", [16, 24])
    assert arguments["weights/settings.exits.vocabulary"][1] == [44]
    assert whole["arguments"][0]["name"].startswith("weights/")
    assert about["numbers"]["exits.draft"] == {"dtype": "int32", "rows": True, "shape": [], "default": 2, "most": 3}
    assert about["numbers"]["schedule.rows"]["rows"] is False and about["stop_ids"] == [5]
    assert about["weights"]["sha256"] == digest_of_weights(nnx.state(decoder))
    assert about["programs"]["fuse"]["projection"] == "embedding.weight" and about["exit_heads"] is None
    headed = json.loads((programs["root"] / "early" / "program.json").read_text())
    assert headed["exit_heads"] == {"layers": [1, 2], "kind": "affine", "tied": True}
    assert headed["programs"]["fuse"]["states"] == ["raw", "head", "head", "normed"]
    weights = load_file(programs["root"] / "speculation" / "weights.safetensors")
    assert {f"weights/{name}" for name in weights} <= arguments.keys()
    assert (programs["root"] / "speculation" / "generate.jax_export").stat().st_size < 400_000  # no weights in it


def test_a_large_vocabulary_is_streamed_whatever_the_batch():
    from sled.fusion import default_tile

    b, = jax.export.symbolic_shape("b")
    assert default_tile(3 * b, 8192) is None and default_tile(3 * b, 8193) == 8192
    traced = _export("fuse", lambda w, h: {"logits": sled.SLED().logits(h, SharedHead(w, tile=8192))}, {
        "projection": jax.ShapeDtypeStruct((9000, 8), "float32"),
        "hidden": jax.ShapeDtypeStruct((b, 3, 8), "float32")})
    assert traced.about["results"] == [{"name": "logits", "dtype": "float32", "shape": ["b", 9000]}]


def test_a_program_takes_no_settings_by_row(plain_folder, tmp_path):
    with pytest.raises(SettingError, match=r"SLED.rate is an array .* when it runs"):
        export_program(plain_folder, tmp_path / "program", fusion=sled.SLED(rate=np.array([1.0, 2.0])))
    with pytest.raises(SettingError, match=r"EarlyExit\.layers"):
        export_program(plain_folder, tmp_path / "program", exits=sled.EarlyExit(3))
    assert not any(tmp_path.iterdir())


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
    (to / "mine.txt").touch()
    with pytest.raises(CheckpointError, match=r"also holds mine\.txt, which would go"), replacing(to):
        pass
    (to / "mine.txt").unlink()
    for mine in ("weights/mine/notes.txt", "weights/notes.txt", "own/config.json"):
        (to / mine).parent.mkdir(parents=True)
        (to / mine).touch()
        with pytest.raises(CheckpointError, match=rf"also holds {mine}, which would go"), replacing(to):
            pass
        shutil.rmtree(to / mine.partition("/")[0])
    (to / "sled_export.json").write_text('{"somebody": "else"}')
    with pytest.raises(CheckpointError, match=r"no earlier export \(it holds sled_export"), replacing(to):
        pass
    with pytest.raises(CheckpointError, match="is a file"), replacing(to / "two.safetensors"):
        pass
    with pytest.raises(SettingError, match="cannot be written"), replacing(Path("/proc/nothing/here")):
        pass


@pytest.mark.parametrize("arguments, words", [
    (["{empty}"], "neither a training run's folder"),
    (["nowhere"], "'nowhere' is not a folder here"),
    (["demo", "--step", "3"], "demo is no training run"),
    (["demo", "--form", "orbax", "--license", "mit"], "--license has no meaning for --form orbax"),
    (["demo", "--fusion", "sled"], "--fusion has no meaning for --form hf"),
    (["demo", "--margin", "2"], "Card.margin is 2.0"),
    (["demo", "--license", " "], "Card.license is empty"),
    (["{run}", "--step", "9"], "no checkpoint of step 9"),
])
def test_the_command_says_what_it_refuses(arguments, words, run_folder, tmp_path, capsys):
    arguments = [argument.format(empty=tmp_path, run=run_folder) for argument in arguments]
    assert main(["export", *arguments, "--to", str(tmp_path / "to")]) == 1
    assert words in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_command_writes_every_form(run_folder, tmp_path, capsys):
    call = functools.partial(lambda *arguments: main(["export", str(run_folder), *arguments]))
    assert call("--to", str(tmp_path / "hf"), "--dtype", "bfloat16") == 0
    assert load_folder(tmp_path / "hf").embedding.weight.dtype == jnp.bfloat16
    assert call("--to", str(tmp_path / "orbax"), "--form", "orbax") == 0
    assert call("--to", str(tmp_path / "program"), "--form", "program", "--fusion", "average", "--step", "1") == 0
    about = json.loads((tmp_path / "program" / "program.json").read_text())
    assert about["source"] == {"source": run_folder.name, "step": 1}
    assert about["settings"]["fusion"]["kind"] == "sled.LayerAverage" and about["tokenizer"] == "tokenizer.json"
    assert "the program export is in" in capsys.readouterr().err
