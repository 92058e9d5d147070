"""What the site adds to the notebooks: a front page with cards, reading times, folded checks, pages of reference, and tags
for those who link to it.

The notebooks stay as they are for GitHub, Jupyter and Colab; all of this is done while the pages are built.
"""

from __future__ import annotations

import ast
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
            f"<span><b>{maker().number(text)}. {html.escape(maker().title(text))}</b>"
            f"{asks}<i>{maker().minutes(text)} minutes</i></span></a>"
        )
    return '<div class="cards">\n' + "\n".join(rows) + "\n</div>"


def says(label: str, check: dict) -> str:
    status = next(s for s in (*maker().STATUSES, *maker().OUTCOMES) if s in check)
    return f"{maker().spoken(label)} {'' if status == 'holds' else status + ': '}{check[status]}"


def fold(notebook: dict) -> None:
    """Leave out the set-up for Colab, and fold every check behind what it checks."""
    notebook["cells"] = [c for c in notebook["cells"] if "set-up" not in c["metadata"].get("tags", [])]
    for cell in notebook["cells"]:
        if checks := cell["metadata"].get("checks"):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input", "check"]
            prompt = "checked: " + "; ".join(says(label, check) for label, check in checks.items())
            cell["metadata"].setdefault("mystnb", {}).update(code_prompt_show=prompt, code_prompt_hide=prompt)


def block(text: str) -> str:
    return f"~~~text\n{text.strip()}\n~~~"


def signature(node: ast.FunctionDef) -> str:
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("cls, ")
    arguments = "" if arguments in ("self", "cls") else arguments
    return f"{node.name}({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def settings(node: ast.ClassDef) -> list[str]:
    """The fields of a class of settings, each with its default and what it does."""
    lines = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            value, words = field.value, ""
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "setting":
                value, words = value.args[0], ast.literal_eval(value.args[1]) if len(value.args) > 1 else ""
            default = f" = {ast.unparse(value)}" if value is not None else ""
            lines.append(
                f"{field.target.id}: {ast.unparse(field.annotation)}{default}" + f"\n    {words}" * bool(words)
            )
    return lines


def reference(module: str) -> str:
    """Everything public in a module, from its docstrings, which are read and not run."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    parts = [block(ast.get_docstring(tree))]
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef):
            parts += [f"## {node.name}", block(f"{signature(node)}\n\n{ast.get_docstring(node) or ''}")]
            continue
        bases = ", ".join(map(ast.unparse, node.bases))
        says = [f"class {node.name}({bases})" if bases else f"class {node.name}", ast.get_docstring(node) or ""]
        parts += [f"## {node.name}", block("\n\n".join([*says, *settings(node)]))]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                parts.append(block(f"{node.name}.{signature(method)}\n\n{ast.get_docstring(method)}"))
    return "\n\n".join(parts)


def on_source(app, name: str, content: list[str]) -> None:
    content[0] = re.sub(r"<!-- reference: (\w+) -->", lambda marker: reference(marker[1]), content[0])
    if name == "index":
        content[0] = content[0].replace("<!-- cards -->", cards(app)).replace("<!-- sentence -->", SENTENCE)
    elif name in texts(app):
        notebook = json.loads(content[0])
        fold(notebook)
        content[0] = json.dumps(notebook)


def on_doctree(app, doctree: nodes.document) -> None:
    """The reading time, below a chapter's title."""
    text = texts(app).get(app.env.docname)
    if text is not None and (title := next(doctree.findall(nodes.title), None)) is not None:
        line = f"{maker().minutes(text)} minutes to read, without the code"
        title.parent.insert(title.parent.index(title) + 1, nodes.paragraph("", line, classes=["minutes"]))


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
    context["metatags"] = context.get("metatags", "") + "".join(
        f'\n<meta {which} content="{html.escape(html.unescape(says), quote=True)}">' for which, says in tags.items()
    )


def setup(app) -> dict:
    app.connect("builder-inited", on_start)
    app.connect("source-read", on_source)
    app.connect("doctree-read", on_doctree)
    app.connect("html-page-context", on_page)
    return {"parallel_read_safe": False}
