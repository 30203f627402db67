"""The lens: what every layer would say after each token of a text, as arrays and as a table.

Each hidden state goes through the final norm and the shared projection ("logit lens",
nostalgebraist 2020), or through the exit head that the model has there; the last row is the model's own prediction.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sled.decoding.groups import fetched
from sled.decoding.network import Build
from sled.decoding.programs import bounded
from sled.decoding.readout import Readout
from sled.decoding.scoring import map_places
from sled.decoding.state import bucket
from sled.exits.policy import Exits, with_last
from sled.settings.brief import brief
from sled.settings.rules import Number, Whole

BEST = 5  # tokens kept of every layer's distribution, or all of a smaller vocabulary


@brief
@dataclasses.dataclass(frozen=True)
class Lens:
    """The choices of every layer. Rows are hidden states 0 (embeddings) .. L, columns the T tokens read.

    ids: [T] the text's tokens.
    best: [L + 1, T, K] the K = 5 most likely next tokens by layer, likeliest first.
    best_probability: [L + 1, T, K] of those tokens.
    entropy: [L + 1, T] of the layer's distribution, in nats.
    final_probability: [L + 1, T] what the layer gives to the final layer's choice.
    name_of: the names of all tokens above and below, by id. vocabulary: how many tokens a layer chooses from.
    fusion: the class of the fusion asked for, such as "SLED", or None. Then, as of a layer:
    fused_best, fused_probability: [T, K] the fusion's most likely next tokens and their probabilities, or None.
    """

    ids: np.ndarray
    best: np.ndarray
    best_probability: np.ndarray
    entropy: np.ndarray
    final_probability: np.ndarray
    name_of: dict[int, str]
    vocabulary: int
    fusion: str | None = None
    fused_best: np.ndarray | None = None
    fused_probability: np.ndarray | None = None

    @property
    def top(self) -> np.ndarray:
        """[L + 1, T]: the most likely next token by layer."""
        return self.best[..., 0]

    @property
    def probability(self) -> np.ndarray:
        """[L + 1, T]: of the most likely next token."""
        return self.best_probability[..., 0]

    @property
    def fused(self) -> np.ndarray | None:
        """[T]: the choice of the fusion asked for, or None."""
        return None if self.fused_best is None else self.fused_best[:, 0]

    @functools.cached_property
    def tokens(self) -> list[str]:
        """The names of the text's tokens."""
        return [self.name_of[i] for i in self.ids.tolist()]

    @functools.cached_property
    def names(self) -> list[list[str]]:
        """The names of `top`."""
        return [[self.name_of[i] for i in row] for row in self.top.tolist()]

    @functools.cached_property
    def fused_names(self) -> list[str] | None:
        """The names of `fused`."""
        return None if self.fused is None else [self.name_of[i] for i in self.fused.tolist()]

    @property
    def agreement(self) -> np.ndarray:
        """[L + 1, T]: whether the layer's choice is the final layer's."""
        return self.top == self.top[-1]

    @property
    def agrees_from(self) -> np.ndarray:
        """[T]: the first layer from which on every layer makes the final layer's choice.

        The "prediction depth" of Baldock et al. 2021 (arXiv 2106.09647).
        """
        disagrees = ~self.agreement[::-1]
        return len(self.top) - np.where(disagrees.any(axis=0), disagrees.argmax(axis=0), len(self.top))

    def exits(self, threshold: float, layers: int | tuple[int, ...] | None = None) -> np.ndarray:
        """[T]: the layer after which `sled.EarlyExit(layers, threshold)` would let the next token leave, or L.

        layers: where a token may leave; None: after every layer. The exits speak for themselves, without fusion.
        Raises SettingError for a threshold outside [0, 1], and for layers that are no early exits of the model.
        """
        last = len(self.top) - 1
        threshold = Number(0, 1, hint="a probability lies in [0, 1]; 1 never leaves early")("threshold", threshold)
        layers = tuple(range(1, last)) if layers is None else with_last("layers", Exits()("layers", layers), last)[:-1]
        sure_ET = self.probability[list(layers)] > np.float32(threshold)
        leaves_T = np.full(len(self.ids), last)
        for layer, sure_T in zip(reversed(layers), reversed(sure_ET), strict=True):
            leaves_T[sure_T] = layer
        return leaves_T

    def table(self, *, first: int = 0, count: int = 12, width: int | None = None) -> str:
        """Layers (deepest first) by positions first .. first + count - 1, as text.

        Each cell is the layer's choice with its probability in percent; `*` marks agreement with
        the final layer. width: characters of a line, at which wider tables are cut into several.
        """
        columns = self.columns(first, count)
        rows = [["read", *(show(self.tokens[t]) for t in columns)]]
        if self.fused is not None:
            rows.append(["fused", *(show(self.fused_names[t]) for t in columns)])
        for n in reversed(range(len(self.top))):
            rows.append([f"layer {n}" if n else "embed",
                         *(f"{show(self.names[n][t])} {100 * self.probability[n, t]:.0f}"
                           f"{'*' if self.agreement[n, t] else ''}" for t in columns)])
        head, *columns = zip(*rows, strict=True)
        parts, used = [[head]], max(map(cells, head))
        for column in columns:
            needs = 2 + max(map(cells, column))
            if width is not None and used + needs > width and len(parts[-1]) > 1:
                parts.append([head])
                used = max(map(cells, head))
            parts[-1].append(column)
            used += needs
        return "\n\n".join(map(_aligned, parts))

    def columns(self, first: int, count: int) -> range:
        """Positions first .. first + count - 1, as far as the text goes."""
        first = Whole(0, len(self.tokens) - 1, hint="it is the first position of the text to show")("first", first)
        count = Whole(1, hint="it counts the positions to show")("count", count)
        return range(first, min(first + count, len(self.tokens)))


