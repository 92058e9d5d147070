"""What the files around the code promise."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import hope
import optim

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_uses_the_dependencies_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] and conda == ["python" + PROJECT["requires-python"], "pip"]
    assert pip == {"pip": ["-e .[test]"]} and "test" in PROJECT["optional-dependencies"]


def test_torch_has_an_upper_bound_and_triton_is_for_linux():
    requirements = {re.split(r"[<>=!]", d)[0]: d for d in PROJECT["dependencies"]}
    assert requirements["torch"] == "torch>=2.9,<2.14"
    assert "platform_system == 'Linux'" in requirements["triton"]


def test_every_import_of_the_code_is_a_dependency():
    listed = {re.split(r"[<>=!]", d)[0] for d in PROJECT["dependencies"]}
    ours = {path.stem for path in ROOT.glob("*.py")}
    for name in ours - {"harness", "modeling_hope"}:  # these need extras, and are imported where they are
        used = set()
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module]
                used |= {name.split(".")[0] for name in names}
        used -= sys.stdlib_module_names | ours
        assert used <= listed, (name, used - listed)


def test_the_version_has_one_source():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in PROJECT["dynamic"] and settings["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "hope.__version__"
    }
    # A plain text, so that building the package need not import torch.
    assert re.search(rf'^__version__ = "{re.escape(hope.__version__)}"', (ROOT / "hope.py").read_text(), re.M)


def test_what_modules_offer_exists_and_is_what_a_star_imports():
    for module in (hope, optim):
        assert len(set(module.__all__)) == len(module.__all__) and all(hasattr(module, name) for name in module.__all__)
    assert {"Hope", "Memory", "HopeConfig", "load", "levels"} <= set(hope.__all__)
    assert set(optim.__all__) == {c.__name__ for c in vars(optim).values() if isinstance(c, type) and c.__module__ == "optim"
                                  and issubclass(c, torch.optim.Optimizer)}  # fmt: skip
    assert "import hope" not in (ROOT / "optim.py").read_text() and "import optim" not in (ROOT / "hope.py").read_text()


@pytest.mark.parametrize(
    "name, most", [("kernels", 1500), ("hope", 1300), ("optim", 450), ("train", 1300), ("evaluation", 750)]
)
def test_a_file_stays_within_its_lines(name, most):
    """What outgrows its budget is usually a special case that a cleaner mechanism removes, or a job for a library."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= most
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_top_level_modules_are_those_that_are_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(p.stem for p in ROOT.glob("*.py")) == settings["tool"]["setuptools"]["py-modules"]


def test_readme_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert (
        text.index("`pip install -e . && python train.py`")
        < text.index('`pip install -e ".[test]" && pytest --nbval`')
        < 1000
    )


def test_the_kernels_tests_start_where_only_pytest_is_installed():
    """With the options of pyproject.toml, but without the plugins that these are for."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:nbval", "--collect-only", "-q", "-m", "gpu"]
    found = subprocess.run([*command, "tests/test_triton.py"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and "test_gates_of_exactly_zero_and_one" in found.stdout, found.stderr[-2000:]
