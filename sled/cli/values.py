"""Values as one writes them behind an option: what the help calls them, and how they are read."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

REGISTRY = ConstructorRegistry()  # of the rules below, which stand before tyro's own


def _single(metavar: str, kind: type, read: Callable[[str], Any], show: Callable[[Any], str] = str):
    return PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=lambda given: read(given[0]),
        is_instance=lambda value: isinstance(value, kind), str_from_instance=lambda value: [show(value)])


def _reader(kind: type, what: str) -> Callable[[str], Any]:
    def read(text: str):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {what}") from None

    return read


def _layer_set(text: str) -> tuple[int, ...]:
    return tuple(_reader(int, "layer's number")(each) for each in text.split(","))


def _to_write(text: str) -> Path:
    """A path of a result, whose folder is there: one that is made of a misspelt name would hide the mistake."""
    path = Path(text).expanduser()
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} for {path.name}; make it, or correct the path")
    return path


NewPath = Annotated[Path, _single("PATH", Path, _to_write)]
Layer = Annotated[int, _single("LAYER", int, _reader(int, "layer's number"))]
LayerSet = Annotated[tuple[int, ...], _single("LAYER[,LAYER...]", tuple, _layer_set)]
PLAIN = {int: _single("N", int, _reader(int, "whole number")),
         float: _single("NUMBER", float | int, _reader(float, "number"), "{:g}".format),
         str: _single("TEXT", str, str),
         Path: _single("PATH", Path, Path)}


def spec_of(kind: Any) -> PrimitiveConstructorSpec:
    """How a value of this type is written, by the rules below and tyro's own; to be called within `REGISTRY`."""
    return ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))


@REGISTRY.primitive_rule
def _plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    return PLAIN.get(info.type)


@REGISTRY.primitive_rule
def _several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """N [N ...]."""
    if get_origin(info.type) is not tuple or tyro.conf.UseAppendAction in info.markers:
        return None
    one = spec_of(get_args(info.type)[0])
    return dataclasses.replace(
        one, nargs="*", metavar=f"{one.metavar} [{one.metavar} ...]",
        instance_from_str=lambda given: tuple(one.instance_from_str([text]) for text in given),
        is_instance=lambda value: isinstance(value, tuple) and all(map(one.is_instance, value)),
        str_from_instance=lambda values: list(itertools.chain(*map(one.str_from_instance, values))) or ["none"])


@REGISTRY.primitive_rule
def _either(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Words of several lists as one list; None is what an option is that was left out, and cannot be written."""
    if get_origin(info.type) not in (Union, types.UnionType):
        return None
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    words = tuple(dict.fromkeys(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)))
    kinds = [*([Literal[words]] if words else ()), *(kind for kind in kinds if get_origin(kind) is not Literal)]
    specs = [spec_of(kind) for kind in kinds]
    if len(specs) == 1:
        show = specs[0].str_from_instance
        return dataclasses.replace(specs[0], str_from_instance=lambda x: ["none"] if x is None else show(x))

    def read(given: list[str]):
        reasons = []
        for spec in specs:
            if spec.choices is None or (len(given) == 1 and given[0] in spec.choices):
                try:
                    return spec.instance_from_str(given)
                except ValueError as reason:
                    reasons.append(str(reason))
        raise ValueError(f"{' and '.join(reasons)}, nor one of {', '.join(words)}")

    def show(value) -> list[str]:
        fits = (spec.str_from_instance(value) for spec in specs if spec.is_instance(value))
        return next(fits, ["none"])

    metavar = " | ".join([*words, *(spec.metavar for spec in specs[bool(words):])])
    return PrimitiveConstructorSpec(
        nargs="*", metavar=metavar, instance_from_str=read,
        is_instance=lambda value: any(spec.is_instance(value) for spec in specs), str_from_instance=show)
