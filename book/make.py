"""Make the book's notebooks from their text.

    python book/make.py            every chapter: book/text/NAME.md is executed and stored as book/NAME.ipynb
    python book/make.py 01         one chapter, by the start of its name
    python book/make.py --prose    the prose alone: notebooks take it over from their texts, nothing is executed
    python book/make.py --check    change nothing; fail if a notebook's cells differ from its text
    python book/make.py --mutate   change nothing; run every check with its claim perturbed, and fail if one still passes

Edit and review the text. The notebooks are made from it and stored with their outputs, for those who read them on
GitHub, in Jupyter or on Colab, and for the tests, which execute them again and compare. Their prose is plain Markdown
(plain.py); the site is built from the text and the notebooks' outputs (_ext/face.py).

How a text is written (tests/test_book.py holds it to this):

- Front matter as in chapter 1, with the question that the contents page shows. A code cell tagged `set-up` gets the
  code for Colab. Lines `<!-- make: contents -->`, `equations`, `errata` are replaced by what is collected here.
- An equation of the paper has the line `(eq-9)=` before its display, which ends in `\\tag{9}`; link to it from any page
  as `[(9)](#eq-9)`. Other labels: `def-2`, `alg-1`, `sec-4-3`, `sec-3-3-generation`. Our own equations are (2.1), (2.2),
  ... A display of several lines is an `aligned` with rows ended by `\\cr`: around `\\\\` Sphinx puts what forbids a tag.
- A check cell says so in its metadata. For each label it gives a status, a name, and edits under which it must fail:

      checks:
        eq-2:
          holds: a gradient step is the argmin of (2)      # or definition: or erratum: or not reproduced:
          perturb: 0.5 * eta => 0.6 * eta                  # OLD => NEW or a list; OLD occurs once in the cell

  Quote an edit that has a colon. Each is one wrong claim and must end in AssertionError. An erratum needs two: one that
  breaks the corrected form, one that mends the printed one. The cell is plain Python; lines that begin with % are
  skipped here. What is printed must not depend on the random start of a hope module, which may change: set weights.
- Front matter may list wrong versions of the modules that the chapter checks, by the same kind of edit:

      mutants:
        - hope.py: w - rates[i] => w + rates[i]            # MODULE: OLD => NEW; OLD occurs once in the module

  For each, the cells are run in a process that imports the edited module, and a check cell must end in AssertionError.
  What other cells assert is passed over; an error of another kind is not: a mutant is a wrong result, not a crash.
- An erratum stands beside its equation and again in Appendix B, so it must read well alone. Its title links to what it
  concerns. Numbers with a decimal point under Size must be printed by the check cell:

      :::{admonition} Erratum: [(9)](#eq-9)
      :class: erratum

      **Printed.** ...  **Why it cannot be meant.** ...  **Corrected.** ...  **Size.** ...  **Implemented as printed.** ...
      :::                                              (each field its own paragraph, in this order)

  A claim of the paper about an experiment that we could not repeat is no erratum. Its status is `not reproduced`, its
  block has the title `Not reproduced: ...`, the class `claim`, and the fields Claimed, Tried, Found, Size, What would settle it.

- A figure, a table or a main claim of the paper that a chapter's experiment speaks to is declared like a check, with the label in
  the text before the section that shows it. Appendix C is made from these, so each line must read well alone:

      checks:
        table-5:
          partly: Hope counts on four languages of six     # or reproduced: / not reproduced: / not run here:
          paper: 100% in both length bins of all six
          ours: 99.8 on parity, 12.5 on shuffle-2          # numbers with a decimal point must be printed by this cell
          seeds: 0 to 2
          command: python book/runs/formal.py
          perturb: worst > 95 => worst < 95                # none for what was not run here
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml
from jupytext.myst import MystMetadataParsingError
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from plain import LABEL as MARK
from plain import plain

BOOK = Path(__file__).resolve().parent
SET_UP = """# Installs the project on Colab; does nothing where it is installed already.
import importlib.util, os, subprocess, sys

ADDRESS = ""
if importlib.util.find_spec("hope") is None:
    if not ADDRESS:
        raise ModuleNotFoundError(
            "hope is not installed, and the project has no public address yet to "
            "install it from. Run this notebook from a clone of the project: "
            "pip install -e '.[book]' in its folder, then open book/."
        )
    for command in (
        ["git", "clone", "--depth", "1", ADDRESS, "nested-learning"],
        [sys.executable, "-m", "pip", "install", "-q", "./nested-learning"],
    ):
        subprocess.run(command, check=True)
    importlib.invalidate_caches()
