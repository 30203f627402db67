"""The lens as one HTML page: a table that stands by itself, and the arrays behind it for the script to explore.

What the page looks like and does is in template.html, page.css and page.js beside this file; they are put into the
page, which loads nothing and runs no other script than its own (its Content-Security-Policy says so).
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from sled.errors import SettingError
from sled.io import replace_text
from sled.lens.lens import Lens, show

CELLS = 20_000  # layers x positions of a page: what a browser still draws without a pause that annoys


def page(lens: Lens, path: str | Path | None = None, *, title: str | None = None, threshold: float = 0.9,
         layers: int | tuple[int, ...] | None = None, first: int = 0, count: int | None = None) -> str | Path:
    """The lens as one HTML page to explore, without network: written to `path`, which is returned, or as a string.

    The page shows positions first .. first + count - 1, with what each layer says there, and marks where a token
    would leave at the given `threshold` and `layers` (see `Lens.exits`), which can be changed on the page, and where
    the fusion corrects the last layer. It reads without JavaScript too. See docs/lens.md.

    count: None shows all positions from `first` on, or of more than a page holds the last ones, and says so.

    Raises SettingError for more positions than a page holds, and where the file cannot be written.
    """
    text = _render(lens, title=title, threshold=threshold, layers=layers, first=first, count=count)
    return text if path is None else replace_text("the lens page", path, text)


def _render(lens: Lens, *, title: str | None, threshold: float, layers, first: int, count: int | None) -> str:
    title = (title or "What each layer would say next").encode(errors="replace").decode()  # a path may be no text
    shown, notice = _positions(lens, first, count)
    part = slice(shown.start, shown.stop)
    leaves = lens.exits(threshold, layers)[part]  # checks both
    threshold, depth = float(threshold), len(lens.top) - 1
    exits = list(range(1, depth)) if layers is None else sorted({*np.atleast_1d(layers).tolist()})
    read = lambda name: files("sled.lens").joinpath("assets", name).read_text(encoding="utf-8")  # noqa: E731
    script, style = read("page.js"), read("page.css")
    return Template(read("template.html")).substitute(
        title=escape(title),
        style=style, style_hash=_hash(style), script=script, script_hash=_hash(script),
        summary=f"{_number(len(lens.ids), 'token')} read by {_number(depth, 'layer')}, "
                f"which choose from a vocabulary of {lens.vocabulary:,}.",
        notice=f'<p class="notice">{notice}</p>' if notice else "",
        threshold=_short(threshold), chosen="all" if len(exits) == depth - 1 else ", ".join(map(str, exits)),
        shown="Confidence: the probability that a layer gives to its own choice.",
        outcome=_outcome(lens.agreement[:, part], leaves, threshold), corrections=_corrections(lens, shown),
        columns=len(shown), heads="".join(f'<th scope="col" id="at{t}"><small>{t}</small>{_token(lens.tokens[t])}</th>'
                                          for t in shown),
        decisions="\n".join(_decisions(lens, shown, leaves)),
        layers="\n".join(_layer(lens, n, shown, leaves) for n in reversed(range(depth + 1))),
        scale="".join(f'<li class="s{step}">{10 * step}–{10 * step + 10}%</li>' for step in range(10)),
        data=_json({**_arrays(lens, shown), "depth": depth, "columns": len(shown), "first": shown.start,
                    "kept": lens.best.shape[-1], "vocabulary": lens.vocabulary, "fusion": lens.fusion,
                    "threshold": threshold, "exits": exits, "leaves": leaves.tolist(),
                    "agreesFrom": lens.agrees_from[part].tolist()}))


def _positions(lens: Lens, first: int, count: int | None) -> tuple[range, str]:
    """The positions shown, and a notice where they are fewer than asked for by leaving `count` out."""
    most = max(1, CELLS // len(lens.top))
    shown = lens.columns(first, len(lens.ids) if count is None else count)
    if len(shown) <= most:
        return shown, ""
    if count is not None:
        raise SettingError(f"count is {count}, but a page holds {most} positions of a model of {len(lens.top) - 1} "
                           "layers; show fewer, or write several pages with first=...")
    return shown[-most:], (f"The last {most} positions are shown; positions {shown.start} to {shown[-most] - 1} are "
                           "left out, for a page holds no more. sled.lens.page shows any part by first and count.")


def _decisions(lens: Lens, shown: range, leaves: np.ndarray):
    """The rows above the layers: the fusion's choice, where a token leaves, from where on the layers agree."""
    last = lens.top[-1]
    if lens.fused is not None:
        cells = (f'<td class="changed">{_token(lens.fused_names[t])}<small>≠ last</small></td>'
                 if lens.fused[t] != last[t] else f"<td>{_token(lens.fused_names[t])}</td>" for t in shown)
        yield _row("fused", escape(lens.fusion), cells)
    depth = len(lens.top) - 1
    agrees = lens.agreement
    yield _row("leaves", "leaves after", (
        "<td>last layer</td>" if n == depth else f"<td>layer {n} ✓</td>" if agrees[n, t] else
        f'<td class="changed">layer {n} ≠</td>' for t, n in zip(shown, leaves.tolist(), strict=True)))
    yield _row("agrees-from", "agrees from", (f"<td>{'layer ' if n else ''}{n or 'embeddings'}</td>"
                                              for n in lens.agrees_from[shown.start:shown.stop].tolist()))


