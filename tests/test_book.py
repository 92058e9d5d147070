"""The book's bookkeeping: every equation has a label and a check, every check can fail, every erratum has its block."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"


def load(book: Path):
    spec = importlib.util.spec_from_file_location("make", book / "make.py")
    module = sys.modules["make"] = importlib.util.module_from_spec(spec)
    sys.path.append(str(book))
    spec.loader.exec_module(module)
    return module


make = load(BOOK)
CHAPTERS = make.chapters()
by_name = pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.stem)

NUMBER = r"\d+\.\d+(?:e[+-]?\d+)?"  # with a decimal point, as prose cites it

# Which of the paper's equations and unnumbered claims a chapter answers for, once it exists.
span = lambda first, last: [f"eq-{n}" for n in range(first, last + 1)]
EXPECTED = {
    0: [],
    1: span(6, 6),
    2: span(1, 3) + span(7, 13),
    3: span(5, 5) + span(14, 18) + span(21, 21),
    4: [*span(4, 4), *span(19, 20), *span(22, 28), *span(98, 99)]
    + ["def-2", "sec-3-3-backpropagation", "sec-3-3-generation"],
    5: span(29, 34) + span(38, 44) + span(100, 111),
    6: span(35, 37) + span(45, 53) + ["sec-4-3"],
    7: span(54, 60) + span(112, 121),
    8: span(61, 69),
    9: [],
    10: span(70, 74),
    11: [*span(75, 75), "alg-1"],
    12: ["sec-7-3"],
    13: span(76, 89),
    14: span(90, 93),
    15: span(94, 97),
}


def test_the_plan_covers_all_equations_of_the_paper_once() -> None:
    planned = sorted(int(label[3:]) for labels in EXPECTED.values() for label in labels if label.startswith("eq-"))
    assert planned == list(range(1, 122))


@by_name
def test_every_equation_has_a_label_and_a_check(text: Path) -> None:
    pages = [other for other in CHAPTERS if make.number(other) == make.number(text)]
    wanted = set(EXPECTED.get(make.number(text), ()))
    labels = {label for page in pages for label in make.labels(page)}
    assert wanted <= labels, f"no label for {sorted(wanted - labels)}"
    labels, checked = set(make.labels(text)), {check.label for check in make.checks(text)}
    assert labels == checked, f"no check for {sorted(labels - checked)}"


def test_a_label_stands_in_one_place_and_its_tag_agrees() -> None:
    everywhere = [label for text in CHAPTERS for label in make.labels(text)]
    assert sorted(everywhere) == sorted(set(everywhere))
    for text in CHAPTERS:
        for label, display in re.findall(r"(?m)^\((eq-\d+)\)=\n\$\$\n((?:.*\n)*?)\$\$$", text.read_text()):
            assert re.findall(r"\\tag\{(.*?)\}", display) == [label[3:]], label
            everywhere.remove(label)
    assert not [label for label in everywhere if label.startswith("eq-")], "a label without a display right after it"


# The chapters are run twice: by pytest --nbval as their readers do, and here without Triton and with the reference kernels.
WITHOUT_TRITON = (
    "import os, runpy, sys; sys.modules['triton'] = None; del sys.argv[0]; "
    "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
)


@by_name
def test_without_triton_every_check_holds_and_fails_when_its_claim_is_perturbed(text: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON, str(BOOK / "make.py"), "--mutate", text.stem]
    environment = {**os.environ, "HOPE_KERNELS": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr


@by_name
def test_an_equation_has_an_erratum_exactly_if_its_check_says_so(text: Path) -> None:
    stated = {check.label: check.status for check in make.checks(text)}
    assert all(stated[check.label] == check.status for check in make.checks(text)), "two checks disagree"
    described = {label: erratum.status for erratum in make.errata(text) for label in erratum.labels}
    assert described == {label: status for label, status in stated.items() if status in make.FIELDS}


@by_name
def test_the_size_of_an_erratum_is_what_its_check_prints(text: Path) -> None:
    cells = nbformat.read(BOOK / f"{text.stem}.ipynb", as_version=4).cells
    for erratum in make.errata(text):
        printed = {
            number
            for check in make.checks(text)
            if check.label in erratum.labels
            for output in cells[check.cell].outputs
            for number in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", output.get("text", ""))
        }
        said = re.findall(NUMBER, erratum.fields["Size"])
        assert said and set(said) <= printed, f"{erratum.title}: {sorted(set(said) - printed)} are not printed"


# Which figures, tables and main claims of the paper a chapter answers for.
SCORED = {
    6: ["fig-4"],
    9: ["fig-10"],
    11: ["fig-11", "fig-12"],
    16: ["fig-6", "fig-8"],
    17: ["fig-7", "fig-9", "table-1"],
    18: ["table-3", "table-4", "table-5", "table-6"],
    19: ["table-2", "claim-1", "claim-2", "claim-3", "claim-4"],
}


def test_the_plan_covers_every_item_of_the_scorecard_once() -> None:
    assert sorted(label for labels in SCORED.values() for label in labels) == sorted(make.ITEMS)


@by_name
def test_every_item_of_the_scorecard_has_its_result(text: Path) -> None:
    assert sorted(score.label for score in make.scores(text)) == sorted(SCORED.get(make.number(text), ()))


@by_name
def test_a_result_of_the_scorecard_is_what_its_cell_prints(text: Path) -> None:
    cells = nbformat.read(BOOK / f"{text.stem}.ipynb", as_version=4).cells
    for score in make.scores(text):
        printed = " ".join(output.get("text", "") for output in cells[score.cell].outputs)
        said = set(re.findall(NUMBER, score.ours))
        assert said <= set(re.findall(NUMBER, printed)), f"{score.label}: {said} in {printed}"


def test_the_appendices_list_every_check_and_every_erratum() -> None:
    table, errata, scorecard = make.equations(), make.all_errata(), make.scorecard()
    for text in CHAPTERS:
        for check in make.checks(text):
            assert table.count(f"](#{check.label}) |") >= 1 and make.in_table(check.name) in table
        for erratum in make.errata(text):
            assert all(words in errata for words in erratum.fields.values())
        for score in make.scores(text):
            assert f"](#{score.label}) |" in scorecard and score.ours[1:] in scorecard and score.command in scorecard


def test_every_text_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"(?:root|file): (\S+)", (BOOK / "_toc.yml").read_text())
    texts = ["index", *(text.stem for text in make.texts())]
    assert listed[: len(texts)] == texts
    assert sorted(listed[len(texts) :]) == sorted(f"reference/{p.stem}" for p in (BOOK / "reference").glob("*.md"))


CHAPTER = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
question: Does it notice?
MUTANT---

# A chapter

(eq-1)=
$$
1 + 1 = 2 \\tag{1}
$$

```{code-cell} ipython3
---
checks:
  eq-1:
    STATUS: one and one is two
    perturb: EDIT
---
total = 1 + 1
CELL
```
"""


