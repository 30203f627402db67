"""The lens page: what its numbers are, that the table stands by itself, and what a browser makes of it."""

import json
import os
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sled
from sled import cli
from sled.errors import SettingError
from sled.fusion import SharedHead
from sled.lens.lens import BEST, Lens, show
from sled.models import load_folder

ODD = ["plain", "<b>&amp;\"'", "</script><!--<script>", "\n\n", "\t", " a", "", "\x1b[31m\x00", "\u202eevil",
       "שלום", "\u0301", "e\u0301", "<0xE2>", "âĢ", "w" * 80, "\u200b", "😀", "\u00a0", "日本語", "\ud800", "${title}",
       "\u2028"]
LAYERS, TOKENS = 5, 30


def made(tokens=TOKENS, layers=LAYERS, *, fusion="SLED") -> Lens:
    """A lens of random numbers, whose tokens have names to stumble over; layers agree often, probabilities spread."""
    random = np.random.RandomState(3)
    shape = (layers + 1, tokens)
    probability = -np.sort(-random.dirichlet(np.full(8, 0.15), shape), axis=-1)[..., :BEST].astype(np.float32)
    best = np.argsort(random.rand(*shape, len(ODD)), axis=-1)[..., :BEST]
    best = np.where(random.rand(*shape, 1) < 0.6, best[-1], best)
    of_last = np.where(best[..., 0] == best[-1, :, 0], probability[..., 0], 0.01).astype(np.float32)
    fused = best[-1].copy()
    fused[::7] = fused[::7, ::-1]
    return Lens(ids=np.arange(tokens) % len(ODD), best=best, best_probability=probability,
                entropy=random.uniform(0, np.log(len(ODD)), shape).astype(np.float32),
                final_probability=of_last, name_of=dict(enumerate(ODD)), vocabulary=len(ODD), fusion=fusion,
                fused_best=fusion and fused, fused_probability=fusion and probability[-1])


@pytest.fixture(scope="module")
def lens():
    return made()


