"""Settings as jax pytrees: what users tune is traced, so that changing it never recompiles."""

import dataclasses

import jax


def traced(*shared: str, **row_axes: str):
    """Register a frozen dataclass as a pytree: the named fields are traced leaves, the others static.

    shared: fields that mean the same for every row of a batch, whatever their shape.
    row_axes: fields that may hold an entry per row, with the axes such an array has, the rows' first:
        `weights="BC"`. With fewer axes (weights [C], or a number) a value is the same for every row.

    Rebuilding one from leaves skips `__post_init__`: leaves are then whatever a transformation puts there.
    The class keeps the names as `traced_fields`, and `row_axes`.
    """
    names = (*shared, *row_axes)

    def register(cls):
        static = tuple(f.name for f in dataclasses.fields(cls) if f.name not in names)

        def flatten(self):
            return tuple(getattr(self, n) for n in names), tuple(getattr(self, n) for n in static)

        def flatten_with_keys(self):
            leaves, meta = flatten(self)
            return tuple(zip(map(jax.tree_util.GetAttrKey, names), leaves, strict=True)), meta

        def unflatten(meta, leaves):
            self = object.__new__(cls)
            for name, value in zip((*names, *static), (*leaves, *meta), strict=True):
                object.__setattr__(self, name, value)
            return self

        cls.traced_fields, cls.row_axes = names, row_axes
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register
