"""The lens: what every layer would say after each token of a text, as arrays, a table, a picture.

Each hidden state goes through the final norm and the shared projection ("logit lens",
nostalgebraist 2020), or through the exit head that the model has there; the last row is the model's own prediction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sled.checks import Whole
from sled.decoding.buckets import bucket
from sled.decoding.network import Build, fuse, own_projection, read
from sled.decoding.scoring import map_places
from sled.fusion import SharedHead


@dataclasses.dataclass(frozen=True)
class Lens:
    """What the layers say. Rows are hidden states 0 (embeddings) .. L, columns the T tokens read.

    ids: [T] the text's tokens; tokens: their names.
    top: [L + 1, T] most likely next token by layer; names: their names.
    probability: [L + 1, T] of that token. entropy: [L + 1, T] of the layer's distribution, in nats.
    final_probability: [L + 1, T] what the layer gives to the final layer's choice.
    fused: [T] the choice of the fusion asked for, or None; fused_names: their names.
    """

    ids: np.ndarray
    tokens: list[str]
    top: np.ndarray
    names: list[list[str]]
    probability: np.ndarray
    entropy: np.ndarray
    final_probability: np.ndarray
    fused: np.ndarray | None
    fused_names: list[str] | None

    @property
    def agreement(self) -> np.ndarray:
        """[L + 1, T]: whether the layer's choice is the final layer's."""
        return self.top == self.top[-1]

    @property
    def settled(self) -> np.ndarray:
        """[T]: the first layer from which on every layer makes the final layer's choice."""
        disagrees = ~self.agreement[::-1]
        return len(self.top) - np.where(disagrees.any(axis=0), disagrees.argmax(axis=0), len(self.top))

    def table(self, *, first: int = 0, count: int = 12) -> str:
        """Layers (deepest first) by positions first .. first + count - 1, as text.

        Each cell is the layer's choice with its probability in percent; `*` marks agreement with
        the final layer.
        """
        columns = self.columns(first, count)
        rows = [["read", *(show(self.tokens[t]) for t in columns)]]
        if self.fused is not None:
            rows.append(["fused", *(show(self.fused_names[t]) for t in columns)])
        for n in reversed(range(len(self.top))):
            rows.append([f"layer {n}" if n else "embed",
                         *(f"{show(self.names[n][t])} {100 * self.probability[n, t]:.0f}"
                           f"{'*' if self.agreement[n, t] else ''}" for t in columns)])
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def picture(self, path: str | Path, *, title: str | None = None, first: int = 0, count: int = 48) -> Path:
        """Draws the lens into an image file (format by its ending: .png, .svg or .pdf) and returns its path.

        Raises SettingError for another ending, or a path that cannot be written.
        """
        from sled.lens_picture import draw

        return draw(self, Path(path), title=title, first=first, count=count)

    def columns(self, first: int, count: int) -> range:
        """Positions first .. first + count - 1, as far as the text goes."""
        first = Whole(0, len(self.tokens) - 1, hint="it is the first position of the text to show")("first", first)
        count = Whole(1, hint="it counts the positions to show")("count", count)
        return range(first, min(first + count, len(self.tokens)))


def show(name: str) -> str:
    """A token's name on one line, with its leading space and line breaks visible."""
    return name.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"


def look(build: Build, params: Any, ids: np.ndarray, *, fusion, name_token: Callable[[int], str]) -> Lens:
    """The lens over token ids [T]. The text is padded to a bucket, so nearby lengths share a program."""
    padded_T = np.zeros(bucket(len(ids)), np.int32)
    padded_T[:len(ids)] = ids
    said = jax.device_get(_say(build, params, padded_T, fusion))
    top, probability, entropy, final_probability = (x[:len(ids)].T for x in said[:4])
    fused = None if fusion is None else said[4][:len(ids)]
    names = {int(i): name_token(int(i)) for i in {*ids.tolist(), *top.ravel().tolist(),
                                                  *([] if fused is None else fused.tolist())}}
    return Lens(
        ids=ids, tokens=[names[i] for i in ids.tolist()], top=top,
        names=[[names[i] for i in row] for row in top.tolist()], probability=probability, entropy=entropy,
        final_probability=final_probability, fused=fused,
        fused_names=None if fused is None else [names[i] for i in fused.tolist()])


@functools.partial(jax.jit, static_argnames="build")
def _say(build: Build, params, ids_T, fusion):
    network = build(params)
    positions_1T = jnp.arange(ids_T.shape[0])[None]
    h0 = network.embed(ids_T[None])
    states, _ = network.run_layers(h0, positions_1T, None, 0, network.num_layers)
    states_TCD = jnp.stack([h[0] for h in (h0, *states)], axis=1)
    head = SharedHead(network.head_weight)

    def describe(logits_PV, final_top_P):
        logp_PV = jax.nn.log_softmax(logits_PV, axis=-1)
        p_PV = jnp.exp(logp_PV)
        entropy_P = -jnp.sum(jnp.where(p_PV > 0, p_PV * logp_PV, 0), axis=-1)
        of_final_P = jnp.take_along_axis(p_PV, final_top_P[:, None], axis=-1)[:, 0]
        return jnp.argmax(logits_PV, axis=-1), jnp.max(p_PV, axis=-1), entropy_P, of_final_P

    def places(h_PCD):
        """One layer's logits at a time, never those of all; the final layer's first, for its choice."""
        h_CPD = jnp.stack([read(network, h_PCD[:, n], n) for n in range(h_PCD.shape[1])])
        final_PV = head.project(h_CPD[-1])
        final_top_P = jnp.argmax(final_PV, axis=-1)
        final = describe(final_PV, final_top_P)
        early = jax.lax.map(lambda h_PD: describe(head.project(h_PD), final_top_P), h_CPD[:-1])
        for n in range(network.num_layers):
            if (own_VD := own_projection(network, n)) is not None:
                said = describe(SharedHead(own_VD).project(h_CPD[n]), final_top_P)
                early = jax.tree.map(lambda rows_EP, row_P, n=n: rows_EP.at[n].set(row_P), early, said)
        return jax.tree.map(lambda early_EP, final_P: jnp.concatenate([early_EP, final_P[None]]).T, early, final)

    said = map_places(places, (states_TCD,), head.vocabulary)
    if fusion is None:
        return said
    depth = network.num_layers
    fused = map_places(lambda h_PCD: jnp.argmax(fuse(network, fusion, list(jnp.moveaxis(h_PCD, 1, 0)), depth), axis=-1),
                       (states_TCD,), head.vocabulary * states_TCD.shape[1])
    return (*said, fused)
