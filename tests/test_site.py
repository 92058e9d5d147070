"""The book as its readers meet it: built, served from this machine and opened in a browser."""

from __future__ import annotations

import functools
import html
import http.server
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
CHAPTER = "01-associative-memory"
PAGES = sorted(p.stem for p in (BOOK / "text").glob("*.md"))
CHAPTERS = [name for name in PAGES if name[0].isdigit()]  # the others are collected from these
PAGES += ["index", *sorted(f"reference/{p.stem}" for p in (BOOK / "reference").glob("*.md"))]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"


def build(book: Path, out: Path) -> Path:
    """The folder of HTML pages; fails on any warning."""
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    options = ["-W", "-n", "--keep-going", "--path-output", str(out)]
    done = subprocess.run([jupyter_book, "build", str(book), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out / "_build" / "html"


def copy_of_book(to: Path, address: str) -> Path:
    """The book with a public address filled in."""
    shutil.copytree(BOOK, to, ignore=shutil.ignore_patterns("_build"))
    config = to / "_config.yml"
    config.write_text(config.read_text().replace('url: ""', f'url: "{address}"'))
    return to


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BOOK, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")  # of a process there may be one at a time, and test_demo.py has its own
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; install it to test the pages (apt-get install chromium)")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


class Visit:
    """An open page, with what it asked for and complained about."""

    def __init__(self, browser, address: str, name: str, width: int = 1280):
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{address}/{name}", wait_until="networkidle")
        self.is_chapter = name.removesuffix(".html") in CHAPTERS

    def wait_for_mathematics(self) -> None:
        if self.page.locator(".math").count():
            self.page.wait_for_selector("mjx-container mjx-math")
            self.page.wait_for_function("MathJax.startup.promise.then(() => true)")

    @property
    def outside(self) -> list[str]:
        return [url for url in self.asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]


@pytest.fixture(params=PAGES)
def visit(request: pytest.FixtureRequest, browser, address: str) -> Iterator[Visit]:
    visit = Visit(browser, address, f"{request.param}.html")
    visit.wait_for_mathematics()
    yield visit
    visit.page.close()


def test_mathematics_is_rendered(visit: Visit) -> None:
    page = visit.page
    sources, drawn = page.locator(".math").count(), page.locator("mjx-container").count()
    assert drawn == sources and (sources > 10 or not visit.is_chapter)
    assert page.evaluate(
        "[...document.querySelectorAll('mjx-container')].every(m => m.getBoundingClientRect().width > 1)"
    )
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    prose = page.evaluate("""() => {
        const article = document.querySelector('article').cloneNode(true);
        article.querySelectorAll('pre, code, mjx-container').forEach(e => e.remove());
        return article.textContent;
    }""")
    assert not [raw for raw in ("$", "\\(", "\\[", "\\tag", ":::", "```", "{exercise}", "<!--") if raw in prose]


def test_every_figure_loads_and_says_what_it_shows(visit: Visit) -> None:
    figures = visit.page.evaluate(
        "[...document.querySelectorAll('article img')].map(i => [i.naturalWidth, i.alt, i.getAttribute('src')])"
    )
    assert figures or not visit.is_chapter
    for width, alt, source in figures:
        assert width > 0, source
        assert len(alt) > 40 and not alt.startswith(("_images", "../")), f"{source} has the alternative text {alt!r}"


def test_a_page_asks_for_nothing_outside_and_has_no_errors(visit: Visit) -> None:
    assert visit.outside == []
    assert visit.complaints == []


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_needs_no_sideways_scrolling(browser, address: str, name: str) -> None:
    visit = Visit(browser, address, f"{name}.html", width=390)
    visit.wait_for_mathematics()
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # Formulas wider than the screen scroll by themselves, and from their beginning.
    assert page.evaluate("""[...document.querySelectorAll('div.math')].every(
        m => m.querySelector('mjx-math').getBoundingClientRect().left >= m.getBoundingClientRect().left - 1)""")
    # Their number stays in sight.
    if visit.is_chapter:
        cells = json.loads((BOOK / f"{name}.ipynb").read_text())["cells"]
        tags = sum("".join(c["source"]).count("\\tag{") for c in cells if c["cell_type"] == "markdown")
        assert page.locator("div.math[data-number]").count() == tags
        page.wait_for_function("""() => [...document.querySelectorAll('div.math[data-number]')].every(m =>
            m.scrollWidth <= m.clientWidth || getComputedStyle(m, '::before').content === `"${m.dataset.number}"`)""")
    page.close()


# What runs out of its column, as [what, by how many pixels, its beginning], with everything opened that folds.
OPEN = """() => {
    document.querySelectorAll('article details').forEach(d => d.open = true);
    document.querySelectorAll('article .toggle-hidden').forEach(d => d.classList.remove('toggle-hidden'));
}"""
OVERFLOW = """() => {
    const found = [], article = document.querySelector('article'), root = document.documentElement;
    const right = Math.min(innerWidth, article.getBoundingClientRect().right);
    const begins = e => (e.textContent || e.getAttribute('src')).trim().replace(/\\s+/g, ' ').slice(0, 60);
    const wide = (what, e) => {
        if (e.scrollWidth > e.clientWidth + 1) found.push([what, e.scrollWidth - e.clientWidth, begins(e)]);
    };
    article.querySelectorAll('div.math').forEach(e => wide('display', e));
    article.querySelectorAll('div.cell_input pre, div.highlight-text pre').forEach(e => wide('code', e));
    article.querySelectorAll('div.cell_output pre').forEach(e => wide('output', e));
    article.querySelectorAll('div.pst-scrollable-table-container').forEach(e => wide('table', e));
    const clips = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
    const scrolls = e => e !== article && (clips(e) || scrolls(e.parentElement));
    const parts = 'span.math, p code, li code, dt code, dd code, a:not(.headerlink), h1, h2, h3, table, img, pre';
    for (const e of article.querySelectorAll(parts)) {
        const over = Math.round(Math.max(...[...e.getClientRects()].map(r => r.right), 0) - right);
        if (over > 1 && !scrolls(e.parentElement)) found.push(['cut', over, begins(e)]);
    }
    if (root.scrollWidth > innerWidth) found.push(['page', root.scrollWidth - innerWidth, '']);
    return found;
}"""


@pytest.mark.parametrize("name", PAGES)
def test_nothing_runs_out_of_its_column(browser, address: str, name: str) -> None:
    visit = Visit(browser, address, f"{name}.html")
    page = visit.page
    visit.wait_for_mathematics()
    page.evaluate(OPEN)
    found = {}
    for width, may_scroll in ((1280, ()), (768, ("table", "output")), (390, ("table", "output", "display", "code"))):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found[width, scheme] = [what for what in page.evaluate(OVERFLOW) if what[0] not in may_scroll]
    assert not any(found.values()), {at: what for at, what in found.items() if what}
    page.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_phone_shows_the_text_of_figures_at_nine_points(browser, address: str, name: str) -> None:
    """Figures have 150 dots to the inch (book/style.mplstyle), and text of 9 points at least; a point is 4/3 pixels."""
    drawn = (BOOK / "text" / f"{name}.md").read_text()
    assert min(map(float, re.findall(r"(?:font|label|title_font)size=\"?(\d+)", drawn)), default=9) >= 9
    page = Visit(browser, address, f"{name}.html", width=390).page
    page.evaluate(OPEN)
    widths = "all => all.map(i => [i.getBoundingClientRect().width, i.naturalWidth])"
    sizes = page.eval_on_selector_all("div.cell_output img", widths)
    assert sizes and all(9 * (width / natural) * (150 / 96) > 8.99 for width, natural in sizes), sizes
    page.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_paper_shows_the_code_and_cuts_nothing(browser, address: str, name: str) -> None:
    visit = Visit(browser, address, f"{name}.html", width=718)  # A4 less its margins
    page = visit.page
    visit.wait_for_mathematics()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("article details.hide").evaluate_all("all => all.every(d => d.open)")
    assert page.locator("article div.cell_input pre").evaluate_all("all => all.every(p => p.offsetHeight > 0)")
    assert page.evaluate(OVERFLOW) == []
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_there_is_no_empty_bar_and_one_search_box(browser, address: str, width: int) -> None:
    page = Visit(browser, address, f"{CHAPTER}.html", width=width).page
    assert not page.locator("header.bd-header").is_visible()
    kinds = ("input[type=search]", "button.search-button", "button.search-button-field")
    assert page.locator(", ".join(f"{kind}:visible" for kind in kinds)).count() <= 1
    page.close()


def test_a_name_leads_to_its_page_of_reference(site: Path) -> None:
    links = {}
    for name in [*CHAPTERS, "glossary", "index"]:
        text = (site / f"{name}.html").read_text()
        links[name] = re.findall(r'<a class="documented[^"]*" href="([^"#]+)(?:#([^"]+))?"', text)
        assert len(links[name]) == len(set(links[name])), "only the first mention links"
        for page, anchor in links[name]:
            assert not anchor or f'id="{anchor}"' in (site / page).read_text(), (name, page, anchor)
    assert ("reference/hope.html", "hope.Memory") in links["05-optimizers-are-memories"]
    assert ("reference/hope.html", "hope.Hope") in links["10-continuum-memory"], "from `Hope.observe`"
    assert ("reference/train.html", "") in links["15-hope"], "from `train.py`"
    assert ("reference/optim.html", "optim.M3") in links["11-m3"]
    assert ("reference/kernels.html", "kernels.dgd_chunk") in links["14-parallel-training"]
    assert any(anchor.endswith(".levels") for _, anchor in links["04-levels"]), "wherever hope.levels is defined"


@pytest.mark.parametrize("module", ["train", "evaluation"])
def test_the_page_of_flags_has_them_all(site: Path, module: str) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "flags.html").read_text()))
    for drawn, typed in {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "…": "..."}.items():  # Sphinx's quotes
        page = page.replace(drawn, typed)
    parser = importlib.import_module(module).make_parser()
    for action in parser._actions:
        assert ", ".join(action.option_strings) in page
        for words in (action.help or "").replace("%%", "%").split("\n"):
            assert words.strip() in page, action.option_strings


