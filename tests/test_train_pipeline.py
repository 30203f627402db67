"""Training as a pipeline of stages gives what one device gives; how rows are cut, and what cannot be."""

import pytest
from jax.sharding import PartitionSpec as P
from programs import on_devices, run_together

from sled.errors import SettingError
from sled.models import DecoderConfig
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.sharding import Sharding
from sled.train.parallel.pipeline import bubble, check_microbatches, layers_of_stages

CONFIG = DecoderConfig("llama", vocab_size=96, width=16, mlp_width=32, num_layers=6, num_heads=4, num_kv_heads=2,
                       head_dim=8, max_positions=64)


@pytest.mark.parametrize("meshes", [["all"], pytest.param(["two", "four", "all"], marks=pytest.mark.exhaustive)],
                         ids=" ".join)
def test_a_pipeline_trains_as_one_device_does(meshes, write_model, tmp_path):
    """Losses of whole runs with exits, their curriculum, layer dropout and heads; gradients; other stages on resuming.
    """
    folder = write_model(tmp_path / "model", "llama", num_hidden_layers=6)
    run_together([(on_devices(8, XDG_CACHE_HOME=str(tmp_path / "cache")),
                   ["mesh_of_stages.py", folder, tmp_path / "out", *meshes])])


@pytest.mark.parametrize("rows, stages, count", [(32, 4, 16), (32, 8, 32), (8, 4, 8), (12, 2, 6), (7, 2, 7), (1, 4, 1)])
def test_microbatches_divide_the_rows(rows, stages, count):
    assert check_microbatches(None, rows, stages) == count
    assert check_microbatches(1, rows, stages) == 1


@pytest.mark.parametrize("stages, microbatches, layers, share", [
    (1, 8, 5, 0), (4, 4, 8, 3 / 7), (4, 12, 4, 1 / 5), (3, 8, 16, 1 - 8 * 16 / (10 * 18))])
def test_the_bubble_is_the_share_of_turns_without_work(stages, microbatches, layers, share):
    assert bubble(stages, microbatches, layers) == pytest.approx(share)
    own, turns = layers_of_stages(stages, layers), microbatches + stages - 1
    assert len(own) == stages and sum(own) == layers
    busy = sum(own[stage] for stage in range(stages) for turn in range(turns) if 0 <= turn - stage < microbatches)
    assert 1 - busy / (max(own) * stages * turns) == pytest.approx(share)


@pytest.mark.parametrize("make, says", [
    (lambda: check_microbatches(3, 8, 2), "microbatches is 3, which does not divide the 8 rows"),
    (lambda: Sharding(CONFIG, Mesh(stage=8).abstract(8)), "Mesh.stage is 8, but the model has 6 layers; give at most"),
    (lambda: Mesh(stage=0), r"Mesh\.stage is 0"),
])
def test_pipelines_that_cannot_be_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


def test_stages_share_layers_and_vocabulary():
    even = Sharding(CONFIG, Mesh(fsdp=2, stage=2, tensor=2).abstract(8))
    assert even.parameters["layers.mlp.up.weight"][1] == P("stage", "fsdp", "tensor")
    assert even.parameters["embedding.weight"][1] == P(("stage", "tensor"), "fsdp") and not even.undivided
    uneven = Sharding(CONFIG, Mesh(fsdp=2, stage=4).abstract(8))
    assert uneven.undivided == {"layers": "6 layers do not divide over stage 4"}
    assert uneven.parameters["layers.mlp.up.weight"][1] == P(None, ("fsdp", "stage"), "tensor")
