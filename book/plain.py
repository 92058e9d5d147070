"""What a notebook shows outside the site: the text's Markdown without the directives and roles that only Sphinx knows.

Jupyter, Colab and GitHub show a fence such as `:::{admonition}` as it is written. In the notebooks, therefore, errata
and exercises are quotations, solutions fold, labels are HTML anchors, links to a label name the notebook that has it,
and references are spelt out. The site is built from the text itself; see _ext/face.py.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

LABEL = r"(?m)^\(([a-z][\w-]*)\)=\n"
QUOTED = r"(?ms)^:::\{(admonition|exercise|prf:definition)\} ?([^\n]*)\n(?::[^\n]*\n)*(.*?)\n:::$"
GLOSSARY = r"(?ms)^:::\{glossary\}\n(.*?)\n:::$"
SOLUTION_START = r"(?m)^:::\{solution-start\} ([\w-]+)\n(?::[^\n]*\n)*:::\n*"
SOLUTION_END = r"(?m)^:::\{solution-end\}\n:::\n*"
CITED = r"\{footcite:([pt])\}`([^`]+)`"


@functools.cache
def entries(bibliography: Path) -> dict:
    from pybtex.database import parse_file

    return dict(parse_file(bibliography).entries)


def authors(entry) -> str:
    names = [" ".join(person.last_names) for person in entry.persons.get("author") or entry.persons["editor"]]
    names = [re.sub(r"[{}]", "", name) for name in names]
    return f"{names[0]} et al." if len(names) > 2 else " and ".join(names)


def reference(entry) -> str:
    """An entry of the list of references."""
    fields = entry.fields
    where = next((fields[kind] for kind in ("journal", "booktitle", "publisher", "howpublished") if kind in fields), "")
    volume = f" {fields['volume']}" if "volume" in fields else ""
    pages = f", {fields['pages'].replace('--', '-')}" if "pages" in fields else ""
    return re.sub(r"[{}]", "", f"- {authors(entry)} ({fields['year']}). *{fields['title']}*. {where}{volume}{pages}.")


def cite(match: re.Match, known: dict) -> str:
    found = [known[key.strip()] for key in match[2].split(",")]
    if match[1] == "t":
        return " and ".join(f"{authors(e)} ({e.fields['year']})" for e in found)
    return "(" + "; ".join(f"{authors(e)}, {e.fields['year']}" for e in found) + ")"


def quotation(match: re.Match) -> str:
    """HTML's element, since Markdown's mark of a quotation would stand inside the formulas of several lines."""
    kind, title, body = match.groups()
    named = {"exercise": "Exercise: ", "prf:definition": "Definition: ", "admonition": ""}
    title = named[kind] + title
    return f"<blockquote>\n\n**{title}**\n\n{body.strip()}\n\n</blockquote>"


def terms(match: re.Match) -> str:
    return re.sub(r"(?m)^(\S.*)\n((?:  .*\n?)+)", lambda m: f"**{m[1]}.** {re.sub(r'(?m)^  ', '', m[2])}", match[1])


def folded(prose: str, summary: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{prose.strip()}\n\n</details>\n\n" if prose.strip() else ""


def solutions(cells: list) -> None:
    """The prose of a solution folds; its code is folded where the notebook's program can do that."""
    inside = False
    for cell in cells:
        if cell.cell_type == "code":
            if inside:
                cell.metadata["jupyter"] = {"source_hidden": True}
            continue
        parts, done = re.split(rf"({SOLUTION_START}|{SOLUTION_END})".replace("(?m)", ""), cell.source, flags=re.M), ""
        for part in parts[::3]:  # what is between two marks; each leaves itself and its label in the list
            done += folded(part, "Solution") if inside else part
            inside = not inside
        inside = not inside  # the last part ends with the cell, not with a mark
        cell.source = done


def plain(cells: list, page: str, places: dict[str, str], bibliography: Path) -> None:
    """Rewrite the Markdown cells of a page in place. `places` tells which page has a label."""
    known, cited = entries(bibliography), {}
    solutions(cells)
    for cell in cells:
        if cell.cell_type != "markdown":
            continue
        text = re.sub(QUOTED, quotation, cell.source)
        text = re.sub(GLOSSARY, terms, text)
        text = re.sub(LABEL, r'<a id="\1"></a>\n\n', text)
        there = lambda m: f"]({'' if places.get(m[1], page) == page else places[m[1]] + '.ipynb'}#{m[1]})"
        text = re.sub(r"\]\(#([\w-]+)\)", there, text)
        for _, keys in re.findall(CITED, text):
            cited |= dict.fromkeys(key.strip() for key in keys.split(","))
        text = re.sub(CITED, lambda m: cite(m, known), text)
        listed = "\n".join(sorted(reference(known[key]) for key in cited))
        cell.source = re.sub(r"(?m)^```\{footbibliography\}\n```", lambda m: listed, text).strip("\n")