LUMINANCE = """selector => {
    const ink = getComputedStyle(document.querySelector(selector)).color;
    const paper = getComputedStyle(document.body).backgroundColor;
    return [ink, paper].map(colour => {
        const [red, green, blue] = colour.match(/[0-9.]+/g).map(Number);
        return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
    });
}"""


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_dark_theme_is_legible_and_figures_have_no_frame(browser, address: str, name: str) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(f"{address}/{name}.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.wait_for_selector("mjx-container mjx-math")
    for selector in ("article p", "article mjx-math", "article h1"):
        ink, paper = page.evaluate(LUMINANCE, selector)
        assert ink - paper > 0.5, (selector, ink, paper)
    corners = page.evaluate("""() => [...document.querySelectorAll('article img')].map(i => {
        const canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [i.naturalWidth, i.naturalHeight];
        const context = canvas.getContext('2d');
        context.drawImage(i, 0, 0);
        return [...context.getImageData(0, 0, 1, 1).data];
    })""")
    assert corners and all(corner == [255, 255, 255, 255] for corner in corners)
    # White is turned to the colour of the page, so that a figure neither shines nor has a frame.
    figure = page.locator("article div.cell_output img").first
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    around = {"x": box["x"] - 4, "y": box["y"] - 4, "width": 12, "height": 12}
    colours = Image.open(io.BytesIO(page.screenshot(clip=around))).convert("RGB").getcolors()
    assert len(colours) == 1, colours
    page.close()


def test_the_front_page_leads_to_every_chapter(browser, address: str) -> None:
    visit = Visit(browser, address, "index.html")
    page = visit.page
    cards = page.eval_on_selector_all("div.cards a", "all => all.map(a => [a.getAttribute('href'), a.textContent])")
    assert [href for href, _ in cards] == [f"{name}.html" for name in CHAPTERS]
    assert all("?" in text and text.endswith(" minutes") for _, text in cards)
    assert page.locator("div.cards img").count() >= len(CHAPTERS) - 1
    doors = page.locator(".sd-card a.sd-stretched-link")
    for href in doors.evaluate_all("all => all.map(a => a.href)"):
        assert page.request.get(href).ok
    assert doors.count() == 3
    assert "memories" in page.get_attribute("meta[name=description]", "content")
    page.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_checks_are_folded_behind_what_they_check_and_one_click_opens_all(browser, address: str, name: str) -> None:
    page = Visit(browser, address, f"{name}.html").page
    assert "Installs the project on Colab" not in page.locator("article").text_content()
    assert page.locator("article p.minutes").count() == 1
    checks, folded = page.locator("div.cell.tag_check"), page.locator("article details.hide")
    stored = json.loads((BOOK / f"{name}.ipynb").read_text())["cells"]
    assert checks.count() == sum("checks" in cell["metadata"] for cell in stored)
    for summary in checks.locator("summary").all_text_contents():
        assert summary.strip().startswith("checked: ")
    if folded.count():
        assert not folded.evaluate_all("all => all.some(d => d.open)")
        page.locator("button.open-code").click()
        assert folded.evaluate_all("all => all.every(d => d.open)")
        # Open, no code is wider than its column.
        assert page.eval_on_selector_all("div.cell_input pre", "all => all.every(p => p.scrollWidth <= p.clientWidth)")
    page.close()


def test_a_solution_is_hidden_until_it_is_clicked(browser, address: str) -> None:
    page = Visit(browser, address, f"{CHAPTER}.html").page
    solutions = page.locator("div.solution.dropdown")
    assert solutions.count() >= 3
    inside = solutions.first.locator("div.cell").first
    assert not inside.is_visible()
    solutions.first.locator("button.toggle-button").click()
    inside.wait_for(state="visible", timeout=5000)
    page.close()


def test_search_finds_a_word_of_the_text(browser, address: str) -> None:
    visit = Visit(browser, address, "search.html?q=crosstalk")
    visit.page.wait_for_selector("ul.search li a")
    assert any(
        CHAPTER in link for link in visit.page.eval_on_selector_all("ul.search li a", "all => all.map(a => a.href)")
    )
    visit.page.wait_for_selector("ul.search li p.context")
    assert "\\" not in "".join(visit.page.locator("ul.search li").all_text_contents()), "raw TeX"
    assert visit.outside == []
    visit.page.close()


@pytest.mark.parametrize("query", ["57", "(57)"])
def test_search_for_a_number_shows_the_equation_first(browser, address: str, query: str) -> None:
    page = Visit(browser, address, f"search.html?q={query}").page
    page.wait_for_selector("p.found-equation")
    link = page.locator("p.found-equation a").first
    assert link.text_content() == "(57)" and link.get_attribute("href").endswith("#eq-57")
    assert "chapter 7" in page.locator("p.found-equation").text_content()
    page.close()


def test_the_table_of_equations_can_be_filtered(browser, address: str) -> None:
    page = Visit(browser, address, "A-equations.html").page
    shown = lambda: page.locator("article tbody tr:visible").all_text_contents()
    everything = len(shown())
    page.fill("input.filter", "57")
    assert len(shown()) == 1 and "(57)" in shown()[0]
    page.fill("input.filter", "erratum")
    assert 10 < len(shown()) < everything and all("erratum" in row for row in shown())
    page.close()


def test_a_link_to_an_equation_shows_it_under_the_pointer(browser, address: str) -> None:
    visit = Visit(browser, address, "A-equations.html")
    visit.page.hover('article td a[href$="#eq-57"]')
    shown = visit.page.locator("div.shown-equation mjx-container")
    shown.wait_for(state="visible", timeout=5000)
    assert "57" in shown.locator("mjx-assistive-mml").text_content() and not visit.complaints
    visit.page.mouse.move(0, 0)
    shown.wait_for(state="detached", timeout=5000)
    visit.page.close()


def test_launch_buttons_appear_with_the_public_address(site: Path, tmp_path: Path) -> None:
    launch = "https://colab.research.google.com/github/somebody/something/blob/main/book/" + CHAPTER
    assert "colab" not in (site / f"{CHAPTER}.html").read_text().split("<article")[0]
    public = build(copy_of_book(tmp_path / "book", "https://github.com/somebody/something"), tmp_path / "out")
    assert launch in (public / f"{CHAPTER}.html").read_text()
    # So does the picture for those who share a link; a relative address would do nothing.
    picture = "https://github.com/somebody/something/raw/main/book/_static/social.png"
    for name in ("index", CHAPTER):
        assert "og:image" not in (site / f"{name}.html").read_text()
        assert f'<meta property="og:image" content="{picture}">' in (public / f"{name}.html").read_text()
    assert Image.open(public / "_static" / "social.png").size == (1200, 630)


def make(*arguments: str, book: Path = BOOK) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(book / "make.py"), *arguments], capture_output=True, text=True)


