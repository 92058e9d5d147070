"""Pages of reference, made from docstrings and from the parsers of the command lines, and links to them from chapters.

A page asks for its contents with `<!-- reference: MODULE -->` or `<!-- flags: MODULE -->`. In the other pages the first
inline code that names something documented, such as `hope.Memory`, `Hope.observe` or `train.py`, becomes a link to it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import sys
import textwrap
from pathlib import Path

from docutils import nodes

Documented = ast.FunctionDef | ast.ClassDef


WIDTH = 88  # letters in a line of a page
GAP = re.compile(r"(?<=\S) {2,}(?=\S)")  # between two columns
ITEM = re.compile(r"(- |)(\w+(?:, \w+)*: )?")  # how a line of a list begins, or of a list of arguments


def flowing(text: str) -> str:
    """A docstring whose paragraphs are one line each, for the page to break; in a table the last column is broken here."""
    lines: list[str] = []
    goes_on: int | None = None  # where the next line begins if it goes on with this one, which was full or has columns
    for line in text.strip().split("\n"):
        bare = line.strip()
        indent, gaps = len(line) - len(bare), list(GAP.finditer(line))
        bullet, argument = ITEM.match(bare).groups()
        if bare and indent == goes_on and not bullet and not argument and not gaps:
            lines[-1] += f" {bare}"
            continue
        lines.append(line)
        goes_on = indent + 2 * bool(bullet) + 4 * bool(argument) if len(line) > 100 else None
        goes_on = gaps[-1].end() if gaps else goes_on
    for i, line in enumerate(lines):
        if len(line) > WIDTH and (gaps := list(GAP.finditer(line))) and gaps[-1].end() < WIDTH - 20:
            at = gaps[-1].end()
            wrapped = textwrap.wrap(line[at:], WIDTH, initial_indent=line[:at], subsequent_indent=at * " ")
            lines[i] = "\n".join(wrapped)
    return "\n".join(lines)


def block(text: str) -> str:
    return f"~~~text\n{flowing(text)}\n~~~"


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
                words = text_of(value.args[1]) if len(value.args) > 1 else ""
                value = value.args[0]
            default = f" = {ast.unparse(value)}" if value is not None else ""
            lines.append(
                f"{field.target.id}: {ast.unparse(field.annotation)}{default}" + f"\n    {words}" * bool(words)
            )
    return lines


def text_of(node: ast.expr) -> str:
    """A text of the source; what an f-string computes stands as it is written there."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in parts)


@functools.cache
def tree(module: str) -> ast.Module:
    """A module's source, which is read and not run. Looked for beside the book before anywhere else."""
    here = Path(__file__).resolve().parents[2] / f"{module}.py"
    source = here if here.exists() else Path(importlib.util.find_spec(module).origin)
    return ast.parse(source.read_text())


def documented(module: str) -> list[Documented]:
    """Everything public that a module defines, in its order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in tree(module).body if isinstance(node, kinds) and not node.name.startswith("_")]


def reference(module: str) -> str:
    """The page of a module."""
    parts = [block(ast.get_docstring(tree(module)))]
    for node in documented(module):
        if isinstance(node, ast.FunctionDef):
            parts += [f"## {node.name}", block(f"{signature(node)}\n\n{ast.get_docstring(node) or ''}")]
            continue
        bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
        says = [f"class {node.name}({bases})" if bases else f"class {node.name}", ast.get_docstring(node) or ""]
        parts += [f"## {node.name}", block("\n\n".join([*says, *settings(node)]))]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                parts.append(block(f"{node.name}.{signature(method)}\n\n{ast.get_docstring(method)}"))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """As Markdown, with flags as code: a dash would be made of the two hyphens of others."""
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text))


def flags(module: str) -> str:
    """The flags of a command line, as its parser has them."""
    parts = []
    for group in importlib.import_module(module).make_parser()._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if shown:
            parts.append(f"## python {module}.py: {escaped(group.title)}")
        for action in shown:
            values = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
            names = ", ".join(action.option_strings) or action.dest
            names += f" {values}" if action.option_strings and action.nargs != 0 else ""
            parts.append(f"- `{names}`\\\n  {escaped((action.help or '').replace('%%', '%'))}")
    return "\n\n".join(parts)


def on_source(app, page: str, content: list[str]) -> None:
    content[0] = re.sub(r"<!-- reference: (\w+) -->", lambda marker: reference(marker[1]), content[0])
    content[0] = re.sub(r"<!-- flags: (\w+) -->", lambda marker: flags(marker[1]), content[0])


def on_start(app) -> None:
    """Which names the page of which module tells of."""
    pages = sorted((Path(app.srcdir) / "reference").glob("*.md"))
    modules = [name for page in pages for name in re.findall(r"<!-- reference: (\w+) -->", page.read_text())]
    app.documented = {module: {node.name for node in documented(module)} for module in modules}


def target(app, code: str) -> tuple[str, str] | None:
    """The module, and the name in it or "", that code is about: `hope.Memory(...)`, `Hope.observe`, `hope.py`."""
    match = re.match(r"(\w+)(?:\.(\w+))?(?![\w=\"])", code)
    first, second = match.groups() if match else ("", None)
    if first in app.documented and (code in ("hope", f"{first}.py")):
        return first, ""
    if first in app.documented:
        # hope hands on names from other files
        homes, name = [first, *app.documented] if first == "hope" else [first], second
    else:
        homes, name = list(app.documented), first if first[:1].isupper() else None
        homes = homes if sum(name in app.documented[home] for home in homes) == 1 else []
    return next(((home, name) for home in homes if name in app.documented[home]), None)


def on_doctree(app, doctree: nodes.document) -> None:
    """An id for each thing that is documented: its name, capitals and all, which headings' own ids have not."""
    if not app.env.docname.startswith("reference/"):
        return
    module = app.env.docname.removeprefix("reference/")
    for section in doctree.findall(nodes.section):
        if section.next_node(nodes.title).astext() in app.documented.get(module, ()):
            section["ids"].append(f"{module}.{section.next_node(nodes.title).astext()}")


def on_resolved(app, doctree: nodes.document, page: str) -> None:
    if page.startswith("reference/") or app.builder.format != "html":
        return
    seen = set()
    for literal in list(doctree.findall(nodes.literal)):
        found = target(app, literal.astext())
        if found is None or found in seen or isinstance(literal.parent, (nodes.reference, nodes.title)):
            continue
        seen.add(found)
        home, name = found
        address = app.builder.get_relative_uri(page, f"reference/{home}") + (f"#{home}.{name}" if name else "")
        link = nodes.reference("", "", internal=True, refuri=address, classes=["documented"])
        literal.replace_self(link)
        link += literal


def setup(app) -> dict:
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # the modules, where they are not installed
    app.connect("builder-inited", on_start)
    app.connect("source-read", on_source)
    app.connect("doctree-read", on_doctree)
    app.connect("doctree-resolved", on_resolved)
    return {"parallel_read_safe": False}
