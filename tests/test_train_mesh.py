"""Meshes and what lies where on them; training over eight devices; how processes find each other."""

import dataclasses
import functools
import math
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from programs import on_devices, run_together
from safetensors.numpy import load_file

from sled.errors import CheckpointError, SettingError
from sled.models import DecoderConfig, ExitHeads, load_folder, read_config
from sled.models.layers import basic
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.mesh import Mesh, across_slices
from sled.models.sharding.sharding import LARGE, Sharding
from sled.models.stored import abstract, abstract_stacked
from sled.train.parallel import distributed
from sled.train.parallel.distributed import SLURM, Processes, initialize
from sled.train.parallel.memory_plan import memory_plan

LLAMA3 = dict(family="llama", vocab_size=128_256, num_kv_heads=8, head_dim=128, max_positions=8192)
LLAMA3_8B = DecoderConfig(width=4096, mlp_width=14_336, num_layers=32, num_heads=32, **LLAMA3)
LLAMA3_70B = DecoderConfig(width=8192, mlp_width=28_672, num_layers=80, num_heads=64, **LLAMA3)
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))


def parameters_of(config: DecoderConfig):
    return nnx.state(abstract_stacked(config), nnx.Param)


@pytest.mark.parametrize("meshes", [
    ("alone", "all"), pytest.param(("alone", "data", "fsdp", "tensor", "all"), marks=pytest.mark.exhaustive)], ids=str)
def test_eight_devices_do_what_one_does(meshes, tiny_folder, tmp_path):
    """The trainer's own steps on these meshes, and what is split besides."""
    run_together([(on_devices(8, XDG_CACHE_HOME=str(tmp_path / "cache")),
                   ["mesh_of_eight.py", tiny_folder("llama"), tmp_path, *meshes])])


# Meshes.

@pytest.mark.parametrize("mesh, devices, sizes", [
    (Mesh(), 8, (1, 8, 1, 1)), (Mesh(data=-1, fsdp=2, tensor=2), 8, (2, 2, 1, 2)),
    (Mesh(2, 2, 2), 8, (2, 2, 1, 2)), (Mesh(tensor=8), 8, (1, 1, 1, 8)), (Mesh(stage=4), 8, (1, 2, 4, 1)),
])
def test_sizes_of_a_mesh(mesh, devices, sizes):
    assert mesh.sizes(devices) == sizes
    assert tuple(mesh.abstract(devices).shape.values()) == sizes
    assert tuple(mesh.abstract(devices).shape) == ("data", "fsdp", "stage", "tensor")


@pytest.mark.parametrize("make, says", [
    (lambda: Mesh(fsdp=4).sizes(8), "Mesh.fsdp 4 takes 4 devices, but there are 8; give"),
    (lambda: Mesh(tensor=3).sizes(8), "Mesh.tensor 3 takes a multiple of 3 devices, but there are 8"),
    (lambda: Mesh(data=16, fsdp=-1).sizes(8), "Mesh.data 16 takes a multiple of 16 devices, but there are 8"),
    (lambda: Mesh(data=-1), "Mesh.data and Mesh.fsdp are -1, but only one"),
    (lambda: Mesh(tensor=0), r"Mesh\.tensor is 0, but must be a whole number of at least 1; .*-1 is what is left"),
    (lambda: Mesh(data=-2, fsdp=1), r"Mesh\.data is -2"),
    (lambda: across_slices((1, 1, 1, 8), 2), "2 slices, .*data 1, fsdp 1, stage 1, tensor 8.*; make data x .* of 2"),
    (lambda: Sharding(LLAMA3_8B, Mesh(fsdp=3).abstract(3)), "4096 columns of width do not divide over fsdp 3; choose"),
    (lambda: Sharding(LLAMA3_8B, Mesh(tensor=64).abstract(64)), "32 query heads do not divide over tensor 64"),
    (lambda: Sharding(LLAMA3_8B, Mesh(data=2).abstract(8)).local_rows(6), "6 rows does not divide .* fsdp = 8 groups"),
    (lambda: Processes(coordinator="a:1"), "Processes.count and Processes.index are missing: "),
    (lambda: Processes(count=2, index=0), "Processes.coordinator is missing: "),
    (lambda: Processes(coordinator="a", count=2, index=0), "coordinator is 'a', but must be host:port"),
    (lambda: Processes(coordinator="a:1", count=2, index=2), r"\.index is 2, but must be a whole number from 0 to 1"),
    (lambda: Processes(cluster="k8s"), "'k8s', but must be one of 'tpu', 'slurm'"),
    (lambda: Processes(cluster="tpu", coordinator="a:1", count=2, index=0), "give one of the two"),
])
def test_meshes_and_processes_that_cannot_be_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


