"""Grids of methods, in the order in which a sweep tests them: the safest of each sequence first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from sled.decoding.options import FINAL_LAYER
from sled.eval.methods import Method
from sled.exits import EarlyExit, SelfSpeculation
from sled.fusion import SLED, Strategy
from sled.settings.rules import Several

MEASURES = Several(str, "names of measures", hint="see sled.EarlyExit")
Layers = int | tuple[int, ...]


def no_exit(fusion: Strategy = FINAL_LAYER) -> Method:
    """The baseline of every method with this fusion: each token goes through all layers."""
    return Method(_under(fusion, "no exit"), fusion=fusion)


def early_exits(exits: Sequence[Layers], thresholds: Iterable[float], *,
                measures: str | Sequence[str] = "max_probability", kv: str = "exact",
                fusion: Strategy = FINAL_LAYER) -> list[Method]:
    """Every threshold, from the highest down, of every measure at every layer or set of layers in `exits`.

    measures, kv: as of `sled.EarlyExit`; what is not usual stands in the name. Raises SettingError.
    """
    methods = []
    for layers, measure in itertools.product(exits, MEASURES("measures", measures)):
        for threshold in sorted(set(thresholds), reverse=True):
            policy = EarlyExit(layers, threshold, measure=measure, kv=kv)
            by = "" if measure == "max_probability" else f" {measure}"
            how = "" if kv == "exact" else f" {kv},"
            name = f"exit after {listed(policy.layers)},{how}{by} threshold {threshold:g}"
            methods.append(Method(_under(fusion, name), fusion=fusion, exits=policy))
    return methods


def self_speculation(layers: Sequence[int], drafts: Iterable[int], *, fusion: Strategy = FINAL_LAYER) -> list[Method]:
    """Every draft length, shortest first, after every one of `layers`. Raises SettingError."""
    return [Method(_under(fusion, f"speculation after {layer}, draft {draft}"), fusion=fusion,
                   exits=SelfSpeculation(layer, draft))
            for layer in layers for draft in sorted(set(drafts))]


def sled_settings(rates: Sequence[float], scales: Sequence[int]) -> list[Method]:
    """SLED without exits, at every evolution rate and scale. Raises SettingError."""
    return [no_exit(SLED(rate=rate, scale=scale)) for rate in rates for scale in scales]


def _under(fusion: Strategy, name: str) -> str:
    """The name with the fusion before it, and those of its numbers that are swept."""
    if fusion == FINAL_LAYER:
        return name
    numbers = {field: getattr(fusion, field, None) for field in ("rate", "scale")}
    said = "".join(f" {field} {value:g}" for field, value in numbers.items() if isinstance(value, int | float))
    return f"{type(fusion).__name__}{said}, {name}"


def listed(layers: tuple[int, ...]) -> str:
    """1 2 4."""
    return " ".join(map(str, layers))