if os.path.isdir("nested-learning/book"):
    os.chdir("nested-learning/book")"""
LABEL = r"(?:eq|def|alg|sec)-\d+(?:-\d+)*(?:-[a-z]+)*"
STATUSES = ("holds", "definition", "erratum", "not reproduced")
ITEMS = [f"fig-{n}" for n in (4, 6, 7, 8, 9, 10, 11, 12)] + [f"table-{n}" for n in range(1, 7)]  # of the scorecard
ITEMS += [f"claim-{n}" for n in range(1, 5)]
OUTCOMES = ("reproduced", "partly", "not reproduced", "not run here")
FIELDS = {
    "erratum": ("Printed", "Why it cannot be meant", "Corrected", "Size", "Implemented as printed"),
    "not reproduced": ("Claimed", "Tried", "Found", "Size", "What would settle it"),
}


class Mistake(Exception):
    """A text that breaks the rules above; the message names the place and the fix."""


# ----------------------------------------------------------------------------------------------------------------------
# What a text holds: labels, checks, errata


def texts() -> list[Path]:
    return sorted((BOOK / "text").glob("*.md"))


def chapters() -> list[Path]:
    """Numbered texts: not the appendices and the glossary."""
    return [text for text in texts() if text.name[0].isdigit()]


def labels(text: Path) -> list[str]:
    return re.findall(rf"(?m)^\(({LABEL})\)=$", text.read_text())


def spoken(label: str) -> str:
    """eq-9 -> (9), def-2 -> Definition 2, sec-3-3-generation -> Section 3.3, generation."""
    kind, number, rest = re.fullmatch(r"([a-z]+)-([\d-]*\d)-?(.*)", label).groups()
    if kind == "eq":
        return f"({number})"
    name = {"def": "Definition", "alg": "Algorithm", "sec": "Section", "fig": "Figure"}.get(kind, kind.capitalize())
    return f"{name} {number.replace('-', '.')}" + (f", {rest}" if rest else "")


def order(label: str) -> tuple:
    """Equations first, by number."""
    return not label.startswith("eq"), [int(s) if s.isdigit() else s for s in label.split("-")[1:]]


@dataclass(frozen=True)
class Check:
    text: Path
    cell: int
    label: str
    status: str
    name: str
    edits: tuple[tuple[str, str], ...]  # (old, new) in the cell's source


def declarations(text: Path) -> Iterator[tuple[int, str, dict, str]]:
    """What cells declare under `checks`: the cell's number, the label, what it says, the cell's source."""
    for i, cell in enumerate(jupytext.read(text).cells):
        for label, says in cell.metadata.get("checks", {}).items():
            yield i, label, says, cell.source


def edits(says: dict, source: str, where: str) -> tuple[tuple[str, str], ...]:
    """The wrong claims of a check as (old, new). Raises Mistake for one that does not fit its cell."""
    lines = [says["perturb"]] if isinstance(says["perturb"], str) else says["perturb"]
    found = tuple(tuple(line.split(" => ")) for line in lines)
    for line, edit in zip(lines, found):
        if len(edit) != 2 or edit[0] == edit[1] or source.count(edit[0]) != 1:
            raise Mistake(f"{where}: {line!r} must be OLD => NEW, with OLD once in the cell")
    return found


def checks(text: Path) -> list[Check]:
    """The checks of equations that a text's cells declare. Raises Mistake for one that is declared wrongly."""
    found, known = [], labels(text)
    for i, label, says, source in declarations(text):
        if label in ITEMS:
            continue
        where = f"book/text/{text.name}: the check of {label}"
        if label not in known:
            raise Mistake(f"{where} has no equation; put the line ({label})= before it")
        status = [s for s in STATUSES if s in says]
        if len(status) != 1 or set(says) != {status[0], "perturb"}:
            raise Mistake(f"{where} has {', '.join(says)}; give one of {', '.join(STATUSES)}, and perturb")
        check = Check(text, i, label, status[0], says[status[0]], edits(says, source, where))
        if check.status == "erratum" and len(check.edits) < 2:
            raise Mistake(f"{where} is an erratum: perturb the corrected form, and the printed one")
        found.append(check)
    return found


@dataclass(frozen=True)
class Score(Check):
    paper: str
    ours: str
    seeds: str
    command: str


