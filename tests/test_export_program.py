"""Programs: they run without this library, and give what it gives."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_folders import CONFIG, PROMPTS, random_decoder
from flax import nnx
from headed_models import stirred
from safetensors.numpy import load_file

import sled
from sled.decoding.readout import Readout
from sled.errors import SettingError
from sled.export.forms import export_program
from sled.export.program import _export, take_apart, trace_step
from sled.export.run_program import Program
from sled.fusion import SharedHead
from sled.lm import LM
from sled.models import ExitHeads
from sled.models.digest import digest_of_weights
from sled.text.tokenizer import Tokenizer

pytest_plugins = ["export_folders"]

NEW = 12
MIXED = [[0.05], [1], [0.2]]  # thresholds of each row
WARM = dict(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.05)
WAYS = {
    "plain": dict(fusion=sled.DoLa(layers="high")),
    "early": dict(fusion=sled.SLED(), exits=sled.EarlyExit(1, 0.1, max_deferred=1), schedule=sled.Gather(2, 3)),
    "speculation": dict(exits=sled.SelfSpeculation(1, draft=2, max_draft=3, vocabulary=np.arange(3, 47)),
                        fusion=sled.ClampOnly(scale=7)),
}
WRONG = [  # arguments, with what is said of them
    *((dict(numbers={name: value}), says) for name, value, says in (
        ("fusion.scale", 17, "fusion.scale is 17, but must be from 1 to 16, its bounds at export"),
        ("fusion.scale", "abc", "fusion.scale is 'abc', but must be a number"),
        ("nosuch", 1, "no numbers called ['nosuch']; there are "),
        ("fusion.scale", 2.5, "must be a whole number"), ("fusion.scale", True, "must be a number"),
        ("fusion.scale", [[1], [2]], "has shape [2, 1], but must have [1]"), ("exits.draft", 4, "must be from 1 to 3"),
        ("fusion.lower_bound", float("nan"), "must be from -inf"), ("fusion.lower_bound", -1e39, "is -inf in float32"),
        ("sampling.temperature", 1e-9, "must be 0 or from 1e-06 to 1e+06"), ("sampling.top_p", 0, "from 1.17549e-38"),
        ("sampling.repetition_penalty", 1e39, "must be from 1e-06"), ("fusion.scale", None, "must be a number"))),
    *((dict(prompts=prompts), says) for prompts, says in (
        ([], "no prompt"), ([[]], "prompt 0 has 0 tokens"), ("ab", "prompts is 'ab', but must be a list"),
        ([7], "prompt 0 is 7, but must be a list"), ([[7.0]], "a token id of prompt 0 is 7.0"), ([[-1]], "is -1, but"),
        ([[10**9]], "must be a whole number from 0 to"), ([[True]], "a token id of prompt 0 is True"))),
    (dict(max_new_tokens=-1), "max_new_tokens is -1"), (dict(max_new_tokens=10**12), "max_new_tokens is 1000000000000"),
    (dict(max_new_tokens=1.5), "max_new_tokens is 1.5"), (dict(seed=-1), "seed is -1"),
    (dict(seed=2**32), "seed is 4294967296"),
    (dict(stop_ids=5), "stop_ids is 5, but must be a list"), (dict(stop_ids=[2**31]), "a stop id is 2147483648"),
    (dict(hidden=[[1.0]]), "hidden has shape [1, 1]"), (dict(hidden="a"), "hidden has shape []"),
    (dict(hidden=[[[float("nan")] * CONFIG.width]]), "hidden has values that are not finite"),
]
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
for wrong in json.loads(sys.argv[3]):
    try:
        program.fuse(wrong["hidden"]) if "hidden" in wrong else program.generate(**{"prompts": [[7]], **wrong})
        found["refused"].append(None)
    except ValueError as error:
        found["refused"].append(str(error))
sys.argv = ["run.py", "7", "--ids", "--set", "fusion.scale=abc"]
try:
    run.main()
except SystemExit as end:
    found["code"] = end.code
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def programs(request, headed_folder, plain_folder, tmp_path_factory):
    """Each way as a program's folder, run in a process of its own; what it said, by way and number of the call."""
    root = tmp_path_factory.mktemp("programs")
    calls = {}
    for name, way in WAYS.items():
        if name == "plain" and not request.config.getoption("--exhaustive"):
            continue
        export_program(headed_folder if name == "early" else plain_folder, root / name, sled.Decoding(**way))
        numbers = {f"sampling.{field}": value for field, value in WARM.items()}
        if name == "early":
            numbers["exits.threshold"] = MIXED
        calls[str(root / name)] = [dict(prompts=PROMPTS, max_new_tokens=NEW, seed=3, numbers=numbers),
                                   dict(prompts=PROMPTS[:1] if name == "speculation" else PROMPTS, max_new_tokens=NEW)]
    np.save(root / "hidden.npy", hidden_states())
    wrong = json.dumps([arguments for arguments, _ in WRONG])
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(calls), root / "hidden.npy", wrong], check=False,
                          capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {"root": root, **{Path(name).name: said for name, said in found.items()}}