def _aligned(columns: list[tuple[str, ...]]) -> str:
    """Columns of cells as lines."""
    widths = [max(map(cells, column)) for column in columns]
    rows = ("  ".join(cell + " " * (width - cells(cell)) for cell, width in zip(row, widths, strict=True))
            for row in zip(*columns, strict=True))
    return "\n".join(row.rstrip() for row in rows)


def cells(text: str) -> int:
    """The columns of a terminal that a text takes: two for what is wide in East Asia, none for combining marks."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


_SHAPES = {" ": "·", "\n": "⏎", "\t": "⇥"}


def show(name: str) -> str:
    """A token's name on one line, everything visible.

    Blanks, line breaks and tabs have signs. What would be invisible, or act on the text around it (control
    characters, marks of direction, blanks of other kinds), is spelled as Python does; a combining mark at
    the beginning stands on a dotted circle.
    """
    shown = "".join(_SHAPES.get(c) or (_spelled(c) if unicodedata.category(c) in _UNSEEN else c) for c in name)
    return "◌" + shown if shown and unicodedata.category(shown[0])[0] == "M" else shown or "∅"


_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs")


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def look(build: Build, params: Any, ids: np.ndarray, *, fusion, name_token: Callable[[int], str]) -> Lens:
    """The lens over token ids [T]. The text is padded to a bucket, so nearby lengths share a program."""
    padded_T = np.zeros(bucket(len(ids)), np.int32)
    padded_T[:len(ids)] = ids
    (best, probability, entropy, final_probability), fused = fetched(_say(build, params, padded_T, fusion))
    by_layer = lambda x: x[:len(ids)].swapaxes(0, 1)  # noqa: E731
    fused_best, fused_probability = (None, None) if fused is None else (x[:len(ids)] for x in fused)
    best = by_layer(best)
    seen = np.unique(np.concatenate([x.ravel() for x in (ids, best, fused_best) if x is not None]))
    return Lens(
        ids=ids, best=best, best_probability=by_layer(probability), entropy=by_layer(entropy),
        final_probability=by_layer(final_probability), name_of={i: name_token(i) for i in seen.tolist()},
        vocabulary=build.outline.shared_head.vocabulary, fusion=None if fusion is None else type(fusion).__name__,
        fused_best=fused_best, fused_probability=fused_probability)


@bounded(rows=(), settings=("fusion",))
def _say(build: Build, params, ids_T, fusion):
    network = build(params)
    positions_1T = jnp.arange(ids_T.shape[0])[None]
    h0 = network.embed(ids_T[None], positions_1T)
    readout, layers = Readout(network), network.num_layers + 1
    states, *_ = readout.run_layers(h0, positions_1T, None, None, 0, network.num_layers)
    states_TD = {n: h[0] for n, h in (states | {0: h0}).items()}
    head = readout.head(network.num_layers)

    def best(logits_PV, logp_PV):
        """The likeliest tokens and their probabilities; by the logits, since rounding makes ties among the others."""
        ids_PK = jax.lax.top_k(logits_PV, min(BEST, logits_PV.shape[-1]))[1]
        return ids_PK, jnp.exp(jnp.take_along_axis(logp_PV, ids_PK, axis=-1))

    def describe(logits_PV, final_top_P):
        logp_PV = jax.nn.log_softmax(logits_PV, axis=-1)
        p_PV = jnp.exp(logp_PV)
        entropy_P = -jnp.sum(jnp.where(p_PV > 0, p_PV * logp_PV, 0), axis=-1)
        of_final_P = jnp.take_along_axis(p_PV, final_top_P[:, None], axis=-1)[:, 0]
        return *best(logits_PV, logp_PV), entropy_P, of_final_P

    def places(states_PD):
        """One layer's logits at a time, never those of all; the final layer's first, for its choice."""
        h_CPD = jnp.stack([readout.pre_logits(states_PD, n) for n in range(layers)])
        final_PV = head.project(h_CPD[-1])
        final_top_P = jnp.argmax(final_PV, axis=-1)
        final = describe(final_PV, final_top_P)
        early = jax.lax.map(lambda h_PD: describe(head.project(h_PD), final_top_P), h_CPD[:-1])
        for n in range(network.num_layers):
            if readout.own_projection(n) is not None:
                said = describe(readout.head(n).project(h_CPD[n]), final_top_P)
                early = jax.tree.map(lambda rows_EP, row_P, n=n: rows_EP.at[n].set(row_P), early, said)
        return jax.tree.map(lambda early_EP, final_P: jnp.concatenate([early_EP, final_P[None]]).swapaxes(0, 1),
                            early, final)

    def fused(states_PD):
        logits_PV = readout.fuse(fusion, states_PD, network.num_layers)
        return best(logits_PV, jax.nn.log_softmax(logits_PV, axis=-1))

    said = map_places(places, (states_TD,), head.vocabulary)
    if fusion is None:
        return said, None
    return said, map_places(fused, (states_TD,), head.vocabulary * layers)