class Reader(HTMLParser):
    """The page's table as rows of (tag, attributes, text), its elements, and the text of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.rows, self.scripts, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append([tag, dict(attrs), ""])
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "th" in self.open or "td" in self.open:
            self.rows[-1][-1][2] += data

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
        fused_TV = jax.nn.softmax(fusion.logits(h_TCD, SharedHead(model.head_weight)))
        return model.normalise(states_NTD) @ model.head_weight.T, fused_TV

    logits, fused = map(np.float64, by_the_book(jnp.array([ids])))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    np.testing.assert_array_equal(lens.best, order[..., :BEST])
    np.testing.assert_allclose(lens.best_probability, np.take_along_axis(p, order, -1)[..., :BEST], rtol=2e-4)
    np.testing.assert_allclose(lens.entropy, -(p * np.log(p)).sum(-1), rtol=2e-4)
    of_last = np.take_along_axis(p, np.broadcast_to(order[-1, :, :1], (*order.shape[:2], 1)), -1)[..., 0]
    np.testing.assert_allclose(lens.final_probability, of_last, rtol=2e-4)
    np.testing.assert_array_equal(lens.fused, fused.argmax(-1))
    np.testing.assert_allclose(lens.fused_probability, np.sort(fused)[:, :-BEST - 1:-1], rtol=2e-3, atol=1e-6)
    assert (lens.fusion, lens.vocabulary, lens.tokens) == ("SLED", 48, [str(i) for i in ids])


def test_exits_by_hand(lens):
    for threshold, layers in ((0.5, None), (0.8, (2, 4)), (0.0, 3), (1.0, None)):
        allowed = range(1, LAYERS) if layers is None else np.atleast_1d(layers)
        expected = [next((n for n in allowed if lens.probability[n, t] > threshold), LAYERS) for t in range(TOKENS)]
        assert lens.exits(threshold, layers).tolist() == expected
    assert made(layers=1).exits(0.1).tolist() == [1] * TOKENS


@pytest.mark.parametrize(("name", "shown"), [
    (" a b", "·a·b"), ("\r\n\t", "\\r⏎⇥"), ("", "∅"), ("\x1b[0m\x7f", "\\x1b[0m\\x7f"), ("\u202e", "\\u202e"),
    ("\u0301", "◌\u0301"), ("e\u0301", "e\u0301"), ("\u200bx\u00a0", "\\u200bx\\xa0"), ("\ud800", "\\ud800"),
    ("שלום", "שלום"), ("😀", "😀")])
def test_names_are_visible(name, shown):
    assert show(name) == shown


# The page as it stands, without a browser.

def test_the_table_stands_by_itself(lens):
    page = sled.lens.page(lens, title="A <title> & more", threshold=0.6, layers=(2, 3))
    read = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and read.attributes("html") == [{"lang": "en"}]
    assert "<title>A &lt;title&gt; &amp; more</title>" in page and "<h1>A &lt;title&gt; &amp; more</h1>" in page
    assert [tag for tag, _ in read.elements].count("caption") == 1
    head, fused, leaves, agrees_from, *layers = read.rows
    assert [cell[0] for cell in head] == ["th"] * (TOKENS + 1) and all(cell[1]["scope"] == "col" for cell in head)
    assert [cell[2] for cell in head[1:]] == [f"{t}{show(lens.tokens[t])}" for t in range(TOKENS)]
    for row in read.rows[1:]:
        assert [cell[0] for cell in row] == ["th", *["td"] * TOKENS] and row[0][1] == {"scope": "row"}
    assert [row[0][2].replace("\xad", "") for row in layers] == [
        "layer 5 (last)", "layer 4", "layer 3", "layer 2", "layer 1", "embeddings"]
    expected = lens.exits(0.6, (2, 3))
    for n, row in zip(reversed(range(LAYERS + 1)), layers, strict=True):
        for t, (_, attributes, text) in enumerate(row[1:]):
            exit, same = n == expected[t] < LAYERS, bool(lens.agreement[n, t])
            percent = f"{100 * float(lens.probability[n, t]):.0f}%"
            assert text == show(lens.names[n][t]) + percent + " ✓" * same + "exit" * bool(exit)
            classes = attributes["class"].split()
            assert ("exit" in classes) == exit and ("same" in classes) == same
            assert ("agrees-from" in classes) == (lens.agrees_from[t] == n)
            assert f"s{min(9, int(10 * float(lens.probability[n, t])))}" in classes
    for t in range(TOKENS):
        n, changed = expected[t], bool(lens.fused[t] != lens.top[-1, t])
        assert fused[t + 1][2] == show(lens.fused_names[t]) + "≠ last" * changed
        assert (fused[t + 1][1].get("class") == "changed") == changed
        says = "last layer" if n == LAYERS else f"layer {n} {'✓' if lens.agreement[n, t] else '≠'}"
        assert leaves[t + 1][2] == says
        assert agrees_from[t + 1][2] == (f"layer {lens.agrees_from[t]}" if lens.agrees_from[t] else "embeddings")
    early = expected < LAYERS
    right = lens.agreement[expected, np.arange(TOKENS)][early].sum()
    assert (f"At threshold 0.6, {early.sum()} of {TOKENS} tokens leave early, after {expected.mean():.1f} of {LAYERS} "
            f"layers on average; {right} of these {early.sum()} choices") in page


def test_nothing_in_a_token_becomes_markup(lens):
    page = sled.lens.page(lens)
    read = Reader(page)
    assert page.lower().count("<script") == page.lower().count("</script") == len(read.scripts) == 2
    assert not [c for c in page if not c.isprintable() and c not in "\n"]
    assert page.encode()  # no half characters
    assert {a["href"] for a in read.attributes("a")} <= {f"#at{t}" for t in range(TOKENS)}
    given = {key for _, attributes in read.elements for key in attributes}
    assert not given & {"src", "srcset", "action", "style"} and not [key for key in given if key.startswith("on")]
    data = json.loads(read.scripts[0])
    assert set(data["names"]) == {show(name) for name in ODD}
    assert "\ud800" not in sled.lens.page(lens, title="a\ud800") and sled.lens.page(lens, title="a\ud800").encode()


def test_a_lens_without_fusion_has_no_row_for_it():
    read = Reader(sled.lens.page(made(fusion=None)))
    assert [row[0][2] for row in read.rows[:3]] == ["token read", "leaves after", "agrees from"]
    assert "corrections" not in {attributes.get("id") for _, attributes in read.elements}


def test_long_texts_show_their_last_part_and_say_so(lens, monkeypatch):
    monkeypatch.setattr("sled.lens.html.CELLS", 10 * (LAYERS + 1) + 1)
    page = sled.lens.page(lens)
    assert "The last 10 positions are shown; positions 0 to 19 are left out" in page
    positions = lambda page: [cell[1]["id"] for cell in Reader(page).rows[0][1:]]  # noqa: E731
    assert positions(page) == [f"at{t}" for t in range(20, 30)]
    assert positions(sled.lens.page(lens, first=3, count=4)) == ["at3", "at4", "at5", "at6"]
    with pytest.raises(SettingError, match=r"count is 11, but a page holds 10 positions .* 5 layers; .*first"):
        sled.lens.page(lens, count=11)


def test_pages_stay_small():
    assert len(sled.lens.page(made(100, 32)).encode()) < 1_000_000


@pytest.mark.parametrize(("arguments", "says"), [
    (dict(threshold=1.5), "threshold is 1.5, but must be a number in"),
    (dict(layers=(2, 5)), "5 is no early exit of a model of 5 layers"), (dict(layers=0), "layers is 0"),
    (dict(first=30), "first is 30"), (dict(count=0), "count is 0"), (dict(path="tests"), "cannot be written")])
def test_bad_settings_are_named(lens, arguments, says):
    with pytest.raises(SettingError, match=says):
        sled.lens.page(lens, **arguments)


def test_a_page_is_written_whole_or_not_at_all(lens, tmp_path, monkeypatch):
    path = tmp_path / "lens.html"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SettingError, match=r"lens\.html', which cannot be written \(No space left"):
            sled.lens.page(lens, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "link.html").symlink_to(path)
    sled.lens.page(lens, tmp_path / "link.html")
    assert path.read_text(encoding="utf-8") == sled.lens.page(lens) and len(list(tmp_path.iterdir())) == 2
    assert sled.lens.page(lens, path) == path


def test_the_command_writes_the_page(capsys, tmp_path):
    path = tmp_path / "new" / "lens.html"
    assert cli.main(["lens", "Question: 2*3?\\n", "--html", str(path)]) == 0
    assert f"page: {path}" in capsys.readouterr().out
    whole = len(Reader(path.read_text(encoding="utf-8")).rows[0])
    assert cli.main(["lens", "Question: 2*3?\\n", "--html", str(path), "--last", "2"]) == 0
    assert len(Reader(path.read_text(encoding="utf-8")).rows[0]) == 3 < whole
    assert cli.main(["lens", "x", "--html", str(tmp_path)]) == 1
    assert "--html" in capsys.readouterr().err


# The page in a browser.

@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="the page in a browser needs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the page in a browser needs chromium or google-chrome")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(lens, tmp_path_factory):
    return sled.lens.page(lens, tmp_path_factory.mktemp("page") / "lens.html").as_uri()


@pytest.fixture
def visit(browser, url):
    """`visit(**context)`: the page in a new tab. At the end: none said anything on the console or loaded more."""
    contexts, said, requests, pages = [], [], [], []

    def visit(url=url, **settings):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **settings})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        pages.append(url)
        tab.goto(url)
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert said == [] and requests == pages


TABLE = """[...document.querySelectorAll("#grid tbody tr")].map(row => [...row.cells].map(cell =>
    [cell.className.replace(/current|here/g, "").split(/\\s+/).filter(Boolean).sort().join(" "), cell.textContent]))"""


def test_a_threshold_marks_as_a_page_made_with_it(visit, lens, tmp_path):
    tab = visit()
    before = tab.evaluate(TABLE)
    tab.locator("#layers").evaluate("e => e.parentElement.open = true")
    for n in (1, 4):
        tab.uncheck(f"#layers input[value='{n}']")
    tab.fill("#threshold", "0.35")
    assert tab.input_value("#slider") == "0.35"
    other = visit(sled.lens.page(lens, tmp_path / "x.html", threshold=0.35, layers=(2, 3)).as_uri())
    assert tab.evaluate(TABLE) == other.evaluate(TABLE) != before
    assert tab.text_content("#outcome") == other.text_content("#outcome")
    assert tab.text_content("#chosen") == other.text_content("#chosen") == "2, 3"
    expected = lens.exits(0.35, (2, 3))
    marks = tab.evaluate("""[...document.querySelectorAll("td.exit")].map(cell =>
        [cell.cellIndex - 1, Number(cell.parentElement.dataset.what)])""")
    assert sorted(marks) == [[t, n] for t, n in enumerate(expected.tolist()) if n < LAYERS]
    tab.fill("#threshold", "")  # no number, no change
    assert tab.evaluate(TABLE) == other.evaluate(TABLE)
    for n in (1, 4):
        tab.check(f"#layers input[value='{n}']")
    tab.locator("#slider").fill("0.9")
    assert tab.evaluate(TABLE) == before


def test_shading_shows_what_is_chosen(visit, lens):
    tab = visit()
    before = tab.evaluate(TABLE)
    ways = {"entropy": (1 - lens.entropy / np.log(len(ODD)), "{:.2f}", lens.entropy),
            "agreement": (lens.final_probability, "{:.0%}", lens.final_probability)}
    for name, (sure, form, numbers) in ways.items():
        tab.check(f"input[value={name}]")
        assert name in tab.text_content("#shown").lower()
        rows = tab.evaluate(TABLE)[3:][::-1]
        for n, t in ((0, 0), (3, 7), (LAYERS, TOKENS - 1)):
            classes, shown = rows[n][t + 1]
            assert f"s{int(10 * float(sure[n, t]))}" in classes.split()
            assert form.format(float(numbers[n, t])) in shown
    tab.check("input[value=confidence]")
    assert tab.evaluate(TABLE) == before


def test_the_keyboard_walks_the_grid(visit, lens):
    tab = visit()
    assert tab.get_by_role("grid", name="What each layer would say").count() == 1
    assert tab.get_by_role("gridcell").count() == TOKENS * (LAYERS + 4)
    assert tab.get_by_role("rowheader").count() == LAYERS + 4 and tab.get_by_role("columnheader").count() == TOKENS + 3
    where = "(e => [e.parentElement.dataset.what, e.cellIndex - 1])(document.activeElement)"
    assert tab.text_content("#said") == ""
    tab.focus("#grid td[tabindex='0']")
    assert tab.evaluate(where) == ["5", 0]
    for keys, expected in (
            ("ArrowDown ArrowRight ArrowRight", ["4", 2]), ("ArrowLeft ArrowUp", ["5", 1]), ("End", ["5", TOKENS - 1]),
            ("ArrowRight", ["5", TOKENS - 1]), ("Home", ["5", 0]), ("ArrowLeft", ["5", 0]), ("PageDown", ["0", 0]),
            ("ArrowDown", ["0", 0]), ("PageUp", ["5", 0]), ("Control+Home ArrowUp", ["fused", 0]),
            ("Control+End", ["0", TOKENS - 1]), ("ArrowUp ArrowUp ArrowUp", ["3", TOKENS - 1])):
        for key in keys.split():
            tab.keyboard.press(key)
        assert tab.evaluate(where) == expected, keys
        assert tab.locator("#grid td[tabindex='0']").count() == 1
    # What is focused is neither behind the fixed headers nor out of the frame, and has its ring.
    cell, frame, head = (tab.locator(at).bounding_box() for at in ("td:focus", "#frame", "#grid [data-what='3'] th"))
    assert head["x"] + head["width"] - 1 <= cell["x"] and cell["x"] + cell["width"] <= frame["x"] + frame["width"] + 1
    ring = tab.locator("td:focus").evaluate("e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth]")
    assert ring == ["solid", "3px"]
    tab.keyboard.press("Tab")
    assert tab.locator("td:focus").count() == 0
    tab.keyboard.press("Shift+Tab")
    assert tab.evaluate(where) == ["3", TOKENS - 1]


def test_the_details_of_a_cell(visit, lens):
    tab = visit()
    n, t = 2, 4
    tab.click(f"tr[data-what='{n}'] td:nth-child({t + 2})")
    expected = [[show(lens.name_of[i]), f"{100 * p:.2f}%"]
                for i, p in zip(lens.best[n, t].tolist(), lens.best_probability[n, t].tolist(), strict=True) if p > 0]
    found = [row.locator("td").all_text_contents() for row in tab.locator("#about tbody tr").all()]
    assert found == expected and tab.text_content("#where") == "Layer 2"
    said = tab.text_content("#said").replace("\u2068", "").replace("\u2069", "")
    for name, p in expected:
        assert f"“{name}” {p}" in said
    assert f"after token {t}, “{show(lens.tokens[t])}”" in said and f"{lens.entropy[n, t]:.2f} nats" in said
    assert ("makes the same choice" in said) == lens.agreement[n, t]
    assert tab.get_attribute("#said", "aria-live") == "polite"
    tab.click("#corrections a >> nth=1")
    assert tab.text_content("#where") == "SLED" and "corrects it" in tab.text_content("#about")
    assert tab.locator("td:focus").evaluate("e => [e.parentElement.dataset.what, e.cellIndex]") == ["fused", 8]


def test_without_javascript_the_table_stands(visit, lens):
    tab = visit(java_script_enabled=False)
    assert tab.locator("#grid").is_visible() and not tab.locator("#controls").is_visible()
    assert not tab.locator("#details").is_visible() and tab.locator("noscript").is_visible()
    assert tab.locator("td.exit").count() == (lens.exits(0.9) < LAYERS).sum()
    tab.focus("#frame")  # scrolls by keys


COLOURS = """(selectors) => Object.fromEntries(selectors.map(selector => {
    const element = document.querySelector(selector), style = getComputedStyle(element);
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    return [selector, [style.color, getComputedStyle(behind).backgroundColor, style.outlineColor].map(numbers)];
}))"""


def contrast(one, other):
    """WCAG 2.2's ratio of two sRGB colours."""
    def luminance(rgb):
        c = np.array(rgb[:3]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(visit, scheme):
    tab = visit(color_scheme=scheme)
    tab.focus("#grid td[tabindex='0']")
    shades = [f"#scale li.s{n}" for n in range(10)]
    others = ["h1", "header p", "legend", "#shown", "#outcome", "#corrections a", "caption span", "thead th small",
              "thead th bdi", "th[scope=row]", "td.changed", "td.same small", "#about caption", "#about dt",
              "#about td", "#threshold", "b.exit"]
    colours = tab.evaluate(COLOURS, shades + others)
    worst = {selector: contrast(*found[:2]) for selector, found in colours.items()}
    assert min(worst.values()) >= 4.5, min(worst.items(), key=lambda item: item[1])
    # Steps are told apart by more than hue: each is darker (or each lighter) than the one before.
    against_ink = [contrast(colours[shade][1], (0, 0, 0)) for shade in shades]
    assert all((a > b) == (scheme == "light") for a, b in pairwise(against_ink))
    # Two rings around the focused cell: one of them stands out from any shade.
    ring, paper = tab.evaluate(COLOURS, ["td:focus"])["td:focus"][2], colours["h1"][1]
    assert contrast(ring, paper) >= 10
    assert all(max(contrast(colours[shade][1], ring), contrast(colours[shade][1], paper)) >= 3 for shade in shades)


def test_a_narrow_screen_scrolls_the_table_alone(visit):
    tab = visit(viewport={"width": 320, "height": 640})
    sizes = tab.evaluate("""[document.scrollingElement.scrollWidth, document.getElementById("frame").clientWidth,
                             document.getElementById("frame").scrollWidth]""")
    assert sizes[0] == 320 and sizes[1] < 320 < sizes[2]
    tab.locator("#frame").evaluate("e => { e.scrollLeft = 700; e.scrollTop = 120; }")
    frame = tab.locator("#frame").bounding_box()
    row, column = (tab.locator(at).bounding_box() for at in ("#grid [data-what='0'] th", "#grid thead th >> nth=8"))
    assert abs(row["x"] - frame["x"]) <= 2 and abs(column["y"] - frame["y"]) <= 2


def test_nothing_moves_and_paper_gets_all(visit):
    tab = visit()
    moving = tab.evaluate("""[...document.querySelectorAll("*")].filter(e => { const s = getComputedStyle(e);
        return s.transitionDuration !== "0s" || s.animationName !== "none" || s.scrollBehavior !== "auto"; }).length""")
    assert moving == 0
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not tab.locator("#frame").is_visible()
    heads = tab.locator(".sheet thead th:not(:first-child) small").all_text_contents()
    assert heads == [str(t) for t in range(TOKENS)]
    assert tab.locator(".sheet td").count() == tab.locator("#grid td").count()
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator(".sheet").count() == 0 and tab.locator("#frame").is_visible()