def test_slices_are_crossed_by_the_outer_axes_alone():
    assert across_slices((4, 2, 1, 4), 2) == (2, 1, 1, 1)
    assert across_slices((2, 8, 1, 1), 4) == (2, 2, 1, 1)
    assert across_slices((1, 16, 1, 4), 8) == (1, 8, 1, 1)
    assert across_slices((1, 2, 4, 4), 4) == (1, 2, 2, 1)
    hosts = [Mock(id=i, slice_index=i // 4, process_index=i // 4, platform="gpu", device_kind="gpu")
             for i in (7, 0, 3, 5, 1, 2, 4, 6)]
    devices = Mesh(fsdp=2, tensor=4).build(hosts).devices
    assert [{device.slice_index for device in group} for group in devices.reshape(2, 4)] == [{0}, {1}]


# What lies where.

def place(name, shape):
    """Where a parameter lies: over tensor the columns of products before attention and activation, else the rows.

    Experts lie whole on every device, each matrix split as that of an MLP.
    """
    *_, module, kind = name.split(".")
    if "norm" in module:
        spec = (None,)
    elif module == "positions":
        spec = (None, "fsdp")
    elif module == "router":
        spec = ("fsdp", None) if kind == "weight" else (None,)
    elif module in ("embedding", "head", "o", "down"):
        spec = ("tensor", "fsdp") if kind == "weight" else (None,)
    else:
        spec = ("fsdp", "tensor") if kind == "weight" else ("tensor",)
    return P(*[None] * (len(shape) - len(spec)), *spec)


def test_every_variants_parameters_have_their_place(variant, tiny_folder):
    config = read_config(tiny_folder(variant))
    weights = parameters_of(config)
    sharding = Sharding(config, Mesh(data=2, fsdp=4, tensor=2).abstract(16))
    assert not sharding.undivided
    found = [sharding.parameter_at(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)]
    assert sorted(found) == sorted(sharding.parameters)
    flat = dict(nnx.to_flat_state(nnx.state(abstract(config), nnx.Param)))
    for name, (shape, spec) in sharding.parameters.items():  # the stacked shapes are those of the separate layers
        first, *rest = name.split(".")
        path = (first, 0, *rest) if first == "layers" else (first, *rest)
        assert shape == ((config.num_layers,) if first == "layers" else ()) + flat[path].shape
        assert spec == place(name, shape), name


@pytest.mark.parametrize("optimizer", [
    ADAM, optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), optax.MultiSteps(optax.adamw(1e-3), 4),
    optax.sgd(0.1, momentum=0.9), optax.contrib.muon(1e-3), optax.adafactor(1e-3)],
    ids=["adam", "injected", "accumulated", "momentum", "muon", "adafactor"])
def test_optimizer_state_lies_like_its_parameters(optimizer):
    sharding = Sharding(LLAMA3_8B, Mesh(fsdp=2, tensor=4).abstract(8))
    weights = parameters_of(LLAMA3_8B)
    state = jax.eval_shape(optimizer.init, weights)
    shardings = sharding.shardings(state)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    of_shape = dict(sharding.parameters.values())
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        if leaf.size * leaf.dtype.itemsize > LARGE:
            same_shape = [P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")]  # q and o are both D x D
            assert where.spec in ([of_shape[leaf.shape]] if leaf.shape[1:] != (4096, 4096) else same_shape)


def test_a_large_leaf_without_a_place_is_refused_not_copied():
    sharding = Sharding(LLAMA3_8B, Mesh().abstract(8))
    with pytest.raises(SettingError, match=r"\['lens'\] of shape \(33, 4096, 4096\) is no parameter of .* all 8 dev"):
        sharding.shardings({"lens": jax.ShapeDtypeStruct((33, 4096, 4096), jnp.float32)})
    small = sharding.shardings({"key": jax.eval_shape(lambda: jax.random.key(0)), "step": np.zeros((), np.int32)})
    assert {where.spec for where in jax.tree.leaves(small)} == {P()}


def test_a_layer_lies_alone_as_it_lies_among_the_stacked():
    config = dataclasses.replace(LLAMA3_8B, exit_heads=ExitHeads((8, 16), "mlp", tied=False))
    sharding = Sharding(config, Mesh(fsdp=2, tensor=4).abstract(8))
    weights = nnx.state(abstract(config), nnx.Param)
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(weights),
                                   jax.tree.leaves(sharding.shardings(weights)), strict=True):
        name = sharding.parameter_at(path, leaf.shape)
        assert where.spec == P(*sharding.parameters[name][1][name.startswith(("layers", "exit_heads")):])


@pytest.mark.parametrize("axes", [(), ("vector", "vector"), ("columns",)])
def test_a_parameter_whose_axes_have_no_names_is_named(axes, monkeypatch):
    monkeypatch.setattr(basic, "parameter", lambda array, *given: nnx.Param(
        array, axes=axes if given == ("vector",) else given))
    with pytest.raises(SettingError, match=r"the parameter layers\.attention_norm\.weight of shape \(32, 4096\) has "):
        _ = Sharding(LLAMA3_8B, Mesh().abstract(8)).parameters


def test_a_process_supplies_its_rows():
    sharding = Sharding(LLAMA3_8B, Mesh(fsdp=1).build(jax.devices()[:1]))
    assert sharding.local_rows(5) == slice(0, 5)
    np.testing.assert_array_equal(sharding.batch({"tokens": np.arange(10).reshape(5, 2)}, 5)["tokens"],
                                  np.arange(10).reshape(5, 2))
    with pytest.raises(SettingError, match=r"has shape \(4, 2\), but this process supplies rows 0 to 5 of 5"):
        sharding.batch(np.zeros((4, 2)), 5)