def scores(text: Path) -> list[Score]:
    """What a text has to say about figures, tables and claims of the paper. Raises Mistake for a wrong declaration."""
    found, fields = [], ("paper", "ours", "seeds", "command")
    for i, label, says, source in declarations(text):
        if label not in ITEMS:
            continue
        where = f"book/text/{text.name}: the result for {label}"
        if f"({label})=" not in text.read_text().splitlines():
            raise Mistake(f"{where} has no place to link to; put the line ({label})= before its section")
        status = [s for s in OUTCOMES if s in says]
        wanted = {*status, *fields} | ({"perturb"} - {"perturb" for s in status if s == "not run here"})
        if len(status) != 1 or set(says) != wanted:
            raise Mistake(
                f"{where} has {', '.join(says)}; give one of {', '.join(OUTCOMES)}, and {', '.join(fields)}, perturb"
            )
        tried = edits(says, source, where) if "perturb" in says else ()
        found.append(Score(text, i, label, status[0], says[status[0]], tried, *(str(says[f]) for f in fields)))
    return found


@dataclass(frozen=True)
class Mutant:
    module: str  # as hope.py
    old: str
    new: str

    @property
    def source(self) -> str:
        """The module as a chapter would import it, edited."""
        return Path(importlib.util.find_spec(self.module.removesuffix(".py")).origin).read_text()


def mutants(text: Path) -> list[Mutant]:
    """The wrong modules that a text declares. Raises Mistake for an edit that does not fit its module."""
    found = []
    for entry in jupytext.read(text).metadata.get("mutants", []):
        where = f"book/text/{text.name}: the mutant {entry!r}"
        if not isinstance(entry, dict) or len(entry) != 1:
            raise Mistake(f"{where} must be MODULE: OLD => NEW")
        ((module, edit),) = entry.items()
        if not (module.endswith(".py") and importlib.util.find_spec(module.removesuffix(".py"))):
            raise Mistake(f"{where}: {module} is no module that can be imported; give one as hope.py")
        mutant = Mutant(module, *edit.split(" => ")) if edit.count(" => ") == 1 else None
        if mutant is None or mutant.old == mutant.new or mutant.source.count(mutant.old) != 1:
            raise Mistake(f"{where} must be MODULE: OLD => NEW, with OLD once in the module")
        found.append(mutant)
    return found


@dataclass(frozen=True)
class Erratum:
    text: Path
    status: str  # erratum, or not reproduced
    title: str
    labels: list[str]
    fields: dict[str, str]


def errata(text: Path) -> list[Erratum]:
    """The errata and unreproduced claims of a text. Raises Mistake for a block that is not as described above."""
    found, source = [], text.read_text()
    block = r"(?ms)^:::\{admonition\} (Erratum|Not reproduced): ([^\n]+)\n:class: (?:erratum|claim)\n\n(.*?)\n:::$"
    for kind, title, body in re.findall(block, source):
        status, parts = kind.lower(), re.split(r"(?m)^\*\*([^*\n]+)\.\*\*\s+", body)
        fields = FIELDS[status]
        if parts[0].strip() or tuple(parts[1::2]) != fields:
            raise Mistake(f"book/text/{text.name}: {kind} {title} must have the paragraphs: {', '.join(fields)}")
        about = re.findall(rf"\(#({LABEL})\)", title)
        found.append(Erratum(text, status, title, about, dict(zip(fields, map(str.strip, parts[2::2])))))
    if len(found) != source.count("Erratum: ") + source.count("Not reproduced: "):
        raise Mistake(f"book/text/{text.name}: an erratum is not in the form that book/make.py describes")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Pages that are collected from the others


def title(text: Path) -> str:
    return re.search(r"(?m)^# (.+)$", text.read_text())[1]


def number(text: Path) -> int:
    """The chapter that a text is, or goes on with: 05-... and 05b-... are both 5."""
    return int(re.match(r"\d+", text.name)[0])


def place(text: Path) -> str:
    """The chapter's number, as its cards and the contents give it."""
    return str(number(text)) + (", continued" if re.match(r"\d+[a-z]", text.name) else "")


def minutes(text: Path) -> int:
    """How long a text takes to read at 150 words a minute, a formula as one word, without its code; in steps of 5."""
    prose = "\n".join(cell.source for cell in jupytext.read(text).cells if cell.cell_type == "markdown")
    words = re.sub(r"(?s)\$\$.*?\$\$|\$[^$]*\$", " x ", prose).split()
    return max(5, 5 * round(len(words) / 150 / 5))


def contents() -> str:
    rows = ["| chapter | question |", "|---|---|", f"| 0. {title(chapters()[0])} | you are here |"]
    for text in chapters()[1:]:
        question = jupytext.read(text).metadata.get("question")
        if question is None:
            raise Mistake(f"book/text/{text.name}: the front matter has no question; add one for the contents page")
        rows.append(f"| {place(text)}. [{title(text)}]({text.stem}.ipynb) | {question} |")
    return "\n".join(rows)


