"""The mesh: how many ways training or decoding is split, and along which axes.

The first axes are the outermost: neighbours along the last lie closest together, which is where
tensor parallelism, with its exchange in every layer, belongs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sled.errors import SettingError
from sled.settings.decorator import setting, settings
from sled.settings.rules import Whole

AXES = ("data", "fsdp", "stage", "tensor")
ROWS = ("data", "fsdp")  # those that split the batch
REST = -1  # as a size: what is left of the devices


_SIZE = Whole(1, hint="it counts groups of devices; -1 is what is left of them")


def _ways(name: str, value) -> int:
    return value if value == REST and not isinstance(value, bool) else _SIZE(name, value)


@settings
class Mesh:
    """The number of ways to split along each axis; the product is the number of devices, -1 is what is left of them.

    data: rows of the batch; every group holds all weights.
    fsdp: rows of the batch AND weights with their optimiser state (ZeRO-3, arXiv 1910.02054); weights are
        gathered layer by layer as they are needed. For training alone, as a decoding step would gather all for one
        token: there the default is 1, and data takes the rest, unless data or stage is given.
    tensor: heads, feed-forward width and vocabulary (Megatron-LM, arXiv 1909.08053).
    stage: layers, as a pipeline (GPipe, arXiv 1811.06965); in training the vocabulary, too: every stage computes its
        part of all exits' logits.
    """

    data: int = setting(_ways, default=1)
    fsdp: int = setting(_ways, default=REST)
    tensor: int = setting(_ways, default=1)
    stage: int = setting(_ways, default=1)

    def __post_init__(self):
        if (rest := [axis for axis in AXES if getattr(self, axis) == REST])[1:]:
            names = " and ".join(f"Mesh.{axis}" for axis in rest)
            raise SettingError(f"{names} are -1, but only one axis can take what is left of the devices; give the "
                               "others a number")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The size of each of `AXES` on so many devices. Raises SettingError where they do not come out even."""
        sizes = [getattr(self, axis) for axis in AXES]
        product = math.prod(size for size in sizes if size != REST)
        if devices % product if REST in sizes else devices != product:
            named = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size != REST}
            written = " x ".join(f"Mesh.{axis} {size}" for axis, size in named.items() if size > 1 or product == 1)
            takes = f"a multiple of {product}" if REST in sizes else product
            raise SettingError(f"{written} takes {takes} device{'s' * (product > 1)}, but there are {devices}; give "
                               f"sizes whose product is {devices}, or as many devices as they take")
        return tuple(devices // product if size == REST else size for size in sizes)

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices`, by default all of all processes.

        Devices of several slices (TPU pods joined by a network, GPU hosts) are arranged so that `data`, then `fsdp`,
        then `stage`, cross between slices, and `tensor` never does. Raises SettingError where that, or the sizes, do
        not fit.
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = self.sizes(len(devices))
        kinds = (AxisType.Auto,) * len(AXES)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        if slices == 1:
            return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
        outer = across_slices(sizes, slices)
        inner = tuple(size // crossing for size, crossing in zip(sizes, outer, strict=True))
        return jax.sharding.Mesh(np.asarray(mesh_utils.create_hybrid_device_mesh(inner, outer, devices)), AXES,
                                 axis_types=kinds)

    def build_for_decoding(self) -> jax.sharding.Mesh:
        """As `build`, over all devices, but that `data` takes the rest where `fsdp` would. Raises what `check_decodes`
        raises, too."""
        alone = self.fsdp == REST and self.data == self.stage == 1
        built = (dataclasses.replace(self, data=REST, fsdp=1) if alone else self).build()
        check_decodes(built)
        return built

    def abstract(self, devices: int) -> AbstractMesh:
        """The mesh over so many devices that need not exist: enough to plan on (`sled.train.parallel.memory_plan`)."""
        return AbstractMesh(self.sizes(devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spelled(shape: Mapping[str, int]) -> str:
    """Sizes of axes that split, such as "data 2 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1)


def check_decodes(mesh: jax.sharding.Mesh | AbstractMesh) -> None:
    """Raises SettingError for a mesh that splits over fsdp, too, or over stage and data."""
    data, fsdp, stage, tensor = mesh.shape.values()
    if fsdp > 1:
        others = f"fsdp=1, stage={stage}, tensor={fsdp * tensor}" if stage > 1 else (
            f"data={data * fsdp}, tensor={tensor}")
        raise SettingError(f"Mesh.fsdp is {fsdp}, but decoding does not split over fsdp, which would gather all "
                           "weights for every token; give axes whose product is the number of devices, "
                           f"{mesh.size}, without it, such as Mesh({others})")
    if stage > 1 and data > 1:
        raise SettingError(f"Mesh.stage is {stage} and Mesh.data {data}, but stages decode for one group of rows; give "
                           "data=1, or no stages")


def split_in_use(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, held to be split so over the mesh in whose program this is traced; where there is none, as it is.

    axes: for each of the first axes of `x`, the axis of the mesh that splits it, or None; one that does not divide it
        leaves it whole, as all that are left out are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not ways_in_use("tensor"):
        return x
    spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, x.shape)]  # noqa: B905
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def gathered(array) -> np.ndarray:
    """An array on this host. Of one that lies on devices of other processes, too, all of them call this together."""
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    return process_allgather(array, tiled=True) if spread else np.asarray(array)


def ways_in_use(axis: str) -> int:
    """How many ways this axis is split by the mesh in whose program this is traced; 0 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 0)


def across_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """The number of slices that each axis spans: the outermost as many as it can, the last (`tensor`) only one.

    A stage may lie in a slice of its own: stages exchange little.
    """
    left, outer = slices, []
    for size in sizes[:-1]:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        written = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise SettingError(f"the devices lie in {slices} slices, over which data, fsdp and stage cannot be spread "
                           f"evenly ({written}); make data x fsdp x stage a multiple of {slices}, so that no tensor "
                           "group crosses the slow network")
    return (*outer, 1)