def test_notebooks_are_what_their_text_says() -> None:
    done = make("--check")
    assert done.returncode == 0, done.stderr


def test_check_names_a_notebook_that_is_out_of_date_and_the_fix(tmp_path: Path) -> None:
    book = copy_of_book(tmp_path / "book", "")
    text = book / "text" / f"{CHAPTER}.md"
    text.write_text(text.read_text().replace("# Associative memory", "# Another title", 1))
    (book / "99-left-over.ipynb").write_text("{}")
    done = make("--check", book=book)
    assert done.returncode == 1
    assert f"book/{CHAPTER}.ipynb differs" in done.stderr and f"python book/make.py {CHAPTER}" in done.stderr
    assert "99-left-over.ipynb has no text" in done.stderr


def test_check_notices_a_changed_public_address(tmp_path: Path) -> None:
    done = make("--check", book=copy_of_book(tmp_path / "book", "https://github.com/somebody/something"))
    assert done.returncode == 1 and f"book/{CHAPTER}.ipynb differs" in done.stderr


@functools.cache
def setup_cell(name: str) -> str:
    cells = json.loads((BOOK / f"{name}.ipynb").read_text())["cells"]
    return next(source for c in cells if "ADDRESS = " in (source := "".join(c["source"])))


# Runs a cell with the project importable or not, and with programs that would install it replaced by a note.
RUN_CELL = """
import importlib.util, subprocess, sys
cell, importable = sys.argv[1], sys.argv[2] == "yes"
importlib.util.find_spec = lambda name: object() if importable else None
subprocess.run = lambda command, check: print("RUN", *command)
exec(cell)
"""


