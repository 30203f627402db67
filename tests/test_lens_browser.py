"""The lens page in a browser: exits, shading, keys, details, colours, paper."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from lens_samples import LAYERS, LENS, ODD, TOKENS, contrast

import sled
from sled.lens.lens import show


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
def url(tmp_path_factory):
    return sled.lens.page(LENS, tmp_path_factory.mktemp("page") / "lens.html").as_uri()


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


def test_a_threshold_marks_as_a_page_made_with_it(visit, tmp_path):
    tab = visit()
    before = tab.evaluate(TABLE)
    tab.locator("#layers").evaluate("e => e.parentElement.open = true")
    for n in (1, 4):
        tab.uncheck(f"#layers input[value='{n}']")
    tab.fill("#threshold", "0.35")
    assert tab.input_value("#slider") == "0.35"
    other = visit(sled.lens.page(LENS, tmp_path / "x.html", threshold=0.35, layers=(2, 3)).as_uri())
    assert tab.evaluate(TABLE) == other.evaluate(TABLE) != before
    assert tab.text_content("#outcome") == other.text_content("#outcome")
    assert tab.text_content("#chosen") == other.text_content("#chosen") == "2, 3"
    expected = LENS.exits(0.35, (2, 3))
    marks = tab.evaluate("""[...document.querySelectorAll("td.exit")].map(cell =>
        [cell.cellIndex - 1, Number(cell.parentElement.dataset.what)])""")
    assert sorted(marks) == [[t, n] for t, n in enumerate(expected.tolist()) if n < LAYERS]
    tab.fill("#threshold", "")  # no number, no change
    assert tab.evaluate(TABLE) == other.evaluate(TABLE)
    for n in (1, 4):
        tab.check(f"#layers input[value='{n}']")
    tab.locator("#slider").fill("0.9")
    assert tab.evaluate(TABLE) == before


def test_shading_shows_what_is_chosen(visit):
    tab = visit()
    before = tab.evaluate(TABLE)
    ways = {"entropy": (1 - LENS.entropy / np.log(len(ODD)), "{:.2f}", LENS.entropy),
            "agreement": (LENS.final_probability, "{:.0%}", LENS.final_probability)}
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


def test_the_keyboard_walks_the_grid(visit):
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


def test_the_details_of_a_cell(visit):
    tab = visit()
    n, t = 2, 4
    tab.click(f"tr[data-what='{n}'] td:nth-child({t + 2})")
    expected = [[show(LENS.name_of[i]), f"{100 * p:.2f}%"]
                for i, p in zip(LENS.best[n, t].tolist(), LENS.best_probability[n, t].tolist(), strict=True) if p > 0]
    found = [row.locator("td").all_text_contents() for row in tab.locator("#about tbody tr").all()]
    assert found == expected and tab.text_content("#where") == "Layer 2"
    said = tab.text_content("#said").replace("\u2068", "").replace("\u2069", "")
    for name, p in expected:
        assert f"“{name}” {p}" in said
    assert f"after token {t}, “{show(LENS.tokens[t])}”" in said and f"{LENS.entropy[n, t]:.2f} nats" in said
    assert ("makes the same choice" in said) == LENS.agreement[n, t]
    assert tab.get_attribute("#said", "aria-live") == "polite"
    tab.click("#corrections a >> nth=1")
    assert tab.text_content("#where") == "SLED" and "corrects it" in tab.text_content("#about")
    assert tab.locator("td:focus").evaluate("e => [e.parentElement.dataset.what, e.cellIndex]") == ["fused", 8]


def test_without_javascript_the_table_stands(visit):
    tab = visit(java_script_enabled=False)
    assert tab.locator("#grid").is_visible() and not tab.locator("#controls").is_visible()
    assert not tab.locator("#details").is_visible() and tab.locator("noscript").is_visible()
    assert tab.locator("td.exit").count() == (LENS.exits(0.9) < LAYERS).sum()
    tab.focus("#frame")  # scrolls by keys


COLOURS = """(selectors) => Object.fromEntries(selectors.map(selector => {
    const element = document.querySelector(selector), style = getComputedStyle(element);
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    return [selector, [style.color, getComputedStyle(behind).backgroundColor, style.outlineColor].map(numbers)];
}))"""


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