def mutate(
    folder: Path,
    cell: str = "assert total == 2",
    edit: str = "1 + 1 => 1 + 2",
    status: str = "holds",
    mutant: str = "",
):
    book = folder / "book"
    (book / "text").mkdir(parents=True)
    for name in ("make.py", "plain.py", "_config.yml", "references.bib"):
        shutil.copy(BOOK / name, book)
    (book / "arithmetic.py").write_text("def add(a, b):\n    return a + b\n")
    text = CHAPTER.replace("CELL", cell).replace("EDIT", edit).replace("STATUS", status)
    text = text.replace("MUTANT", f"mutants:\n  - {mutant}\n" if mutant else "")
    (book / "text" / "01-a-chapter.md").write_text(text)
    return subprocess.run([sys.executable, str(book / "make.py"), "--mutate"], capture_output=True, text=True)


def test_a_check_that_fails_for_a_wrong_claim_is_accepted(tmp_path: Path) -> None:
    done = mutate(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        (dict(cell="assert total > 0"), "'1 + 1' -> '1 + 2': passes"),
        (dict(edit="1 + 1 => 1 + x"), "NameError"),
        (dict(edit="1 + 1 => 1 +"), "SyntaxError"),
        (dict(edit="2 + 2 => 2 + 3"), "must be OLD => NEW, with OLD once in the cell"),
        (dict(edit="1 => 2"), "with OLD once in the cell"),
        (dict(status="erratum"), "perturb the corrected form, and the printed one"),
        (dict(status="proven"), "give one of holds, definition, erratum, not reproduced"),
    ],
)
def test_a_check_that_proves_nothing_is_refused(tmp_path: Path, how: dict, complaint: str) -> None:
    done = mutate(tmp_path, **how)
    assert done.returncode == 1 and complaint in done.stderr and "eq-1" in done.stderr


def test_perturbed_cells_leave_no_trace(tmp_path: Path) -> None:
    """A perturbed run may overwrite variables and draw random numbers; the cell itself starts from the same state."""
    cell = "import torch\nbefore = globals().get('mark')\nmark = 1\ndrawn = torch.rand(1).item()\n"
    cell += "assert total == 2 and before is None"
    assert mutate(tmp_path, cell=cell).returncode == 0


USES = "from arithmetic import add\nassert add(total, total) == 4"


def test_a_chapter_that_notices_a_wrong_module_is_accepted(tmp_path: Path) -> None:
    done = mutate(tmp_path, cell=USES, mutant="arithmetic.py: a + b => a - b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_a_check_cell_notices(tmp_path: Path) -> None:
    """What an experiment asserts is passed over: it may hold or not for reasons of its own."""
    cell = "assert total == 2\n```\n\n```{code-cell} ipython3\n" + USES
    done = mutate(tmp_path, cell=cell, mutant="arithmetic.py: a + b => a - b")
    assert done.returncode == 1 and "arithmetic.py 'a + b' -> 'a - b': passes" in done.stderr


@pytest.mark.parametrize(
    ("mutant", "complaint"),
    [
        ("arithmetic.py: a + b => b + a", "arithmetic.py 'a + b' -> 'b + a': passes"),
        ("arithmetic.py: a + b => a + c", "NameError"),
        ("arithmetic.py: a * b => a - b", "with OLD once in the module"),
        ("arithmetic.py: a + b", "must be MODULE: OLD => NEW"),
        ("a + b => a - b", "must be MODULE: OLD => NEW"),
        ("algebra.py: a + b => a - b", "algebra.py is no module that can be imported"),
    ],
)
def test_a_wrong_module_that_goes_unnoticed_is_reported(tmp_path: Path, mutant: str, complaint: str) -> None:
    done = mutate(tmp_path, cell=USES, mutant=mutant)
    assert done.returncode == 1 and complaint in done.stderr and "01-a-chapter.md" in done.stderr