def in_table(words: str) -> str:
    """With its bars, which would end a cell, escaped."""
    return words.replace("|", r"\|")


def equations() -> str:
    found = sorted((check for text in chapters() for check in checks(text)), key=lambda c: order(c.label))
    status = {check.label: check.status for check in found}
    count = {s: list(status.values()).count(s) for s in STATUSES}
    total = (
        f"Of {len(status)} entries so far, {count['holds']} hold as printed, {count['definition']} are definitions, "
        f"{count['erratum']} have an erratum, and what is claimed beside {count['not reproduced']} was not reproduced."
    )
    rows = [total, "", "| equation | chapter | status | what its check asserts |", "|---|---|---|---|"]
    rows += [
        f"| [{spoken(c.label)}](#{c.label}) | [{number(c.text)}]({c.text.stem}.ipynb) | {c.status} | {in_table(c.name)} |"
        for c in found
    ]
    return "\n".join(rows)


def all_errata() -> str:
    """Errata by their number, then what was not reproduced."""
    found = [e for text in chapters() for e in errata(text)]
    found.sort(key=lambda e: (STATUSES.index(e.status), order(e.labels[0])))
    parts = []
    for e in found:
        plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", e.title)
        kind = "" if plain[0] != "(" else "Equations " if len(e.labels) > 1 else "Equation "
        kind = f"Not reproduced: {kind.lower()}" if e.status == "not reproduced" else kind
        parts.append(
            f"## {kind}{plain}\n\n{e.title} in chapter {number(e.text)}, [{title(e.text)}]({e.text.stem}.ipynb)."
        )
        parts += [f"**{name}.** {words}" for name, words in e.fields.items()]
    return "\n\n".join(parts)


def scorecard() -> str:
    """A table of every item with its status, then what the paper shows and what was found, one by one."""
    found = {score.label: score for text in chapters() for score in scores(text)}
    ordered = [found[label] for label in ITEMS if label in found]
    count = [f"{sum(s.status == o for s in ordered)} {o}" for o in OUTCOMES]
    total = f"Of {len(ordered)} items, {', '.join(count)}."
    rows = [total, "", "| item | chapter | status | in short |", "|---|---|---|---|"]
    rows += [
        f"| [{spoken(s.label)}](#{s.label}) | [{number(s.text)}]({s.text.stem}.ipynb) | {s.status} | {in_table(s.name)} |"
        for s in ordered
    ]
    sentence = lambda words: f"{words[0].upper()}{words[1:]}."
    for s in ordered:
        rows += [
            "",
            f"## {spoken(s.label)}: {s.status}",
            "",
            f"{sentence(s.name)} [Chapter {number(s.text)}](#{s.label}).",
        ]
        rows += ["", f"**The paper.** {sentence(s.paper)}", "", f"**Here.** {sentence(s.ours)} Seeds: {s.seeds}."]
        rows += ["", f"**Again.** `{s.command}`"]
    return "\n".join(rows)


COLLECTED = {"contents": contents, "equations": equations, "errata": all_errata, "scorecard": scorecard}


@functools.cache
def places() -> dict[str, str]:
    """The page of each label."""
    return {label: text.stem for text in texts() for label in re.findall(MARK, text.read_text())}


def from_text(text: Path, site: bool = False) -> nbformat.NotebookNode:
    """The notebook that a text defines, without outputs; for the site its Markdown is left as MyST."""
    address = yaml.safe_load((BOOK / "_config.yml").read_text())["repository"]["url"]
    notebook = jupytext.read(text)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # stable, so that making a notebook again changes nothing
        if "set-up" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-input")
            cell.metadata["mystnb"] = {f"code_prompt_{does}": "Set-up for Colab" for does in ("show", "hide")}
            cell.source = SET_UP.replace('ADDRESS = ""', f'ADDRESS = "{address}"')
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"<!-- make: (\w+) -->", lambda marker: COLLECTED[marker[1]](), cell.source)
    if not site:
        plain(notebook.cells, text.stem, places(), BOOK / "references.bib")
    return notebook


# ----------------------------------------------------------------------------------------------------------------------
# Running


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


def take_prose(text: Path, stored: Path) -> None:
    """Give a stored notebook the Markdown and metadata of its text. Raises Mistake where code differs, too."""
    old, new = nbformat.read(stored, as_version=4) if stored.exists() else None, from_text(text)
    code = lambda notebook: [(c.cell_type, c.source if c.cell_type == "code" else "") for c in notebook.cells]
    if old is None or code(old) != code(new):
        raise Mistake(f"book/{stored.name}: its code is not that of its text; run: python book/make.py {text.stem}")
    for cell, source in zip(old.cells, new.cells):
        cell.source, cell.metadata = source.source, source.metadata
    nbformat.write(old, stored)


