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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from safetensors.numpy import save_file
from tqdm import tqdm

from sled.decoding.options import Decoding
from sled.decoding.readout import Readout
from sled.decoding.whole import generate
from sled.errors import SettingError
from sled.exits.schedule import Timing
from sled.export.target import versions
from sled.fusion.projection import fused_logits
from sled.io import json_numbers, write_json
from sled.lm import LM
from sled.settings import rules
from sled.settings.decorator import declared
from sled.settings.describe import describe
from sled.settings.per_row import check_rows, one_row, stack_rows

FORMAT = 3  # of program.json, which run_program.py reads
ABOUT, WEIGHTS, RUN = "program.json", "weights.safetensors", "run.py"
PLATFORMS = ("cpu", "cuda", "tpu")
NARROW = {"f": np.float32, "i": np.int32}  # what a traced number is, by the kind of a Python one


class Traced(NamedTuple):
    """An exported function: bytes that `jax.export.deserialize` takes, and what program.json says of it."""

    data: bytes
    about: dict[str, Any]


def save_program(lm: LM, folder: Path, decoding: Decoding, *, source: dict[str, Any]) -> None:
    """Writes the program that generates as `lm.generate` does with these settings into the empty folder `folder`.

    source: what the record says the model comes from.
    Raises SettingError for settings that the model cannot use, or that have an entry per row.
    """
    if lm.mesh is not None:
        raise SettingError(f"{lm.name} lies on a mesh of {lm.mesh.size} devices, but a program is for one; load it "
                           "without a mesh")
    config, exits = lm.config, decoding.check_context(lm.config.context).exits
    counts = {"E": len(exits.exits(config.num_layers)) - 1}
    parts = [take_apart(name, settings, counts)
             for name, settings in (("fusion", decoding.fusion), ("exits", exits), ("sampling", decoding.sampling))]
    weights = {".".join(map(str, path)): np.asarray(array) for path, array in nnx.to_flat_state(lm.params)}
    arrays = weights | {name: array for part in parts for name, array in part.arrays.items()}
    timing = Timing(*decoding.chosen_schedule.timing(exits.verifies)) if counts["E"] else None
    programs = {}
    bar = tqdm((("generate", lambda: trace_generation(lm, parts, arrays, timing)),
                ("fuse", lambda: trace_step(lm, parts[0]))), desc="Exporting", unit="program")
    for name, make in bar:
        bar.set_postfix_str(f"now {name}.jax_export")
        programs[name] = make()
        (folder / f"{name}.jax_export").write_bytes(programs[name].data)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS)
    tokenizer = folder / "tokenizer.json"
    if lm.text.available:
        lm.text.write(tokenizer)
    shutil.copyfile(Path(__file__).with_name("run_program.py"), folder / RUN)
    about = {
        "format": FORMAT,
        "programs": {name: traced.about for name, traced in programs.items()},
        "numbers": _numbers(parts, timing),
        "settings": {part.name: describe(part.whole) for part in parts},
        "stop_ids": list(config.eos_ids),
        "vocabulary": config.vocab_size,
        "max_positions": config.context,
        "exit_heads": config.exit_heads and dataclasses.asdict(config.exit_heads),
        "weights": {**_file(folder / WEIGHTS), "parameters_sha256": lm.weights_digest()},
        "tokenizer": _file(tokenizer) if lm.text.available else None,
        "source": source,
        "versions": versions(),
    }
    write_json(folder / ABOUT, about)


def _file(path: Path) -> dict[str, str]:
    """A file for program.json, which is read only as it was written."""
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class Number(NamedTuple):
    """A setting that stays an argument. default: of one row, with whatever axes it has besides. bounds: from and to,
    and "or" for a number besides; to is its static bound, fixed at export, where it has one."""

    default: np.ndarray
    bounds: dict[str, Any]


class Parts(NamedTuple):
    """Settings in parts. numbers: by names such as "fusion.rate", an entry per row in the program; arrays: by names
    such as "settings.exits.vocabulary", the same for all rows, kept with the weights."""

    name: str
    whole: Any
    numbers: dict[str, Number]
    arrays: dict[str, np.ndarray]

    def put_together(self, numbers: Mapping[str, jax.Array], arrays: Mapping[str, jax.Array]):
        """The settings with these numbers [B, ...] and arrays, which may be traced."""
        changed = {name.rpartition(".")[2]: numbers[name] for name in self.numbers}
        for field in _shared(self.whole):
            leaves, tree = jax.tree_util.tree_flatten_with_path(getattr(self.whole, field))
            changed[field] = tree.unflatten([arrays[_array_name(self.name, field, path)] for path, _ in leaves])
        return dataclasses.replace(self.whole, **changed) if changed else self.whole


def take_apart(name: str, settings, sizes: Mapping[str, int]) -> Parts:
    """`settings` (a strategy, a policy, `Sampling`) in parts; its strings, layers and bounds are fixed.

    sizes: of axes other than rows, by letter (see `sled.settings.decorator.setting`).
    Raises SettingError for an array with an entry per row: the rows come when the program runs.
    """
    check_rows(settings, 1, hint="a program gets its rows when it runs, so give one value")
    whole = one_row(settings)
    of_rows = stack_rows([whole], whole, sizes)
    fields = declared(type(whole))
    numbers, most = {}, {of.bounds: getattr(whole, bound) for bound, of in fields.items() if of.bounds}
    for field in getattr(whole, "row_axes", {}):
        if getattr(whole, field) is not None:
            default = getattr(of_rows, field)[0]
            numbers[f"{name}.{field}"] = Number(default.astype(NARROW[default.dtype.kind]),
                                                _bounds(fields[field].rule, most.get(field)))
    arrays = {_array_name(name, field, path): np.asarray(jnp.asarray(leaf)) for field in _shared(whole)
              for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(whole, field))[0]}
    return Parts(name, whole, numbers, arrays)


