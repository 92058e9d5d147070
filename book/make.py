"""Make the book's notebooks from their text.

    python book/make.py            every chapter: book/text/NAME.md is executed and stored as book/NAME.ipynb
    python book/make.py 01         one chapter, by the start of its name
    python book/make.py --check    change nothing; fail if a notebook's cells differ from its text

Edit and review the text. The notebooks are made from it and stored with their outputs, for those who read them on
GitHub, in Jupyter or on Colab, and for the tests, which execute them again and compare.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

BOOK = Path(__file__).resolve().parent


def from_text(text: Path) -> nbformat.NotebookNode:
    """The notebook that a text defines, without outputs."""
    address = yaml.safe_load((BOOK / "_config.yml").read_text())["repository"]["url"]
    notebook = jupytext.read(text)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # stable, so that making a notebook again changes nothing
        if cell.cell_type == "code":
            cell.source = cell.source.replace('ADDRESS = ""', f'ADDRESS = "{address}"')
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run every cell in a fresh kernel, in the book's folder. Raises CellExecutionError where a cell fails."""
    NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, store_widget_state=False,
        resources={"metadata": {"path": str(BOOK)}},
    ).execute()  # fmt: skip
    notebook.metadata["language_info"] = {"name": "python"}  # execution adds the version of this machine's Python
    return notebook


def differs(text: Path, stored: Path) -> str | None:
    """What is wrong with a stored notebook, or None."""
    if not stored.exists():
        return "has not been made"
    cells = lambda notebook: [(c.cell_type, c.source, c.metadata) for c in notebook.cells]
    notebook = nbformat.read(stored, as_version=4)
    if cells(notebook) != cells(from_text(text)):
        return f"differs from book/text/{text.name}"
    if any(c.cell_type == "code" and c.execution_count is None for c in notebook.cells):
        return "has cells that were not executed"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", nargs="?", default="", help="how the chapter's file name begins, as in 01")
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if a notebook is out of date")
    args = parser.parse_args()
    texts = sorted((BOOK / "text").glob(f"{args.chapter}*.md"))
    if not texts:
        parser.error(f"no chapter begins with {args.chapter!r}; see book/text/")
    bad = []
    for text in texts:
        stored = BOOK / f"{text.stem}.ipynb"
        if args.check:
            if problem := differs(text, stored):
                bad.append(f"book/{stored.name} {problem}; run: python book/make.py {text.stem}")
            continue
        print(f"book/{stored.name}", flush=True)
        try:
            nbformat.write(execute(from_text(text)), stored)
        except CellExecutionError as error:
            bad.append(f"book/text/{text.name}: {error}")
    if args.check and not args.chapter:
        names = {text.stem for text in texts}
        bad += [f"book/{p.name} has no text; delete it" for p in sorted(BOOK.glob("*.ipynb")) if p.stem not in names]
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
