"""Runs of test_train_trainer.py in processes of their own: `sled.train.trainer.train` on a tiny model and a few texts.

    python training_runs.py serve DATA                         forks a process for every line of input
    python training_runs.py two DATA ADDRESS INDEX FOLDER OUT  one of two processes

DATA is a folder with train.jsonl and held_out.jsonl, FOLDER one with a model.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

import sled.models.stored
from sled.cli import main
from sled.errors import SettingError
from sled.models import save_folder
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.sharding import Sharding
from sled.train.data.sources import Source
from sled.train.initial_model import NewModel
from sled.train.objective.exit_weights import Rotational, UniformWeights, WeightedExits
from sled.train.objective.layer_dropout import LayerDropout
from sled.train.parallel.distributed import Processes, initialize
from sled.train.recipes import Recipe
from sled.train.run.checkpoint import complete_steps
from sled.train.trainer import TrainingRun, train

ALL = Mesh()
MODEL = NewModel(layers=3, width=32, heads=4, mlp_width=64, vocabulary=320)
RECIPE = Recipe(steps=30, batch_size=8, context=64, exits=WeightedExits(UniformWeights(), Rotational(2)), warmup=2,
                dropout=LayerDropout(0.3, rescale=False), schedule="constant", learning_rate=1e-2)


class _OneOf(Mesh):
    """A mesh of one device, where there are more."""

    def build(self, devices=None):
        return super().build(jax.devices()[:1])


MESHES = {"alone": _OneOf(), "data": Mesh(data=8, fsdp=1), "fsdp": Mesh(), "tensor": Mesh(data=2, fsdp=1, tensor=4),
          "all": Mesh(data=2, fsdp=2, tensor=2)}


def run_of(folder, data, *, model=MODEL, mesh=ALL, save_every=1, **changes) -> TrainingRun:
    """A run into `folder`; `changes` are of the recipe."""
    data = Path(data)
    return TrainingRun(Path(folder), model, Source(data / "train.jsonl"), dataclasses.replace(RECIPE, **changes),
                       Source(data / "held_out.jsonl"), mesh=mesh, save_every=save_every, keep=40, log_every=1,
                       held_out_rows=8)


def one(data: str, folder: str, width: int = MODEL.width, **changes) -> None:
    """Trains; changes: `save_every`, or of the recipe."""
    train(run_of(folder, data, model=dataclasses.replace(MODEL, width=width), **changes))


def command(arguments: list[str]) -> None:
    """What `sled` does with these arguments."""
    raise SystemExit(main(arguments))


def remember_programs(data) -> None:
    """Compiled programs are kept in a folder, as compiling takes longer than training here."""
    jax.config.update("jax_compilation_cache_dir", str(Path(data) / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


ASKED = []  # the name and the number of elements of everything that was read through `counted_open`


@contextlib.contextmanager
def counted_open(path, framework):
    """In place of `safe_open`."""
    with safetensors.safe_open(path, framework=framework) as file:
        yield SimpleNamespace(keys=file.keys, get_slice=lambda name: CountedSlice(name, file.get_slice(name)))


class CountedSlice:
    def __init__(self, name, inner):
        self.name, self.get_shape, self.get_dtype, self.read = name, inner.get_shape, inner.get_dtype, inner.__getitem__

    def __getitem__(self, index):
        part = self.read(index)
        ASKED.append((self.name, part.size))
        return part


def in_two_processes(data, address, index, folder, out) -> None:
    """Each loads and saves its part of a model; what they are given otherwise is refused; they train and resume."""
    data, folder, out, index = Path(data), Path(folder), Path(out), int(index)
    said = initialize(Processes(coordinator=address, count=2, index=index))
    assert said == f"process {index} of 2, coordinator {address}" and jax.device_count() == 2
    remember_programs(data)
    sled.models.stored.safe_open = counted_open
    decoder = load_onto(folder, Mesh().build())
    assert Sharding(decoder.config, Mesh().build()).local_rows(8) == slice(4 * index, 4 * index + 4)
    stored = load_file(folder / "model.safetensors")
    vectors = sum(array.size for array in stored.values() if array.ndim == 1)
    matrices = sum(array.size for array in stored.values()) - vectors
    assert sum(count for _, count in ASKED) == matrices // 2 + vectors
    saved = load_file(save_folder(decoder, out / "model") / "model.safetensors")
    assert saved.keys() == stored.keys() and all(np.array_equal(saved[name], stored[name]) for name in stored)
    own = out / f"data{index}"
    own.mkdir()
    for name in ("train.jsonl", "held_out.jsonl"):
        lines = (data / name).read_text().splitlines()
        (own / name).write_text("\n".join(lines[index if name == "train.jsonl" else 0:]))
    unlike = run_of(out / "unlike", own)
    for run, words in ((unlike, f"^data is not the same in process {index} and in process {1 - index}; start all"),
                       (dataclasses.replace(unlike, save_every=2 + index), f"^--save-every is not .* process {index}"),
                       (dataclasses.replace(unlike, folder=data), "but no run; give a new or empty folder")):
        with pytest.raises(SettingError, match=words):
            train(run)
    assert complete_steps(out / "unlike" / "checkpoints") == []
    for steps in (2, 4):
        train(run_of(out / "two", data, save_every=2, steps=steps))
    jax.distributed.shutdown()


def serve(calls) -> None:
    """Each line of standard input, `{"call": name, ...arguments}`, is answered by the number of a process that was
    forked for it and, once that has ended, by its exit status (as `subprocess` has it).

    Imports are done once, before forking, those that are elsewhere put off too; JAX starts no device, and so no thread,
    before that.
    """
    for name in ("datasets", "grain", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    for line in sys.stdin:
        arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                calls[arguments.pop("call")](**arguments)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    call, data, *arguments = sys.argv[1:]
    if call == "serve":
        remember_programs(data)
        serve({"train": functools.partial(one, data), "command": command})
    else:
        in_two_processes(data, *arguments)