def _bounds(rule, most: int | None) -> dict[str, Any]:
    """What a rule says of a number, for a program that runs without it."""
    entry = getattr(rule, "entry", None)
    if isinstance(entry, rules.Whole):
        return {"from": entry.low, "to": most or entry.high or rules.LARGEST}
    if not isinstance(entry, rules.Number):
        return {}
    low = float(np.finfo(np.float32).tiny) if entry.open_low else entry.low  # the first above 0
    return {"from": json_numbers(entry.least or low), "to": min(entry.high, float(np.finfo(np.float32).max)),
            **({"or": entry.low} if entry.least else {})}


def _shared(settings) -> list[str]:
    """Fields of arrays that are the same for all rows."""
    return [field for field in getattr(settings, "traced_fields", ())
            if field not in settings.row_axes and getattr(settings, field) is not None]


def _array_name(name: str, field: str, path) -> str:
    return ".".join(["settings", name, field, *(jax.tree_util.keystr((key,), simple=True) for key in path)])


def trace_generation(lm: LM, parts: list[Parts], arrays: dict[str, np.ndarray], timing: Timing | None) -> Traced:
    """`sled.decoding.whole.generate` of this model; batch b, room s and number of stop ids k are symbolic."""
    fusion, exits, sampling = parts
    paths = {path: ".".join(map(str, path)) for path, _ in nnx.to_flat_state(lm.params)}

    def run(weights, numbers, prompts):
        params = nnx.from_flat_state([(path, weights[name]) for path, name in paths.items()])
        when = Timing(1, 0) if timing is None else Timing(numbers["schedule.rows"], numbers["schedule.patience"])
        tokens_BS, length_B, layers_BS = generate(
            lm.build, params, policy=exits.put_together(numbers, weights), timing=when,
            fusion=fusion.put_together(numbers, weights), sampling=sampling.put_together(numbers, weights),
            tokens_BS=prompts["tokens"], length_B=prompts["lengths"], new_B=prompts["max_new_tokens"],
            seeds_B=prompts["seeds"], stop_ids=prompts["stop_ids"], max_positions=lm.config.context)
        return {"tokens": tokens_BS, "lengths": length_B, "layers": layers_BS}

    b, s, k = export.symbolic_shape("b, s, k")
    whole = lambda *shape, dtype="int32": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    numbers = _rows_of(b, *parts)
    if timing is not None:
        numbers |= {"schedule.rows": whole(), "schedule.patience": whole()}
    prompts = {"tokens": whole(b, s), "lengths": whole(b), "max_new_tokens": whole(b),
               "seeds": whole(b, dtype="uint32"), "stop_ids": whole(k)}
    shapes = {name: whole(*array.shape, dtype=array.dtype) for name, array in arrays.items()}
    return _export("generate", run, {"weights": shapes, "numbers": numbers, "prompts": prompts})


def trace_step(lm: LM, fusion: Parts) -> Traced:
    """The fusion's logits [b, V] of hidden states [b, C, D] as they enter the projection [V, D]; b is symbolic.

    Candidate layers as in program.json, the last one last; they come in the form that it says (`Readout.form`).
    """
    network, last = lm.build(lm.params), lm.config.num_layers
    readout = Readout(network)
    early, head = readout.early_layers(fusion.whole, last), network.shared_head

    def run(projection, numbers, hidden):
        return {"logits": fused_logits(fusion.put_together(numbers, {}), hidden, head.with_weights(projection))}

    b, = export.symbolic_shape("b")
    traced = _export("fuse", run, {
        "projection": jax.ShapeDtypeStruct(head.w_VD.shape, head.w_VD.dtype), "numbers": _rows_of(b, fusion),
        "hidden": jax.ShapeDtypeStruct((b, len(early) + 1, lm.config.width), head.w_VD.dtype)})
    table = "embedding.weight" if network.tied_head else "head.weight"
    return traced._replace(about=traced.about | {
        "projection": table, "layers": [*early, last],
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


def _rows_of(b, *parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of all numbers of b rows."""
    return {name: jax.ShapeDtypeStruct((b, *number.default.shape), number.default.dtype)
            for part in parts for name, number in part.numbers.items()}


def _described(name: str, argument) -> list[dict[str, Any]]:
    """An array, or a dict of arrays by name, in the order in which they are flattened; symbolic sizes by letter."""
    if isinstance(argument, dict):
        return [line for key in sorted(argument) for line in _described(f"{name}/{key}", argument[key])]
    return [{"name": name, "dtype": jnp.dtype(argument.dtype).name,
             "shape": [size if isinstance(size, int) else str(size) for size in argument.shape]}]


def _numbers(parts: list[Parts], timing: Timing | None) -> dict[str, dict[str, Any]]:
    """Every number for program.json: its type, axes besides the rows', default, and bound where it has one."""
    found = {name: {"dtype": default.dtype.name, "rows": True, "shape": list(default.shape),
                    "default": json_numbers(default.tolist()), **bounds}
             for part in parts for name, (default, bounds) in part.numbers.items()}
    for field, value in zip(Timing._fields, timing or (), strict=False):
        found[f"schedule.{field}"] = {"dtype": "int32", "rows": False, "shape": [], "default": int(value),
                                      "from": int(field == "rows"), "to": rules.LARGEST}
    return found