def ending(run: Callable[[], None]) -> str:
    """How a function ends that is run in a child process, which leaves everything here as it was: "passes" or an error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        end = "passes"
        try:
            run()
        except AssertionError:
            end = "AssertionError"
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
        os.write(write, end.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        end = pipe.read()
    os.waitpid(child, 0)
    return end or "a dead process"


def run_cell(source: str, name: str, namespace: dict) -> None:
    exec(compile(re.sub(r"(?m)^%.*$", "", source), name, "exec"), namespace)


def run_with(mutant: Mutant, text: Path) -> None:
    """Run a chapter with an edited module, up to the first check cell that fails; AssertionError if there is one."""
    checked, namespace = {i for i, *_ in declarations(text)}, {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:  # a file, since Triton reads a kernel's source from one
        (Path(folder) / mutant.module).write_text(mutant.source.replace(mutant.old, mutant.new))
        sys.path.insert(0, folder)
        for i, cell in enumerate(from_text(text).cells):
            if cell.cell_type == "code":
                with contextlib.nullcontext() if i in checked else contextlib.suppress(AssertionError):
                    run_cell(cell.source, f"{text.name}, cell {i}", namespace)


def mutate(text: Path) -> Iterator[str]:
    """Run a chapter here, with each of its mutants and with each check's claim perturbed; yields what goes unnoticed."""
    declared, wrong = [*checks(text), *scores(text)], mutants(text)
    if not declared and not wrong:
        return
    os.environ["MPLBACKEND"] = "Agg"
    os.chdir(BOOK)
    warnings.simplefilter("ignore")  # Agg has no window to show a figure in
    import torch

    torch.set_num_threads(1)
    torch.set_num_threads = lambda n: None  # a pool of threads does not survive a fork
    for mutant in wrong:  # before this process imports the modules
        if (end := ending(lambda: run_with(mutant, text))) != "AssertionError":
            yield f"book/text/{text.name}: the checks with {mutant.module} {mutant.old!r} -> {mutant.new!r}: {end}"
    namespace = {"__name__": "__main__"}
    for i, cell in enumerate(from_text(text).cells):
        for check in declared if cell.cell_type == "code" else ():
            for old, new in check.edits if check.cell == i else ():
                end = ending(lambda: run_cell(cell.source.replace(old, new), "<perturbed>", namespace))
                if end != "AssertionError":
                    yield f"book/text/{text.name}: the check of {check.label} with {old!r} -> {new!r}: {end}"
        if cell.cell_type == "code":
            run_cell(cell.source, f"{text.name}, cell {i}", namespace)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", nargs="?", default="", help="how the chapter's file name begins, as in 01")
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if a notebook is out of date")
    parser.add_argument("--prose", action="store_true", help="only take over prose, where no code has changed")
    parser.add_argument("--mutate", action="store_true", help="only try the checks; exit code 1 if one can't fail")
    args = parser.parse_args()
    chosen = [text for text in texts() if text.name.startswith(args.chapter)]
    if not chosen:
        parser.error(f"no chapter begins with {args.chapter!r}; see book/text/")
    bad = []
    for text in chosen:
        stored = BOOK / f"{text.stem}.ipynb"
        try:
            if args.mutate and len(chosen) > 1:  # chapters set global defaults: each gets a process of its own
                subprocess.run([sys.executable, __file__, "--mutate", text.stem], check=True)
            elif args.mutate:
                with contextlib.redirect_stdout(None):
                    bad += mutate(text)
            elif args.check:
                if problem := differs(text, stored):
                    bad.append(f"book/{stored.name} {problem}; run: python book/make.py {text.stem}")
            elif args.prose:
                take_prose(text, stored)
            else:
                print(f"book/{stored.name}", flush=True)
                nbformat.write(execute(from_text(text)), stored)
        except CellExecutionError as error:
            bad.append(f"book/text/{text.name}: {error}")
        except subprocess.CalledProcessError:
            bad.append(f"book/text/{text.name}: a check can pass for a wrong claim, see above")
        except (Mistake, MystMetadataParsingError) as mistake:
            bad.append(str(mistake))
    if args.check and not args.chapter:
        names = {text.stem for text in chosen}
        bad += [f"book/{p.name} has no text; delete it" for p in sorted(BOOK.glob("*.ipynb")) if p.stem not in names]
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
