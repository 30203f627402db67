"""`sled plan`: bytes on each device from shapes alone, held against sums by hand."""

import dataclasses
import json

import pytest
from published_configs import PUBLISHED
from published_sizes import whole

from sled.decoding.plan import decoding_plan
from sled.errors import SettingError
from sled.models.config import ExitHeads
from sled.models.families.registry import parse_config
from sled.models.sharding.mesh import Mesh

LLAMA_8B = whole(PUBLISHED["meta-llama/Llama-3.1-8B"])
LLAMA_70B = whole(PUBLISHED["meta-llama/Llama-3.3-70B-Instruct"])
PARAMETERS = {8: 8_030_261_248, 70: 70_553_706_496}


@pytest.mark.parametrize("size, fields, mesh, devices", [
    (8, LLAMA_8B, Mesh(tensor=8), 8), (70, LLAMA_70B, Mesh(data=8, tensor=8), 64)])
def test_nothing_large_lies_whole(size, fields, mesh, devices):
    """Weights are a share of all but for the norms; K/V a share of 8 rows of 8,192 positions."""
    config = parse_config(fields)
    plan = decoding_plan(config, mesh.abstract(devices), rows=8, context=8192, dtype="bfloat16")
    share = 2 * PARAMETERS[size] / 8
    norms = 2 * (2 * config.num_layers + 1) * config.width
    assert share <= plan.weights <= share + norms
    positions = 8 * 8193 * 8 // devices  # one more for tokens that are switched off; of the heads an eighth each
    assert plan.kv == 2 * config.num_layers * positions * config.num_kv_heads * config.head_dim * 2 // 8
    assert not plan.undivided and plan.total < plan.weights + plan.kv + 2**30


def test_a_vocabulary_is_filled_up_and_kv_heads_that_do_not_divide_lie_whole():
    config = parse_config(LLAMA_8B | dict(vocab_size=128_257, num_key_value_heads=4))
    plan = decoding_plan(config, Mesh(tensor=8).abstract(8), rows=3, context=100, dtype="float32")
    assert plan.logits == 3 * (128_264 // 8) * 4
    assert plan.kv == 2 * 32 * 3 * 101 * 4 * 128 * 4
    assert plan.undivided == {"kv_heads": "4 key/value heads do not divide over tensor 8"}


def test_stages_hold_some_layers_each_and_the_keys_and_values_of_all_batches():
    config = parse_config(LLAMA_70B)
    plan = decoding_plan(config, Mesh(fsdp=1, stage=4, tensor=8).abstract(32), rows=8, context=8192, dtype="bfloat16")
    tables = 2 * config.vocab_size * config.width
    layers = PARAMETERS[70] - tables - config.width
    norms = 2 * (2 * config.num_layers // 4 + 1) * config.width
    split = 2 * (layers // 4 + tables) / 8  # the tables lie on every stage
    assert split <= plan.weights <= split + norms
    with_heads = dataclasses.replace(config, exit_heads=ExitHeads((20,), "block"))
    assert decoding_plan(with_heads, Mesh(tensor=8).abstract(8), rows=8, context=8192, dtype="bfloat16").weights
    with pytest.raises(SettingError, match="look back"):
        decoding_plan(with_heads, Mesh(fsdp=1, stage=4).abstract(4), rows=8, context=8192, dtype="bfloat16")
    assert plan.batches == 4 and plan.copied == plan.kv // 4
    assert plan.kv == 2 * 80 // 4 * 4 * 8 * 8193 * 128 * 2  # of the 8 K/V heads one each


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def test_the_command_needs_no_weights_and_no_devices(command, folder):
    status, said, _ = command("plan", "-m", folder, "--devices", "8", "--tensor-parallel", "8")
    assert status == 0 and "8,030,261,248 parameters" in said
    assert "On each of 8 devices (tensor 8), 8 rows of 8,192 positions, bfloat16:" in said and "1.87 GiB" in said
    status, said, _ = command("plan", "-m", folder, "--devices", "8", "--pipeline-parallel", "8")
    assert status == 0 and "(stage 8), 8 rows of 8,192 positions, bfloat16, 8 such batches following each other" in said
    status, said, _ = command("plan", "-m", folder, "--devices", "64", "--pipeline-parallel", "4", "--train")
    assert status == 0 and "On each of 64 devices (fsdp 16 x stage 4):" in said and "stage 4, fsdp 16" in said


@pytest.mark.parametrize("options, says", [
    (["--devices", "8", "--fsdp", "8"], "--fsdp is 8, but has no meaning without --train"),
    (["--train", "--context", "9"], "--context is 9, but has no meaning with --train"),
    (["--devices", "8", "--tensor-parallel", "3"], "--tensor-parallel 3 takes a multiple of 3 devices"),
    (["--devices", "6", "--pipeline-parallel", "6"], "--pipeline-parallel is 6, which does not divide the model's 32"),
    (["--devices", "8", "--pipeline-parallel", "4"], "--pipeline-parallel 4 takes 4 devices, but there are 8"),
    (["--devices", "8", "--pipeline-parallel", "4", "--data-parallel", "2"], "stages decode for one group of rows"),
    (["--devices", "0"], "--devices is 0, but must be a whole number of at least 1"),
    (["--context", "200000"], "--context is 200000"),
    (["--devices", "64", "--pipeline-parallel", "64", "--train"], "--pipeline-parallel is 64, but the model has 32"),
])
def test_plans_that_cannot_be_are_refused(options, says, command, folder):
    status, _, errors = command("plan", "-m", folder, *options)
    assert status == 1 and says in errors, errors
