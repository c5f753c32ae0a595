"""What the package imports is what it asks to be installed: another package's dependency may go away."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMES_WITH = {
    **dict.fromkeys(("loguru", "multiprocess", "fsspec"), "datatrove"),
    **dict.fromkeys(("starlette", "pydantic"), "fastapi"),
}
"""Modules of the machinery of a declared package, which its own interface speaks of."""
WHERE_PRESENT = {"datasets", "transformers", "lm_eval", "ray", "wandb", "trackio", "fastText"}
"""Modules that are looked for where they are used, with an error that says what to install."""


def imported_modules():
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], path)
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name != "glm45"}


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {text.split("[")[0].split(">")[0].split("=")[0].lower() for text in project["dependencies"]}
    distributions = packages_distributions()
    for module, path in imported_modules().items():
        if module in WHERE_PRESENT:
            continue
        names = {COMES_WITH.get(module, name).lower().replace("_", "-") for name in distributions.get(module, [module])}
        if not names & declared:
            pytest.fail(f"{path.relative_to(ROOT)} imports {module}, of {sorted(names)}: name it in pyproject.toml")
