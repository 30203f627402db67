"""What test_train_trainer.py runs in processes of its own: `sled.train.trainer.train` on a tiny model and a few texts.

    python training_runs.py serve                       forks a process for every line of input; see killable.py
    python training_runs.py meshes DATA OUT NAME...     on 8 devices, on each of these `MESHES`
    python training_runs.py two ADDRESS INDEX DATA OUT  one of two processes

DATA is a folder with train.jsonl and held_out.jsonl.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from sled.cli import main
from sled.errors import SettingError
from sled.models import ExitHeads
from sled.models.sharding.mesh import Mesh
from sled.settings.decorator import settings
from sled.settings.field import setting
from sled.train.data.sources import Source
from sled.train.initial_model import NewModel
from sled.train.objective.exit_weights import Rotational, UniformWeights, WeightedExits
from sled.train.objective.layer_dropout import LayerDropout
from sled.train.parallel.distributed import Processes, initialize
from sled.train.recipes import Recipe, named
from sled.train.trainer import TrainingRun, train

MODEL = NewModel(layers=3, width=32, heads=4, mlp_width=64, vocabulary=320)
RECIPE = Recipe(steps=30, batch=8, context=64, exits=WeightedExits(UniformWeights(), Rotational(2)), warmup=2,
                dropout=LayerDropout(0.3, rescale=False), schedule="constant", learning_rate=1e-2)
MESHES = {"alone": Mesh(), "data": Mesh(data=8, fsdp=1), "fsdp": Mesh(), "tensor": Mesh(data=2, fsdp=1, tensor=4),
          "all": Mesh(data=2, fsdp=2, tensor=2)}


def run_of(folder, data, *, model=MODEL, mesh=MESHES["alone"], save_every=1, **changes) -> TrainingRun:
    """A run into `folder`; `changes` are of the recipe."""
    data = Path(data)
    return TrainingRun(Path(folder), model, Source(data / "train.jsonl"), dataclasses.replace(RECIPE, **changes),
                       Source(data / "held_out.jsonl"), mesh=mesh, save_every=save_every, keep=40, log_every=1,
                       held_out_rows=8)


def one(folder: str, data: str, width: int = MODEL.width, **changes) -> None:
    """Trains; changes: `save_every`, or of the recipe."""
    train(run_of(folder, data, model=dataclasses.replace(MODEL, width=width), **changes))


def tune(folder: str, data: str, model: str, layers: list[int], steps: int) -> None:
    """Tunes new exit heads of the model in a folder."""
    recipe = named("tune-exits", steps=steps, batch=8, context=64, warmup=2, learning_rate=1e-2, schedule="constant")
    train(dataclasses.replace(run_of(folder, data, model=model), recipe=recipe, heads=ExitHeads(tuple(layers), "mlp")))


def command(arguments: list[str]) -> None:
    """What `sled` does with these arguments."""
    raise SystemExit(main(arguments))


def remember_programs(data) -> None:
    """Compiled programs are kept in a folder, as compiling takes longer than training here."""
    jax.config.update("jax_compilation_cache_dir", str(Path(data) / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def on_meshes(data, out, *names) -> None:
    remember_programs(data)
    devices = jax.devices()
    for name in names:
        mesh = _OneOf(devices) if name == "alone" else MESHES[name]
        run = run_of(Path(out) / name, data, mesh=mesh, save_every=1000, steps=20, learning_rate=3e-3,
                     dropout=LayerDropout(0.3, schedule=Later(10), rescale=False))
        train(run if name in ("alone", "all") else dataclasses.replace(run, held_out=None))


@settings
class Later:
    """Layer dropout that begins at a step."""

    begins: int = setting(traced=True)

    def share(self, step):
        return jnp.where(step < self.begins, 0.0, 1.0)


class _OneOf(Mesh):
    """A mesh of one device, where there are more."""

    def __init__(self, devices):
        super().__init__()
        object.__setattr__(self, "_devices", devices[:1])

    def build(self, devices=None):
        return super().build(self._devices)


def in_two_processes(address, index, data, out) -> None:
    initialize(Processes(coordinator=address, count=2, index=int(index)))
    remember_programs(data)
    own = Path(out) / f"data{index}"
    own.mkdir()
    for name in ("train.jsonl", "held_out.jsonl"):
        lines = (Path(data) / name).read_text().splitlines()
        (own / name).write_text("\n".join(lines[int(index) if name == "train.jsonl" else 0:]))
    unlike = run_of(Path(out) / "unlike", own)
    for number, run in enumerate((unlike, dataclasses.replace(unlike, save_every=2 + int(index)),
                                  dataclasses.replace(unlike, folder=data))):
        try:
            train(run)
        except SettingError as error:
            (own / f"said{number}.txt").write_text(str(error))
    for steps in (4, 8):
        train(run_of(Path(out) / "two", data, save_every=4, steps=steps))
    jax.distributed.shutdown()


if __name__ == "__main__":
    call, *arguments = sys.argv[1:]
    if call == "serve":
        from killable import serve

        remember_programs(arguments[0])
        serve({"train": one, "tune": tune, "command": command})
    else:
        {"meshes": on_meshes, "two": in_two_processes}[call](*arguments)
