"""A model as a portable program: `jax.export` of its whole generation and of its fused step, the weights beside them.

    program.json         what the programs take and give, the settings' defaults, versions, the weights' digest
    generate.jax_export  prompts to tokens: prefill and the decoding loop; batch, room and stop ids of any size
    fuse.jax_export      hidden states of the candidate layers, and the projection, to the fusion's logits
    weights.safetensors  arguments of both, not part of them
    tokenizer.json       where the model has one
    run.py               runs it with jax, numpy, safetensors and flatbuffers, without this library

Types, layers and bounds of fusion and exits are fixed; all their numbers stay arguments, one for each row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from safetensors.numpy import save_file
from tqdm import tqdm

from sled.calibration.fingerprint import digest_of_weights
from sled.decoding.options import Decoding
from sled.decoding.readout import Readout
from sled.decoding.whole import generate
from sled.exits.schedule import Timing
from sled.export.settings import Parts, take_apart
from sled.export.target import versions
from sled.fusion.projection import fused_logits
from sled.io import json_numbers, write_json
from sled.lm import LM
from sled.settings.describe import describe

FORMAT = 2  # of program.json
ABOUT, WEIGHTS, RUN = "program.json", "weights.safetensors", "run.py"
PLATFORMS = ("cpu", "cuda", "tpu")


class Traced(NamedTuple):
    """An exported function: bytes that `jax.export.deserialize` takes, and what program.json says of it."""

    data: bytes
    about: dict[str, Any]


def save_program(lm: LM, folder: Path, decoding: Decoding, *, tokenizer_from: Path,
                 source: dict[str, Any]) -> None:
    """Writes the program that generates as `lm.generate` does with these settings into the empty folder `folder`.

    source: what the record says the model comes from.
    Raises SettingError for settings that the model cannot use, or that have an entry per row.
    """
    config, exits = lm.config, decoding.exits
    counts = {"E": len(exits.exits(config.num_layers)) - 1}
    parts = [take_apart(name, settings, counts)
             for name, settings in (("fusion", decoding.fusion), ("exits", exits), ("sampling", decoding.sampling))]
    weights = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(lm.params)}
    arrays = weights | {name: array for part in parts for name, array in part.arrays.items()}
    timing = Timing(*decoding.chosen_schedule.timing(exits.verifies)) if counts["E"] else None
    with tqdm(total=3, desc="Exporting", unit="part") as bar:
        whole = trace_generation(lm, parts, arrays, timing)
        bar.update()
        step = trace_step(lm, parts[0], arrays)
        bar.update()
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS)
        bar.update()
    programs = {"generate": whole, "fuse": step}
    for name, traced in programs.items():
        (folder / f"{name}.jax_export").write_bytes(traced.data)
    tokenizer = tokenizer_from / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    shutil.copyfile(Path(__file__).with_name("run_program.py"), folder / RUN)
    about = {
        "format": FORMAT,
        "programs": {name: traced.about for name, traced in programs.items()},
        "numbers": _numbers(parts, timing),
        "settings": {part.name: describe(part.whole) for part in parts},
        "stop_ids": list(config.eos_ids),
        "vocabulary": config.vocab_size,
        "max_positions": config.max_positions,
        "exit_heads": config.exit_heads and dataclasses.asdict(config.exit_heads),
        "weights": {"file": WEIGHTS, "sha256": digest_of_weights(lm.params)},
        "tokenizer": tokenizer.name if tokenizer.is_file() else None,
        "source": source,
        "versions": versions(),
    }
    write_json(folder / ABOUT, about)


def trace_generation(lm: LM, parts: list[Parts], arrays: dict[str, np.ndarray], timing: Timing | None) -> Traced:
    """`sled.decoding.whole.generate` of this model; batch b, room s and number of stop ids k are symbolic."""
    fusion, exits, sampling = parts
    paths = {path: ".".join(map(str, path)) for path, _ in nnx.to_flat_state(lm.params)}

    def run(weights, numbers, prompts):
        params = nnx.from_flat_state([(path, leaf.replace(weights[paths[path]]))
                                      for path, leaf in nnx.to_flat_state(lm.params)])
        when = Timing(1, 0) if timing is None else Timing(numbers["schedule.rows"], numbers["schedule.patience"])
        tokens_BS, length_B, layers_BS = generate(
            lm.build, params, policy=exits.put_together(numbers, weights), timing=when,
            fusion=fusion.put_together(numbers, weights), sampling=sampling.put_together(numbers, weights),
            tokens_BS=prompts["tokens"], length_B=prompts["lengths"], new_B=prompts["max_new_tokens"],
            seeds_B=prompts["seeds"], stop_ids=prompts["stop_ids"], max_positions=lm.config.max_positions)
        return {"tokens": tokens_BS, "lengths": length_B, "layers": layers_BS}

    b, s, k = export.symbolic_shape("b, s, k")
    whole = lambda *shape, dtype="int32": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    numbers = {name: whole(b, *number.default.shape, dtype=number.default.dtype)
               for part in parts for name, number in part.numbers.items()}
    if timing is not None:
        numbers |= {"schedule.rows": whole(), "schedule.patience": whole()}
    prompts = {"tokens": whole(b, s), "lengths": whole(b), "max_new_tokens": whole(b),
               "seeds": whole(b, dtype="uint32"), "stop_ids": whole(k)}
    return _export("generate", run, {"weights": _shapes(arrays), "numbers": numbers, "prompts": prompts})


def trace_step(lm: LM, fusion: Parts, arrays: dict[str, np.ndarray]) -> Traced:
    """The fusion's logits [b, V] of hidden states [b, C, D] as they enter the projection [V, D]; b is symbolic.

    Candidate layers as in program.json, the last one last; they come in the form that it says (`Readout.form`).
    """
    network, last = lm.build(lm.params), lm.config.num_layers
    readout = Readout(network)
    early = readout.early_layers(fusion.whole, last)

    def run(projection, numbers, hidden):
        return {"logits": fused_logits(fusion.put_together(numbers, {}), hidden, projection)}

    b, = export.symbolic_shape("b")
    w_VD = network.head_weight
    numbers = {name: jax.ShapeDtypeStruct((b, *number.default.shape), number.default.dtype)
               for name, number in fusion.numbers.items()}
    hidden = jax.ShapeDtypeStruct((b, len(early) + 1, lm.config.width), w_VD.dtype)
    traced = _export("fuse", run, {"projection": jax.ShapeDtypeStruct(w_VD.shape, w_VD.dtype), "numbers": numbers,
                                   "hidden": hidden})
    head = "embedding.weight" if network.tied_head else "head.weight"
    return traced._replace(about=traced.about | {
        "projection": head, "layers": [*early, last],
        "states": [*(readout.form(n, fusion.whole.norm_early) for n in early), "normed"]})


def _export(name: str, run: Callable, arguments: dict[str, Any]) -> Traced:
    """`run` with these abstract arguments, in their order, for all of `PLATFORMS`."""
    exported = export.export(jax.jit(run), platforms=PLATFORMS)(*arguments.values())
    data = bytes(exported.serialize())
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return Traced(data, {
        "file": f"{name}.jax_export", "sha256": hashlib.sha256(data).hexdigest(), "platforms": list(exported.platforms),
        "calling_convention": exported.calling_convention_version,
        "arguments": [line for name, argument in arguments.items() for line in _described(name, argument)],
        "results": [line for name, result in results.items() for line in _described(name, result)]})


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def _described(name: str, argument) -> list[dict[str, Any]]:
    """An array, or a dict of arrays by name, in the order in which they are flattened; symbolic sizes by letter."""
    if isinstance(argument, dict):
        return [line for key in sorted(argument) for line in _described(f"{name}/{key}", argument[key])]
    return [{"name": name, "dtype": jnp.dtype(argument.dtype).name,
             "shape": [size if isinstance(size, int) else str(size) for size in argument.shape]}]


def _numbers(parts: list[Parts], timing: Timing | None) -> dict[str, dict[str, Any]]:
    """Every number for program.json: its type, axes besides the rows', default, and bound where it has one."""
    found = {name: {"dtype": default.dtype.name, "rows": True, "shape": list(default.shape),
                    "default": json_numbers(default.tolist())} | ({} if most is None else {"most": most})
             for part in parts for name, (default, most) in part.numbers.items()}
    for field, value in zip(Timing._fields, timing or (), strict=False):
        found[f"schedule.{field}"] = {"dtype": "int32", "rows": False, "shape": [], "default": int(value)}
    return found


