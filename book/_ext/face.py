"""What the site adds to the notebooks: a front page with cards, reading times, folded checks, and tags for its links.

The notebooks stay as they are for GitHub, Jupyter and Colab, in plain Markdown; all of this is done while the pages are
built. reference.py makes the pages of reference.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import jupytext
from docutils import nodes
from sphinx.errors import ExtensionError

NAME = "Nested Learning, executable"
SENTENCE = (
    "A model and its optimizer are memories inside memories, each with a clock of its own: the paper as a book whose "
    "equations are checked by running them, and as code that trains."
)


def maker() -> ModuleType:
    """book/make.py, which knows what a text holds."""
    if "make" not in sys.modules:
        spec = importlib.util.spec_from_file_location("make", Path(__file__).resolve().parents[1] / "make.py")
        sys.modules["make"] = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(spec.origin).parent))  # for what it imports from there
        spec.loader.exec_module(sys.modules["make"])
    return sys.modules["make"]


def texts(app) -> dict[str, Path]:
    """The numbered texts of the book that is built, by the name of their page."""
    return {text.stem: text for text in sorted((Path(app.srcdir) / "text").glob("[0-9]*.md"))}


def question(text: Path) -> str | None:
    return jupytext.read(text).metadata.get("question")


def first_figure(notebook: dict) -> tuple[bytes, str] | None:
    """The first figure of a notebook that has an alternative text, as PNG, and that text."""
    for cell in notebook["cells"]:
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt")
        for output in cell.get("outputs", []) if alt else []:
            if png := output.get("data", {}).get("image/png"):
                return base64.b64decode("".join(png)), alt
    return None


def on_start(app) -> None:
    """The chapters' first figures, as files that the front page shows."""
    static = Path(app.doctreedir) / "static"
    (static / "cards").mkdir(parents=True, exist_ok=True)
    app.config.html_static_path.append(str(static))
    app.first_figures = {}
    for name in texts(app):
        if figure := first_figure(json.loads((Path(app.srcdir) / f"{name}.ipynb").read_text())):
            (static / "cards" / f"{name}.png").write_bytes(figure[0])
            app.first_figures[name] = figure[1]


def cards(app) -> str:
    """One card for each chapter: its figure, its question, its minutes."""
    rows = []
    for name, text in texts(app).items():
        picture = ""
        if alt := app.first_figures.get(name):
            picture = f'<img src="_static/cards/{name}.png" alt="{html.escape(alt, quote=True)}">'
        asks = html.escape(question(text) or "What is claimed, and how is it checked?")
        rows.append(
            f'<a class="chapter" href="{name}.html">{picture}'
            f"<span><b>{maker().place(text)}. {html.escape(maker().title(text))}</b>"
            f"{asks}<i>{maker().minutes(text)} minutes</i></span></a>"
        )
    return '<div class="cards">\n' + "\n".join(rows) + "\n</div>"


def says(label: str, check: dict) -> str:
    status = next(s for s in (*maker().STATUSES, *maker().OUTCOMES) if s in check)
    name = maker().spoken(label)
    if status == "holds":
        return f"{name} {check[status]}" if name.startswith("(") else f"{name}: {check[status]}"
    return f"{name}, {status}: {check[status]}"


def prose(notebook: dict, text: Path) -> None:
    """Put the text's MyST in the place of the plain Markdown that stands in its notebook."""
    cells = maker().from_text(text, site=True).cells
    if [c.cell_type for c in cells] != [c["cell_type"] for c in notebook["cells"]]:
        raise ExtensionError(f"book/{text.stem}.ipynb is out of date; run: python book/make.py {text.stem}")
    for cell, source in zip(notebook["cells"], cells):
        if source.cell_type == "markdown":
            cell["source"] = source.source


def fold(notebook: dict) -> None:
    """Leave out the set-up for Colab, and fold every check behind what it checks."""
    notebook["cells"] = [c for c in notebook["cells"] if "set-up" not in c["metadata"].get("tags", [])]
    for cell in notebook["cells"]:
        if checks := cell["metadata"].get("checks"):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input", "check"]
            prompt = "checked: " + "; ".join(says(label, check) for label, check in checks.items())
            cell["metadata"].setdefault("mystnb", {}).update(code_prompt_show=prompt, code_prompt_hide=prompt)


def on_source(app, name: str, content: list[str]) -> None:
    if name == "index":
        content[0] = content[0].replace("<!-- cards -->", cards(app)).replace("<!-- sentence -->", SENTENCE)
    elif (text := Path(app.srcdir) / "text" / f"{name}.md").exists():
        notebook = json.loads(content[0])
        prose(notebook, text)
        if name in texts(app):
            fold(notebook)
        content[0] = json.dumps(notebook)


def on_doctree(app, doctree: nodes.document) -> None:
    """The reading time, below a chapter's title."""
    text = texts(app).get(app.env.docname)
    if text is not None and (title := next(doctree.findall(nodes.title), None)) is not None:
        line = f"{maker().minutes(text)} minutes to read, without the code"
        title.parent.insert(title.parent.index(title) + 1, nodes.paragraph("", line, classes=["minutes"]))


def on_updated(app, env) -> None:
    """Appendices without a formula have MathJax, too, for book.js to show the equations that their links are about."""
    for text in (Path(app.srcdir) / "text").glob("*.md"):
        env.get_domain("math").data["has_equations"][text.stem] = True


def picture(app) -> dict[str, str]:
    """The tags of a link's picture. They need an absolute address: none while the project has none."""
    options = app.config.html_theme_options
    if not options.get("repository_url"):
        return {}
    folder = f"{options['repository_url']}/raw/{options['repository_branch']}/{options['path_to_docs']}"
    return {
        'property="og:image"': f"{folder}/_static/social.png",  # drawn by runs/social.py
        'property="og:image:alt"': "Four rings, one inside the other: token, chunk, CMS, outer step, each at its speed",
        'name="twitter:card"': "summary_large_image",
    }


def on_page(app, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """What a page is about, for search engines and for those who share a link to it."""
    text = texts(app).get(page)
    about = (text and question(text)) or SENTENCE
    tags = {
        'name="description"': about,
        'property="og:title"': re.sub(r"<[^>]+>", "", context.get("title") or NAME),
        'property="og:description"': about,
        'property="og:site_name"': NAME,
        'property="og:type"': "article" if text else "website",
    }
    tags |= picture(app)
    context["metatags"] = context.get("metatags", "") + "".join(
        f'\n<meta {which} content="{html.escape(html.unescape(says), quote=True)}">' for which, says in tags.items()
    )


def setup(app) -> dict:
    app.connect("builder-inited", on_start)
    app.connect("source-read", on_source)
    app.connect("doctree-read", on_doctree)
    app.connect("env-updated", on_updated)
    app.connect("html-page-context", on_page)
    return {"parallel_read_safe": False}
