"""The built site, opened in a browser as a reader would: from files, with the network off."""

import os
import re
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs/_build/html"
SHOTS = ROOT / "build/screenshots"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.parts)
CHAPTERS = [p for p in PAGES if p.startswith("nbs/")]
READABLE = [p for p in PAGES if not p.startswith("_modules/")]
KINDS = ["index.html", "nbs/rounding/12_grid_search.html", "api/generated/data.text.html"]
MADE_ALIKE = {p for p in READABLE if p.startswith("api/generated/")} - set(KINDS)  # one template: one stands for all
OPENED = [p for p in READABLE if p not in MADE_ALIKE]

if not PAGES:
    pytest.skip("the site is not built: make docs", allow_module_level=True)


class Links(HTMLParser):
    "The links of a page, the anchors it offers, and what its folded bars say."

    def __init__(self, path):
        super().__init__()
        self.hrefs, self.ids, self.bars, self.in_bar = set(), set(), [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.hrefs |= {attrs[k] for k in ("href", "src") if attrs.get(k)}
        self.in_bar = (attrs.get("class") or "").startswith("collapsed")

    def handle_data(self, data):
        if self.in_bar:
            self.bars.append(data)
            self.in_bar = False


parsed = lru_cache(None)(Links)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_dead_link_and_is_light_and_a_chapter_can_be_taken_away(page):
    "Light: with its own images, without what all pages share. Taken away: as a download and in Colab."
    hrefs, dead = parsed(SITE / page).hrefs, []
    for href in hrefs:
        url = urlsplit(href)
        if url.scheme:
            continue
        target = (SITE / page).parent / unquote(url.path) if url.path else SITE / page
        if not target.exists():
            dead.append(href)
        elif url.fragment and target.suffix == ".html" and unquote(url.fragment) not in parsed(target.resolve()).ids:
            dead.append(href)
    assert not dead
    images = {(SITE / page).parent / unquote(h) for h in hrefs if "_images/" in h}
    assert page not in READABLE or sum(f.stat().st_size for f in {SITE / page, *images}) < 1.5e6
    if page in CHAPTERS:
        name = Path(page).with_suffix(".ipynb").as_posix()
        assert any(h.endswith("_sources/" + name) for h in hrefs)
        assert any(h.startswith("https://colab.research.google.com/") and h.endswith(name) for h in hrefs)


def test_every_chapter_is_on_the_start_page():
    hrefs = {unquote(urlsplit(h).path) for h in parsed(SITE / "index.html").hrefs}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(CHAPTERS) <= hrefs
    assert [p for p in CHAPTERS if p not in text] == []  # in the text, too, and not only in the side bar


def test_the_short_way_takes_two_hours():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    short = re.search(r"### The paper in two hours(.*?)###", text, flags=re.S)[1]
    spent = [int(n) for n in re.findall(r"^\d+\. .*\((\d+) min\)", short, flags=re.M)]
    assert len(spent) == 10 and 90 <= sum(spent) <= 135


def test_folded_bars_say_what_is_in_them():
    bars = [bar for page in CHAPTERS for bar in parsed(SITE / page).bars]
    assert len(bars) > 100 and not [bar for bar in bars if "code cell" in bar]
    assert "imports" in bars and any(bar.startswith("_check_pair: ") for bar in bars)


# --- in the browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(browser):
    "Without network. What one page has loaded (MathJax, styles) the next ones need not load again."
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    yield context
    context.close()


@pytest.fixture
def tab(window):
    "A new tab, by day, which notes what goes wrong in it."
    page = window.new_page()
    page.wrong = []
    page.on("console", lambda m: page.wrong.append(f"{m.type}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    page.on("request", lambda r: page.wrong.append(r.url) if r.url.startswith("http") else None)
    yield page
    if page.url.startswith("file:"):
        page.evaluate("() => localStorage.clear()")  # the next reader has not asked for the dark
    page.close()


def visit(tab, page):
    tab.goto((SITE / page).as_uri())
    tab.evaluate("() => window.MathJax && MathJax.startup.promise")


def shoot(tab, page, suffix=""):
    "A picture of the whole page to look at, with SHOTS=1 in the environment: it takes as long as the checks."
    if os.environ.get("SHOTS"):
        path = SHOTS / (page.removesuffix(".html").replace("/", "-") + suffix + ".png")
        tab.screenshot(path=path, full_page=True)


RAW_MATH = """() => {
  const body = (document.querySelector('article') || document.body).cloneNode(true);
  body.querySelectorAll('pre, code, script, style, mjx-container').forEach(e => e.remove());
  return body.textContent.match(/\\$\\$|\\\\\\(|\\\\\\[|\\\\(frac|mathbf|Delta|lVert|sum)\\b/g) || [];
}"""
RAW_TABLES = """() => {
  const body = (document.querySelector('article') || document.body).cloneNode(true);
  body.querySelectorAll('pre, code, script, style').forEach(e => e.remove());
  return body.textContent.match(/\\|\\s*[-\u2013\u2014]+\\s*\\|/g) || [];
}"""
UNRENDERED = """() => [...document.querySelectorAll('.math')]
  .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror, [data-mjx-error]'))
  .map(e => e.textContent)"""
BROKEN_FIGURES = """() => [...document.images]
  .filter(i => !i.naturalWidth || (i.getClientRects().length && i.getBoundingClientRect().height < 20))
  .map(i => i.src)"""
NO_ALT = "() => [...document.querySelectorAll('article img')].filter(i => !i.alt.trim()).map(i => i.src)"
ALL_BUT_COLOURS = {"rules": {"color-contrast": {"enabled": False}}}  # slow; the same on all pages of a kind
AT_REST = """() => Promise.race([
  Promise.allSettled(document.getAnimations().map(a => a.finished)),  // no colour in transit
  new Promise(done => setTimeout(done, 3000)),  // an animation that never ends
])"""
TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


def barriers(tab, inside="html", **options):
    "What axe-core finds that shuts somebody out, with the elements concerned."
    from axe_playwright_python.sync_playwright import Axe

    options |= {"resultTypes": ["violations"], "preload": False}  # a page from a file may not fetch its style sheets
    found = Axe().run(tab, context={"include": inside, "exclude": ["mjx-container"]}, options=options)
    worst = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
    return [(v["id"], v["help"], [n["html"][:200] for n in v["nodes"]][:3]) for v in worst]


def turn_dark(tab):
    tab.click(".theme-switch-button:visible")
    tab.click(".theme-change-button[data-mode=dark]:visible")
    tab.mouse.move(0, 0)
    tab.evaluate("() => document.activeElement.blur()")
    tab.wait_for_selector(".tooltip", state="detached")
    tab.evaluate(AT_REST)


def lightness(tab):
    colour = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("page", OPENED)
def test_page(tab, page):
    """All is drawn, nothing complains, nothing is asked of the network, and it is for everybody.

    What stands around an article is the same on all pages of a kind; so is what turns a page dark."""
    visit(tab, page)
    shoot(tab, page)
    assert tab.evaluate(RAW_MATH) == []
    assert tab.evaluate(RAW_TABLES) == []
    assert tab.evaluate(UNRENDERED) == []
    assert tab.evaluate(BROKEN_FIGURES) == []
    assert tab.evaluate(NO_ALT) == []
    assert tab.evaluate(TOO_WIDE) <= 0
    inside = "article" if page not in KINDS and tab.query_selector("article") else "html"
    assert barriers(tab, inside, **ALL_BUT_COLOURS) == []
    if page in KINDS or os.environ.get("SHOTS"):
        assert lightness(tab) > 200
        turn_dark(tab)
        assert lightness(tab) < 60
        shoot(tab, page, "-dark")
    assert tab.wrong == []


def test_search_finds_the_main_function(tab):
    visit(tab, "index.html")
    tab.click("button.search-button:visible, .search-button__button:visible")
    tab.keyboard.type("quantize_model")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    found = tab.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    shoot(tab, "search-quantize_model")
    assert any("quantize" in f.split("/nbs/")[-1].split("/generated/")[-1] for f in found), found
    tab.click("#search-results li a")
    tab.wait_for_load_state()
    assert tab.evaluate("() => document.body.textContent.includes('quantize_model')")
    assert tab.wrong == []


@pytest.mark.parametrize("page", KINDS)
def test_colours_can_be_told_apart(tab, page):
    "One page of each kind, by day and by night."
    visit(tab, page)
    assert barriers(tab, runOnly=["color-contrast"]) == []
    turn_dark(tab)
    assert barriers(tab, runOnly=["color-contrast"]) == []


def test_keyboard_reaches_the_text(tab):
    "The first stop of the tabulator is a visible link that leads past the side bar."
    visit(tab, "nbs/rounding/11_hessian.html")
    tab.keyboard.press("Tab")
    assert "skip" in tab.evaluate("() => document.activeElement.textContent").lower()
    assert tab.evaluate("() => document.activeElement.getBoundingClientRect().height") > 10
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("() => document.querySelector('#main-content').contains(document.activeElement)")


DARK = """s => [...document.querySelectorAll(s)].filter(e => {
  const [r, g, b, a = 1] = getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number);
  return a && r + g + b < 600;
}).length"""
VISIBLE = "s => [...document.querySelectorAll(s)].filter(e => e.checkVisibility()).length"


def test_print(tab):
    "On paper there is the text alone, black on white, and the hidden answers are not hidden."
    visit(tab, "nbs/rounding/11_hessian.html")
    turn_dark(tab)
    tab.emulate_media(media="print")
    assert lightness(tab) > 250
    assert tab.evaluate(VISIBLE, ".bd-sidebar-primary a, .bd-sidebar-secondary a, .copybtn, .header-article a") == 0
    assert tab.evaluate(DARK, "article .highlight, article pre, article .highlight span") == 0
    assert tab.evaluate(VISIBLE, "article h2") > 3
    assert tab.evaluate(VISIBLE, "article .admonition details p, article details:not(.toggle-details) p") > 0
    shoot(tab, "print-hessian")


def test_a_figure_that_moves(tab):
    "Its numbers follow the sliders, by keyboard alone, and are those of the quadratic loss."
    visit(tab, "nbs/rounding/11_hessian.html")
    slider, says = tab.locator(".explore [name=correlation]"), tab.locator(".explore [role=status]")
    loss = lambda r, e, f: f"{e * e + 2 * r * e * f + f * f:.2f}"  # noqa: E731
    assert f"(0, 0) costs {loss(0.9, -0.4, -0.45)}" in says.inner_text()
    assert f"(0, 1) costs {loss(0.9, -0.4, 0.55)}" in says.inner_text()
    slider.focus()
    for _ in range(9):
        tab.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "0.00"
    assert f"(0, 0) costs {loss(0, -0.4, -0.45)}" in says.inner_text() and "None costs less" in says.inner_text()
    tab.keyboard.press("Home")
    assert f"(0, 0) costs {loss(-0.9, -0.4, -0.45)}" in says.inner_text()
    tab.locator(".explore [name=second]").focus()
    tab.keyboard.press("End")
    assert f"(0, 1) costs {loss(-0.9, -0.4, 0)}" in says.inner_text()
    assert f"(1, 1) costs {loss(-0.9, 0.6, 0)}" not in says.inner_text()


FIGURES = {  # those with sliders: page -> what a mark is that has to follow each of them
    "rounding/10_grid": ".value, .here",
    "rounding/11_hessian": ".best",
    "rounding/13_gptq": ".rounded, .free",
    "attention/21_block_error": ".share",
    "attention/22_kronecker_losses": "rect",
    "quantize/66_bit_allocation": ".price",
}


@pytest.mark.parametrize("chapter", FIGURES)
def test_every_slider_moves_its_figure(tab, chapter):
    "By keys and by mouse, on a telephone too, in colours that can be read by day and by night."
    visit(tab, f"nbs/{chapter}.html")
    figure, marks = tab.locator(".explore"), f".explore svg :is({FIGURES[chapter]})"
    drawn = lambda: tab.evaluate("s => [...document.querySelectorAll(s)].map(e => e.outerHTML).join()", marks)  # noqa: E731
    assert figure.locator(".still").count() == 0 and figure.locator("[role=status]").inner_text()
    for slider in figure.locator("input").all():
        slider.focus()
        tab.keyboard.press("Home")
        first = drawn()
        tab.keyboard.press("End")
        assert drawn() != first, slider.get_attribute("name")
        box = slider.bounding_box()
        tab.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
        assert slider.input_value() not in ("0", slider.get_attribute("max"))
    assert barriers(tab, ".explore", runOnly=["color-contrast", "label"]) == []
    figure.screenshot(path=SHOTS / f"explore-{chapter.split('/')[1]}.png")
    tab.set_viewport_size({"width": 360, "height": 800})
    assert figure.evaluate("e => e.scrollWidth <= e.clientWidth && e.getBoundingClientRect().right <= 360")
    assert all(slider.bounding_box()["width"] > 200 for slider in figure.locator("input").all())
    figure.screenshot(path=SHOTS / f"explore-{chapter.split('/')[1]}-360.png")
    turn_dark(tab)
    assert barriers(tab, ".explore", runOnly=["color-contrast", "label"]) == []
    assert tab.wrong == []