def _layer(lens: Lens, n: int, shown: range, leaves: np.ndarray) -> str:
    depth = len(lens.top) - 1
    agrees, agrees_from = lens.agreement[n], lens.agrees_from
    sure = lens.probability[n].astype(float)
    level = np.minimum(np.nan_to_num(10 * sure), 9).astype(int)  # half precision may overflow to NaN
    cells = []
    for t, leaves_after in zip(shown, leaves.tolist(), strict=True):
        exits = n == leaves_after < depth
        classes = [f"s{level[t]}", *["same"] * bool(agrees[t]), *["exit"] * exits,
                   *["agrees-from"] * bool(agrees_from[t] == n)]
        cells.append(f'<td class="{" ".join(classes)}">{_token(lens.names[n][t])}<small>{100 * sure[t]:.0f}%'
                     f"{' ✓' if agrees[t] else ''}</small>{'<b>exit</b>' if exits else ''}</td>")
    return _row(n, f"layer {n}{' (last)' if n == depth else ''}" if n else "embed&shy;dings", cells)


def _row(what: str | int, head: str, cells) -> str:
    return f'<tr data-what="{what}"><th scope="row">{head}</th>{"".join(cells)}</tr>'


def _corrections(lens: Lens, shown: range) -> str:
    if lens.fused is None:
        return ""
    changed = [t for t in shown if lens.fused[t] != lens.top[-1, t]]
    name = escape(lens.fusion)
    if not changed:
        return f'<p id="corrected">{name} chooses as the last layer everywhere.</p>'
    links = "".join(f'<li><a href="#at{t}" data-column="{t - shown.start}">{t}: “{_token(lens.names[-1][t])}” → '
                    f"“{_token(lens.fused_names[t])}”</a></li>" for t in changed)
    return (f'<p id="corrected">{name} corrects the last layer at {len(changed)} of {_number(len(shown), "place")}:</p>'
            f'<ul id="corrections">{links}</ul>')


def _outcome(agrees: np.ndarray, leaves: np.ndarray, threshold: float) -> str:
    """One line on the exits; page.js writes the same for other thresholds."""
    depth = len(agrees) - 1
    early = leaves < depth
    right = agrees[leaves, np.arange(len(leaves))][early].sum()
    return (f"At threshold {_short(threshold)}, {early.sum()} of {len(leaves)} tokens leave early, after "
            f"{leaves.mean():.1f} of {depth} layers on average; {right} of these {early.sum()} choices are the last "
            "layer’s.")


def _arrays(lens: Lens, shown: range) -> dict:
    """The arrays that the script computes with: float32 as they are, and tokens as indices into `names`, in base64."""
    part = slice(shown.start, shown.stop)
    arrays = {"read": lens.ids[part], "best": lens.best[:, part]}
    following = lens.ids[shown.stop:shown.stop + 1]
    if lens.fused is not None:
        arrays["fused_best"] = lens.fused_best[part]
    known = np.unique(np.concatenate([following, *(x.ravel() for x in arrays.values())]))
    numbers = {"best_probability": lens.best_probability[:, part], "entropy": lens.entropy[:, part],
               "final_probability": lens.final_probability[:, part]}
    if lens.fused is not None:
        numbers["fused_probability"] = lens.fused_probability[part]
    packed = {name: np.searchsorted(known, x).astype("<u4") for name, x in arrays.items()}
    packed |= {name: x.astype("<f4") for name, x in numbers.items()}
    return {"names": [show(lens.name_of[i]) for i in known.tolist()],
            "next": int(np.searchsorted(known, following[0])) if len(following) else None,
            **{name: base64.b64encode(np.ascontiguousarray(x)).decode() for name, x in packed.items()}}


def _json(value: dict) -> str:
    """JSON that no HTML parser takes for markup: "<" could end the script, or begin a comment in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _token(name: str) -> str:
    """In <bdi>, so that right-to-left text leaves its surroundings in order."""
    return f"<bdi>{escape(show(name))}</bdi>"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _short(number: float) -> str:
    """As JavaScript writes it."""
    return repr(number).removesuffix(".0")
