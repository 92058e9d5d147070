"""What the files around the code promise."""

import re
import tomllib
from pathlib import Path

import yaml

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
    import sys

    for name in ("hope", "kernels", "optim", "train"):
        source = (ROOT / f"{name}.py").read_text()
        used = set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) - sys.stdlib_module_names - {"hope", "kernels", "optim"}
        assert used <= listed, (name, used - listed)


def test_top_level_modules_are_the_three():
    assert {p.name for p in ROOT.glob("*.py")} == {"hope.py", "kernels.py", "optim.py", "train.py"}


def test_readme_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert (
        text.index("`pip install -e . && python train.py`")
        < text.index('`pip install -e ".[test]" && pytest --nbval`')
        < 1000
    )
