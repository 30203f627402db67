"""The lens page: what its numbers are, and that the table stands by itself."""

import json
import os
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lens_samples import LAYERS, LENS, ODD, TOKENS, made
from scipy.special import entr, softmax

import sled
from sled.errors import SettingError
from sled.lens.lens import BEST, show
from sled.models import load_folder


class Reader(HTMLParser):
    """The page's table as rows of cells (tag, attributes, text), its elements, and the text of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.rows, self.scripts, self.open = [], [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td", "script"):
            self.open = [tag, dict(attrs), ""]
            (self.scripts if tag == "script" else self.rows[-1]).append(self.open)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[0]:
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.open[2] += data

    def attributes(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


# What the numbers are.

def test_a_lens_keeps_the_best_tokens_and_tokens_leave_where_generation_lets_them(tiny_folder):
    lm, model = sled.load(tiny_folder("llama")), load_folder(tiny_folder("llama"))
    fusion, exits, asked = sled.SLED(rate=3.0), sled.EarlyExit(1, threshold=0.1), [3, 14, 15, 9]
    out = lm.generate(asked, exits=exits, max_new_tokens=12)
    ids = asked + out.tokens[0]
    lens = lm.lens(ids, fusion=fusion)
    # The first new token comes after the prompt's last, and a prompt's tokens leave nowhere.
    assert lens.exits(0.1, 1)[len(asked):-1].tolist() == out.exit_layers[0][1:]
    assert len(set(out.exit_layers[0][1:])) > 1

    early = fusion.early_layers(3, tied=False)
    assert not fusion.norm_early  # so they go into the fusion as they are

    @jax.jit
    def by_the_book(ids_1T):
        states_NTD = model.hidden_states(ids_1T)[:, 0]
        h_TCD = jnp.stack([*(states_NTD[n] for n in early), model.normalise(states_NTD[-1])], axis=1)
        fused_TV = jax.nn.softmax(fusion.logits(h_TCD, model.shared_head))
        return model.normalise(states_NTD) @ model.shared_head.w_VD.T, fused_TV

    logits, fused = map(np.float64, by_the_book(jnp.array([ids])))
    p = softmax(logits, axis=-1)
    order = np.argsort(-p, axis=-1)
    np.testing.assert_array_equal(lens.best, order[..., :BEST])
    np.testing.assert_allclose(lens.best_probability, np.take_along_axis(p, order, -1)[..., :BEST], rtol=2e-4)
    np.testing.assert_allclose(lens.entropy, entr(p).sum(-1), rtol=2e-4)
    of_last = np.take_along_axis(p, np.broadcast_to(order[-1, :, :1], (*order.shape[:2], 1)), -1)[..., 0]
    np.testing.assert_allclose(lens.final_probability, of_last, rtol=2e-4)
    np.testing.assert_array_equal(lens.fused, fused.argmax(-1))
    np.testing.assert_allclose(lens.fused_probability, np.sort(fused)[:, :-BEST - 1:-1], rtol=2e-3, atol=1e-6)
    assert (lens.fusion, lens.vocabulary, lens.tokens) == ("SLED", 48, [str(i) for i in ids])


def test_exits_and_prediction_depths_by_hand():
    for threshold, layers in ((0.5, None), (0.8, (2, 4)), (0.0, 3), (1.0, None)):
        allowed = range(1, LAYERS) if layers is None else np.atleast_1d(layers)
        expected = [next((n for n in allowed if LENS.probability[n, t] > threshold), LAYERS) for t in range(TOKENS)]
        assert LENS.exits(threshold, layers).tolist() == expected
    assert made(layers=1).exits(0.1).tolist() == [1] * TOKENS
    assert LENS.agrees_from.tolist() == [
        min(n for n in range(LAYERS + 1) if LENS.agreement[n:, t].all()) for t in range(TOKENS)]


@pytest.mark.parametrize(("name", "shown"), [
    (" a b", "·a·b"), ("\r\n\t", "\\r⏎⇥"), ("", "∅"), ("\x1b[0m\x7f", "\\x1b[0m\\x7f"), ("\u202e", "\\u202e"),
    ("\u0301", "◌\u0301"), ("e\u0301", "e\u0301"), ("\u200bx\u00a0", "\\u200bx\\xa0"), ("\ud800", "\\ud800"),
    ("שלום", "שלום"), ("😀", "😀")])
def test_names_are_visible(name, shown):
    assert show(name) == shown


# The page as it stands, without a browser.

def test_the_table_stands_by_itself():
    page = sled.lens.page(LENS, title="A <title> & more", threshold=0.6, layers=(2, 3))
    read = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and read.attributes("html") == [{"lang": "en"}]
    assert "<title>A &lt;title&gt; &amp; more</title>" in page and "<h1>A &lt;title&gt; &amp; more</h1>" in page
    assert [tag for tag, _ in read.elements].count("caption") == 1
    head, fused, leaves, agrees_from, *layers = read.rows
    assert [cell[0] for cell in head] == ["th"] * (TOKENS + 1) and all(cell[1]["scope"] == "col" for cell in head)
    assert [cell[2] for cell in head[1:]] == [f"{t}{show(LENS.tokens[t])}" for t in range(TOKENS)]
    for row in read.rows[1:]:
        assert [cell[0] for cell in row] == ["th", *["td"] * TOKENS] and row[0][1] == {"scope": "row"}
    assert [row[0][2].replace("\xad", "") for row in layers] == [
        "layer 5 (last)", "layer 4", "layer 3", "layer 2", "layer 1", "embeddings"]
    expected = LENS.exits(0.6, (2, 3))
    for n, row in zip(reversed(range(LAYERS + 1)), layers, strict=True):
        for t, (_, attributes, text) in enumerate(row[1:]):
            exit, same = n == expected[t] < LAYERS, bool(LENS.agreement[n, t])
            percent = f"{100 * float(LENS.probability[n, t]):.0f}%"
            assert text == show(LENS.names[n][t]) + percent + " ✓" * same + "exit" * bool(exit)
            classes = attributes["class"].split()
            assert ("exit" in classes) == exit and ("same" in classes) == same
            assert ("agrees-from" in classes) == (LENS.agrees_from[t] == n)
            assert f"s{min(9, int(10 * float(LENS.probability[n, t])))}" in classes
    for t in range(TOKENS):
        n, changed = expected[t], bool(LENS.fused[t] != LENS.top[-1, t])
        assert fused[t + 1][2] == show(LENS.fused_names[t]) + "≠ last" * changed
        assert (fused[t + 1][1].get("class") == "changed") == changed
        says = "last layer" if n == LAYERS else f"layer {n} {'✓' if LENS.agreement[n, t] else '≠'}"
        assert leaves[t + 1][2] == says
        assert agrees_from[t + 1][2] == (f"layer {LENS.agrees_from[t]}" if LENS.agrees_from[t] else "embeddings")
    early = expected < LAYERS
    right = LENS.agreement[expected, np.arange(TOKENS)][early].sum()
    assert (f"At threshold 0.6, {early.sum()} of {TOKENS} tokens leave early, after {expected.mean():.1f} of {LAYERS} "
            f"layers on average; {right} of these {early.sum()} choices") in page


def test_nothing_in_a_token_becomes_markup():
    page = sled.lens.page(LENS)
    read = Reader(page)
    assert page.lower().count("<script") == page.lower().count("</script") == len(read.scripts) == 2
    assert not [c for c in page if not c.isprintable() and c not in "\n"]
    assert page.encode()  # no half characters
    assert {a["href"] for a in read.attributes("a")} <= {f"#at{t}" for t in range(TOKENS)}
    given = {key for _, attributes in read.elements for key in attributes}
    assert not given & {"src", "srcset", "action", "style"} and not [key for key in given if key.startswith("on")]
    data = json.loads(read.scripts[0][2])
    assert set(data["names"]) == {show(name) for name in ODD}
    assert "\ud800" not in sled.lens.page(LENS, title="a\ud800") and sled.lens.page(LENS, title="a\ud800").encode()


def test_a_lens_without_fusion_has_no_row_for_it():
    read = Reader(sled.lens.page(made(fusion=None)))
    assert [row[0][2] for row in read.rows[:3]] == ["token read", "leaves after", "agrees from"]
    assert "corrections" not in {attributes.get("id") for _, attributes in read.elements}


def test_long_texts_show_their_last_part_and_say_so(monkeypatch):
    monkeypatch.setattr("sled.lens.html.CELLS", 10 * (LAYERS + 1) + 1)
    page = sled.lens.page(LENS)
    assert "The last 10 positions are shown; positions 0 to 19 are left out" in page
    positions = lambda page: [cell[1]["id"] for cell in Reader(page).rows[0][1:]]  # noqa: E731
    assert positions(page) == [f"at{t}" for t in range(20, 30)]
    assert positions(sled.lens.page(LENS, first=3, count=4)) == ["at3", "at4", "at5", "at6"]
    assert positions(sled.lens.page(LENS, first=TOKENS - 1, count=9)) == ["at29"]
    with pytest.raises(SettingError, match=r"count is 11, but a page holds 10 positions .* 5 layers; .*first"):
        sled.lens.page(LENS, count=11)


def test_a_picture_or_page_too_large_is_not_made(monkeypatch, tmp_path):
    monkeypatch.setattr("sled.lens.plot.CELL_WIDTH", 100)
    with pytest.raises(SettingError, match=f"{TOKENS} positions"):
        sled.lens.picture(LENS, tmp_path / "x.png")
    assert len(sled.lens.page(made(100, 32)).encode()) < 1_000_000


@pytest.mark.parametrize(("arguments", "says"), [
    (dict(threshold=1.5), "threshold is 1.5, but must be a number in"),
    (dict(layers=(2, 5)), "5 is no early exit of a model of 5 layers"), (dict(layers=0), "layers is 0"),
    (dict(first=30), "first is 30"), (dict(first=-1), "first is -1"), (dict(count=0), "count is 0"),
    (dict(path="tests"), "cannot be written")])
def test_bad_settings_are_named(arguments, says):
    with pytest.raises(SettingError, match=says):
        sled.lens.page(LENS, **arguments)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "lens.html"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SettingError, match=r"lens\.html', which cannot be written \(No space left"):
            sled.lens.page(LENS, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "link.html").symlink_to(path)
    sled.lens.page(LENS, tmp_path / "link.html")
    assert path.read_text(encoding="utf-8") == sled.lens.page(LENS) and len(list(tmp_path.iterdir())) == 2
    assert sled.lens.page(LENS, path) == path


def test_the_command_writes_the_page(command, tmp_path):
    path = tmp_path / "lens.html"
    code, out, _ = command("lens", "Question: 2*3?\\n", "--html", str(path))
    whole = len(Reader(path.read_text(encoding="utf-8")).rows[0])
    assert code == 0 and f"page: {path}" in out
    assert command("lens", "Question: 2*3?\\n", "--html", str(path), "--last", "2")[0] == 0
    assert len(Reader(path.read_text(encoding="utf-8")).rows[0]) == 3 < whole
    code, _, err = command("lens", "x", "--html", str(tmp_path))
    assert code == 1 and "--html" in err
