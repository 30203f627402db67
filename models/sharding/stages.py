"""A decoder cut over the stages of a mesh, for decoding: every stage holds as many neighbouring layers.

Its `layers` are as many as a stage has; each stands for one layer of every stage, its parameters with these in front:
layer s n + i of a model lies at [s] of layer i, n being the layers of a stage. So every stage finds its weights where
they lie, and copies none.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sled.errors import SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.models.sharding.load_sharded import read_onto
from sled.models.sharding.mesh import gathered
from sled.models.sharding.sharding import Sharding
from sled.models.stored import abstract, open_weights, progress


def check_stages(config: DecoderConfig, stages: int) -> int:
    """The layers of a stage. Raises SettingError where stages are not alike, or heads look back."""
    per, rest = divmod(config.num_layers, stages)
    if rest:
        raise SettingError(f"Mesh.stage is {stages}, which does not divide the model's {config.num_layers} layers; "
                           "give a divisor")
    alike = lambda n: config.windows == config.windows[:config.num_layers // n] * n  # noqa: E731
    if not alike(stages):
        fitting = [n for n in range(2, config.num_layers + 1) if config.num_layers % n == 0 and alike(n)]
        raise SettingError(f"Mesh.stage is {stages}, but the windows of the layers differ between stages of {per}; "
                           f"give {' or '.join(map(str, fitting)) or '1, as no other number fits'}")
    if stages > 1 and config.exit_heads is not None and config.exit_heads.kind == "block":
        raise SettingError("the model's exit heads look back (block), which no stage of a pipeline keeps K/V for; load "
                           "it over tensor, or without stages")
    return per


def load_staged(path: str | Path, mesh: jax.sharding.Mesh, *, dtype=None) -> Decoder:
    """The model in a Hugging Face folder, cut over the mesh's stages; each process reads what its devices hold.

    Embeddings, final norm, projection and exit heads lie on every stage. Raises what `load_onto` and `check_stages`
    raise.
    """
    with open_weights(path) as stored:
        stages, sharding = mesh.shape["stage"], Sharding(stored.config, mesh, decoding=True)
        per, whole = check_stages(stored.config, stages), abstract(stored.config)
        graph, state = nnx.split(whole._with_parts(nnx.List(whole.layers[:per]), whole.exit_heads))
        slots = dict(nnx.to_flat_state(state))
        with progress("Loading", sum(stored.sizes.values())) as bar:
            for at, slot in slots.items():
                shape, where = sharding.slot(at)
                parts = [at] if at[0] != "layers" else [("layers", s * per + at[1], *at[2:]) for s in range(stages)]
                if at[0] == "layers":
                    where, shape = NamedSharding(mesh, P("stage", *where.spec)), (stages, *shape)
                slots[at] = slot.replace(_stage_arrays(stored, parts, shape, where, dtype) if at[0] == "layers"
                                         else read_onto(stored, at, shape, where, dtype))
                bar.update(sum(stored.sizes[part] for part in parts))
    return nnx.merge(graph, nnx.from_flat_state(slots))


def _stage_arrays(stored, parts: list[tuple], shape: tuple[int, ...], where: NamedSharding, dtype) -> jax.Array:
    """One layer of every stage."""
    def read(index):
        which, *inside = index
        return np.stack([stored.read(part, dtype, tuple(inside)) for part in parts[which]])

    return jax.make_array_from_callback(shape, where, read)


def unstaged(decoder: Decoder, stages: int) -> Decoder:
    """The same decoder with all of its layers one after the other, as it is saved: on the host, as no device need have
    room for them."""
    host = jax.local_devices(backend="cpu")[0]

    def layer_of(x, stage: int) -> jax.Array:
        return jax.device_put(gathered(x[stage]), host)

    graphs, states = zip(*(nnx.split(layer) for layer in decoder.layers), strict=True)
    layers = [nnx.merge(graph, jax.tree.map(functools.partial(layer_of, stage=s), state))
              for s in range(stages) for graph, state in zip(graphs, states, strict=True)]
    return decoder._with_parts(nnx.List(layers), decoder.exit_heads)
