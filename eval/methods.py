"""A way to decode, under a name: what evaluations and sweeps compare."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any

from sled.decoding.options import Decoding
from sled.errors import SettingError
from sled.exits import FullDepth
from sled.fusion import SLED, ClampOnly, FinalLayer
from sled.lm import LM
from sled.models.decoder import ARITHMETIC
from sled.settings.rules import Instance

A_MODEL = Instance(LM, traced=False, hint="give what sled.load returns")


@dataclasses.dataclass(frozen=True, init=False)
class Method:
    """A `sled.Decoding`, and the name that stands for it in tables.

    settings: the fields of `sled.Decoding`, which fit every prompt. Lengths and stop strings are most often those of
    the task; sampling too, where it is left out.

    Raises SettingError for what `LM.generate` refuses, and for arrays with an entry per row.
    """

    name: str
    decoding: Decoding

    def __init__(self, name: str, **settings):
        if not isinstance(name, str) or not name.strip():
            raise SettingError(f"Method.name is {name!r}, but must be a name to show in tables")
        decoding = Decoding(**settings).check_rows(1, hint="a method is the same for every prompt")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "decoding", decoding)

    def settings(self) -> dict[str, Any]:
        """All that decides the result besides model, prompt and task, as JSON has it. The name does not."""
        described = self.decoding.describe()
        return {name: described[name] for name in ("fusion", "exits", "schedule", "sampling")}

    @property
    def samples(self) -> bool:
        """The method says how tokens are drawn, rather than leaving it to the task."""
        return self.settings()["sampling"] != _PLAIN["sampling"]

    @property
    def leaves_early(self) -> bool:
        return not isinstance(self.decoding.exits, FullDepth)

    @property
    def verifies(self) -> bool:
        """Tokens that leave early are drafts, so that all of a text went through all layers."""
        return self.decoding.exits.verifies


_PLAIN = Method("greedy").settings()


def checked_methods(methods: Method | Sequence[Method]) -> list[Method]:
    """The methods. Raises SettingError where there is none, or anything else."""
    found = [methods] if isinstance(methods, Method) else list(methods) if isinstance(methods, Iterable) else []
    if not found or not all(isinstance(method, Method) for method in found):
        raise SettingError(f"methods is {methods!r}, but must hold methods, at least one; give "
                           "sled.eval.methods.Method(name, ...), or what sled.eval.sweep.grid makes")
    return found


def baselines(*methods: Method) -> tuple[Method, ...]:
    """What methods must be compared with to be believed: the last layer alone and, of SLED, the clamp alone; each once.

    Part of SLED's gain on multiple choice comes from leaving out all but the last layer's top tokens, which needs no
    early layer (`sled.ClampOnly`). Both draw tokens as the method does, and go through all layers. A baseline that
    would be one of the methods is left out. Those that would have one name, have in it what tells them apart.
    """
    found: list[Method] = []
    for base in (base for method in methods for base in _baselines_of(method)):
        if all(base.settings() != other.settings() for other in (*methods, *found)):
            found.append(base)
    found.sort(key=lambda base: not plain(base))
    return tuple(_told_apart(base, [other for other in (*methods, *found) if other.name == base.name])
                 for base in found)


def _baselines_of(method: Method) -> list[Method]:
    found = [Method("final layer" if method.samples else "greedy", sampling=method.decoding.sampling)]
    fusion = method.decoding.fusion
    if isinstance(fusion, SLED):
        same = {name: getattr(fusion, name) for name in ("scale", "lower_bound", "log_softmax", "max_scale")}
        found.append(Method("clamp only", fusion=ClampOnly(**same), sampling=method.decoding.sampling))
    return found


def _told_apart(base: Method, alike: list[Method]) -> Method:
    """A baseline named by the numbers in which those of its name, itself among them, differ."""
    numbers = [{**vars(each.decoding.sampling), **vars(each.decoding.fusion)} for each in alike]
    own = {**vars(base.decoding.sampling), **vars(base.decoding.fusion)}
    apart = {name.replace("_", " "): value for name, value in own.items() if name != "max_scale"
             and any(other.get(name) != value for other in numbers)}
    return Method(", ".join([base.name, *(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                                          for name, value in apart.items())]), **vars(base.decoding))


def deciding_versions() -> dict[str, str | int]:
    """Versions of the packages that may change an answer, and of the decoder's arithmetic."""
    packages = ("sled-jax", "jax", "jaxlib", "flax", "tokenizers")
    return {name: importlib.metadata.version(name) for name in packages} | {"arithmetic": ARITHMETIC}


def plain(method: Method) -> bool:
    """Whether the last layer alone decides and every token goes through all layers."""
    return isinstance(method.decoding.fusion, FinalLayer) and not method.leaves_early
