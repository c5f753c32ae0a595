"""The house rule: imports go down the floors, never up."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "glm45"

# From the roof to the ground; a folder may import itself and anything after it.
FLOORS = [
    "cli",
    "recipes",
    "report",
    "evaluation",
    "posttraining",
    "rl",
    "environments",
    "serving",
    "engine",
    "training",
    "corpus",
    "data",
    "text",
    "model",
    "kernels",
    "page",
    "pipeline",
    "costs",
    "files",
    "seeds",
    "config",
]


def imported_modules(path: Path) -> list[str]:
    """Every absolute `glm45...` module that a file imports, at any depth; `from glm45 import x` counts as glm45.x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it from glm45 so that floors are visible"
            module = node.module or ""
            found += [f"glm45.{alias.name}" for alias in node.names] if module == "glm45" else [module]
    return [name for name in found if name.startswith("glm45.")]


def upward_imports(files: list[Path], root: Path) -> list[str]:
    """Describe every import that goes up a floor."""
    wrong = []
    for path in files:
        here = path.relative_to(root).parts[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
            continue
        for name in imported_modules(path):
            there = name.split(".")[1]
            if there in FLOORS and FLOORS.index(there) < FLOORS.index(here):
                wrong.append(f"{path.relative_to(root)} ({here}) imports {name}, a floor above it")
    return wrong


def test_every_room_is_on_a_floor():
    rooms = {p.name.removesuffix(".py") for p in SOURCE.iterdir() if not p.name.startswith(("_", "py.typed"))}
    assert rooms <= set(FLOORS), f"not on any floor: {rooms - set(FLOORS)}"


def test_imports_only_go_down():
    assert upward_imports(sorted(SOURCE.rglob("*.py")), SOURCE) == []


def test_an_upward_import_is_seen(tmp_path):
    room = tmp_path / "model"
    room.mkdir()
    (room / "bad.py").write_text("def f():\n    from glm45.training import loop\n")
    assert len(upward_imports([room / "bad.py"], tmp_path)) == 1