def run_setup(cell: str, importable: bool, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN_CELL, cell, "yes" if importable else "no"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_setup_cell(name: str, tmp_path: Path) -> None:
    cell = setup_cell(name)
    done = run_setup(cell, importable=True, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())

    private = cell.replace(cell[cell.index("ADDRESS = ") :].split("\n")[0], 'ADDRESS = ""', 1)
    done = run_setup(private, importable=False, folder=tmp_path)
    assert done.returncode == 1 and "no public address yet" in done.stderr and "pip install" in done.stderr

    public = private.replace('ADDRESS = ""', 'ADDRESS = "https://github.com/somebody/something"', 1)
    done = run_setup(public, importable=False, folder=tmp_path)
    assert done.returncode == 0 and "git clone" in done.stdout and "pip install" in done.stdout
    assert "https://github.com/somebody/something" in done.stdout


# Runs a cell without the project, with git as it is and pip replaced by a note; then says where it is.
RUN_CLONE = """
import importlib.util, os, subprocess, sys
real = subprocess.run
importlib.util.find_spec = lambda name: None
subprocess.run = lambda command, check: real(command, check=check) if command[0] == "git" else print("RUN", *command)
exec(sys.argv[1])
print(os.getcwd())
"""


def test_the_setup_cell_clones_the_address_it_is_given(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone, or no git: nothing to clone from")
    cell = setup_cell(CHAPTER).replace('ADDRESS = ""', f'ADDRESS = "{ROOT.as_uri()}"', 1)
    done = subprocess.run([sys.executable, "-c", RUN_CLONE, cell], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    clone = tmp_path / "nested-learning"
    assert "pip install -q ./nested-learning" in done.stdout and done.stdout.endswith(f"{clone / 'book'}\n")
    assert (clone / "pyproject.toml").exists() and (clone / "book" / "style.mplstyle").exists()


@pytest.mark.parametrize("name", [p.stem for p in (BOOK / "text").glob("*.md")])
def test_a_notebook_is_plain_markdown(name: str) -> None:
    """What only Sphinx knows would stand in Jupyter and on Colab as it is written."""
    cells = json.loads((BOOK / f"{name}.ipynb").read_text())["cells"]
    prose = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not re.findall(r"(?m)^:::.*|^```\{.*|\{[a-z:]+\}`.*|^\([\w-]+\)=$", prose)
    for tag in ("blockquote", "details"):  # Markdown inside needs an empty line after the tag and before its end
        assert prose.count(f"<{tag}>\n") == len(re.findall(rf"\n\n</{tag}>", prose)) == prose.count(f"</{tag}>")
    text = (BOOK / "text" / f"{name}.md").read_text()
    assert prose.count("<details>") >= text.count(":::{solution-start}")
    assert prose.count("<blockquote>") >= text.count(":::{admonition}") + text.count(":::{exercise}")
    for page, anchor in re.findall(r"\]\(([\w-]*)(?:\.ipynb)?#([\w-]+)\)", prose):
        there = json.loads((BOOK / f"{page or name}.ipynb").read_text())["cells"]
        assert any(f'<a id="{anchor}"></a>' in "".join(c["source"]) for c in there), (page, anchor)


EXECUTE = """
import importlib.util, sys, nbformat
from nbclient import NotebookClient
assert importlib.util.find_spec("hope") is None
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600).execute()
print(sum(cell.cell_type == "code" and cell.execution_count is not None for cell in notebook.cells))
"""


@pytest.mark.slow
def test_a_notebook_alone_installs_the_project_from_its_address_and_runs(tmp_path: Path) -> None:
    """As on Colab: only the notebook is there, hope cannot be imported, and the set-up cell is given an address."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone, or no git: nothing to clone from")
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    libraries = Path(torch.__file__).parents[1]  # on the path alone, its .pth files are not read, so no editable hope
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    (alone := tmp_path / "content").mkdir()
    notebook = (BOOK / f"{CHAPTER}.ipynb").read_text()
    assert 'ADDRESS = \\"\\"' in notebook
    (alone / "chapter.ipynb").write_text(notebook.replace('ADDRESS = \\"\\"', f'ADDRESS = \\"{ROOT.as_uri()}\\"', 1))
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_IGNORE_INSTALLED": "1"}
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | offline
    command = [str(python), "-c", EXECUTE, "chapter.ipynb"]
    done = subprocess.run(command, cwd=alone, env=settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    code = [c for c in json.loads(notebook)["cells"] if c["cell_type"] == "code"]
    assert done.stdout.split()[-1] == str(len(code))
    assert (packages / "hope.py").exists() and (alone / "nested-learning" / "book").exists()