def hidden_states():
    return np.random.default_rng(0).standard_normal((2, 1, CONFIG.width)).astype(np.float32)


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.exhaustive), "early", "speculation"])
def test_a_program_says_what_the_library_says(name, programs, headed_folder, plain_folder):
    lm, way = sled.load(headed_folder if name == "early" else plain_folder), WAYS[name]
    at = lambda threshold: {} if name != "early" else {"exits": dataclasses.replace(  # noqa: E731
        way["exits"], threshold=jnp.array(threshold))}
    warm = lm.generate(PROMPTS, max_new_tokens=NEW, sampling=sled.Sampling(**WARM), seed=3, **way | at(MIXED))
    cold = lm.generate(PROMPTS, max_new_tokens=NEW, **way | at([[0.1]] * 3))
    for said, out in zip(programs[name], (warm, cold), strict=True):
        count = len(said)  # one row of three, where the program ran it alone
        assert [tokens for tokens, _ in said] == out.tokens[:count]
        assert [layers for _, layers in said] == out.exit_layers[:count]
    depths = {layer for out in (warm, cold) for row in out.exit_layers for layer in row}
    assert depths == ({3} if name == "plain" else {1, 3})


def test_the_fused_step_is_the_fusion(programs, decoder):
    expected = sled.ClampOnly(scale=np.array([5, 9]), max_scale=16).logits(
        hidden_states(), decoder.shared_head)
    np.testing.assert_allclose(programs["fuse"], expected, rtol=1e-6, atol=1e-5)


def test_wrong_numbers_are_named_in_python_and_at_the_command(programs):
    for (wrong, says), said in zip(WRONG, programs["refused"], strict=True):
        assert said is not None and says in said, (wrong, said)
    assert programs["code"] == 2


@pytest.mark.parametrize("damage", [
    lambda folder: flip(folder / "weights.safetensors"), lambda folder: flip(folder / "generate.jax_export"),
    lambda folder: change(folder, "weights", "file", "../weights.safetensors"),
    lambda folder: change(folder, "weights", "file", "gone.safetensors"),
    lambda folder: change(folder, "weights", "sha256", "0" * 64), lambda folder: change(folder, "weights", "file", 3),
    lambda folder: (folder / "program.json").write_text("[" * 10**5), lambda folder: change(folder, "format", None, 2),
    lambda folder: (folder / "program.json").write_text("{}"), lambda folder: (folder / "weights.safetensors").unlink(),
    lambda folder: (folder / "program.json").unlink(), lambda folder: change(folder, "weights", None, "x"),
])
def test_a_changed_file_is_refused(damage, programs, tmp_path):
    folder = shutil.copytree(programs["root"] / "speculation", tmp_path / "program")
    damage(folder)
    with pytest.raises(ValueError, match=r"was changed or damaged|cannot be used .*; copy the folder again"):
        Program(folder).call("generate")


def flip(file: Path) -> None:
    """One bit of a file's last number."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def change(folder: Path, name: str, within: str | None, value) -> None:
    about = json.loads((folder / "program.json").read_text())
    if within is None:
        about[name] = value
    else:
        about[name][within] = value
    (folder / "program.json").write_text(json.dumps(about))


@pytest.mark.parametrize(("heads", "norm_early", "states"), [
    (ExitHeads((1,), "affine"), False, ["head", "raw", "normed"]),
    (ExitHeads((2,), "mlp"), True, ["normed", "head", "normed"]),
    (ExitHeads((1, 2), "norm", tied=False), False, ["raw", "raw", "normed"]), (None, True, ["normed"] * 3),
], ids=["affine", "mlp", "untied", "none"])
def test_the_fused_step_takes_states_in_the_form_that_it_says(heads, norm_early, states):
    lm = LM(stirred(random_decoder(heads)) if heads else random_decoder(), Tokenizer(None, "m"), name="m")
    network, fusion = lm.build(lm.params), sled.SLED(layers=(1, 2), scale=5, norm_early=norm_early)
    parts = take_apart("fusion", fusion, {})
    traced = trace_step(lm, parts)
    assert traced.about["layers"] == [1, 2, 3] and traced.about["states"] == states
    hidden = network.hidden_states(jnp.arange(6, 30)[None])[:, 0]
    forms = {"raw": lambda n: hidden[n], "normed": lambda n: network.normalise(hidden[n]),
             "head": lambda n: network.exit_head(n).read(hidden[n])}
    given = jnp.stack([forms[form](n) for n, form in enumerate(states, 1)], axis=1)
    numbers = {name: np.broadcast_to(number.default, (len(given), *number.default.shape))
               for name, number in parts.numbers.items()}
    said = jax.export.deserialize(bytearray(traced.data)).call(network.shared_head.w_VD, numbers, given)["logits"]
    np.testing.assert_allclose(said, Readout(network).fuse(fusion, dict(enumerate(hidden)), 3), rtol=1e-5, atol=1e-5)
    other = given.at[:, 0].set(hidden[1] if states[0] != "raw" else network.normalise(hidden[1]))
    swapped = fusion.logits(other, network.shared_head)
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
    assert about["numbers"]["exits.draft"] == {"dtype": "int32", "rows": True, "shape": [], "default": 2, "from": 1,
                                               "to": 3}
    assert about["numbers"]["schedule.rows"]["rows"] is False and about["stop_ids"] == [5]
    assert about["weights"]["parameters_sha256"] == digest_of_weights(nnx.state(decoder))
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
        export_program(plain_folder, tmp_path / "program", sled.Decoding(sled.SLED(rate=np.array([1.0, 2.0]))))
    with pytest.raises(SettingError, match=r"EarlyExit\.layers"):
        export_program(plain_folder, tmp_path / "program", sled.Decoding(exits=sled.EarlyExit(3)))
    assert not any(tmp_path.iterdir())