@pytest.mark.parametrize("name, dtype", [("qwen3-mha-biases-windows", None), ("llama-mha-tied", "bfloat16")])
def test_a_mesh_holds_what_plain_loading_gives(name, dtype, tiny_folder):
    plain = load_folder(tiny_folder(name), dtype=dtype).stack()
    placed = load_onto(tiny_folder(name), Mesh().build(jax.devices()[:1]), dtype=dtype)
    assert placed.config == plain.config and placed.num_layers == 3
    ours, theirs = (jax.tree.map(np.asarray, nnx.state(decoder)) for decoder in (placed, plain))
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), ours, theirs)


@pytest.mark.parametrize("name, tensor, value, says", [
    ("llama", "model.layers.1.mlp.up_proj.weight", np.nan, r"layers\.1\.mlp\.up_proj\.weight holds values that are no"),
    ("llama-mha-tied", "lm_head.weight", 1.0, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
])
def test_a_damaged_folder_is_refused_on_a_mesh_too(name, tensor, value, says, tmp_path, write_model, tiny_folder):
    weights = load_file(tiny_folder(name) / "model.safetensors")
    weights[tensor] = np.full(weights.get(tensor, weights["model.embed_tokens.weight"]).shape, value, np.float32)
    with pytest.raises(CheckpointError, match=says):
        load_onto(write_model(tmp_path / "model", name, weights), Mesh().build(jax.devices()[:1]))


# Bytes on each device.

@pytest.mark.parametrize("config, mesh, devices, parameters", [
    (LLAMA3_8B, Mesh(), 8, 8_030_261_248), (LLAMA3_70B, Mesh(fsdp=16, tensor=4), 64, 70_553_706_496),
    (LLAMA3_8B, Mesh(tensor=8), 32, 8_030_261_248),
])
def test_nothing_large_is_replicated(config, mesh, devices, parameters):
    made = memory_plan(Sharding(config, mesh.abstract(devices)), ADAM)
    assert sum(math.prod(share.shape) for share in made.shares) == parameters
    assert not made.undivided and made.other < 1000
    groups = mesh.abstract(devices).shape["data"]
    assert all("norm" in share.name for share in made.shares if share.copies > groups)
    assert 1 <= made.weights / (4 * parameters / devices) < 1.01
    assert 1 <= made.optimizer / (8 * parameters / devices) < 1.01


def test_what_stays_whole_is_reported():
    sharding = Sharding(LLAMA3_70B, Mesh(data=2, fsdp=8, tensor=16).abstract(256))
    assert sharding.undivided == {"kv_heads": "8 key/value heads do not divide over tensor 16"}
    made = memory_plan(sharding, ADAM)
    assert {share.name: share.copies for share in made.shares if share.copies > 2 and "norm" not in share.name} == {
        "layers.attention.k.weight": 32, "layers.attention.v.weight": 32}
    lines = made.text().splitlines()
    assert lines[0] == "On each of 256 devices (data 2 x fsdp 8 x tensor 16):"
    assert lines[-1] == "Left whole over tensor: 8 key/value heads do not divide over tensor 16."
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert ["layers.attention.k.weight", "80 x 8192 x 1024", "-, fsdp 8, -", "32", "320 MiB", "640 MiB"] in cells
    odd = DecoderConfig(**{**LLAMA3, "vocab_size": 50_257}, width=64, mlp_width=64, num_layers=1, num_heads=8)
    sharding = Sharding(odd, Mesh(fsdp=1, tensor=8).abstract(8))
    assert sharding.undivided == {"vocab": "50257 vocabulary entries do not divide over tensor 8"}
    assert sharding.parameters["head.weight"][1] == P(None, "fsdp")




# Processes.

@pytest.fixture
def joined(monkeypatch):
    """What jax is asked to join, in an environment without a cluster."""
    for name in (*SLURM, *distributed.TPU_HOSTS):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    return calls


def test_the_environment_tells_the_cluster(joined, monkeypatch):
    assert initialize() == "one process" and joined == []
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0")
    assert initialize() == "one process"
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    assert initialize().endswith(", tpu") and joined.pop()["cluster_detection_method"] is None
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(SettingError, match=r"lacks SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_LOCALID, .*; start .*srun"):
        initialize()
    for name in SLURM[:2] + SLURM[4:]:
        monkeypatch.setenv(name, "1")
    assert initialize().endswith(", slurm") and joined.pop()["cluster_detection_method"] == "slurm"


def test_a_cluster_that_is_not_there_is_said(joined, monkeypatch):
    def absent(**settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", absent)
    with pytest.raises(SettingError, match=r"no tpu cluster was found \(coordinator_address should be defined"):
        initialize(Processes(cluster="tpu"))
    monkeypatch.undo()
    jax.devices()
    with pytest.raises(SettingError, match="jax has already started its devices; call initialize before"):
        initialize(Processes(coordinator="localhost:1", count=1, index=0))
