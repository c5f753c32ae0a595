"""The commands and programs in the pages of docs/ that ask for it run, in order, as they stand there."""

import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
OPT_IN = "<!-- run by tests/test_docs.py -->"
PAGES = sorted(page for page in DOCS.glob("*.md") if OPT_IN in page.read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)

MODULES = [
    "argparse",
    "ast",
    "asyncio.tasks",
    "base64",
    "bisect",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "email.message",
    "enum",
    "fractions",
    "functools",
    "glob",
    "gzip",
    "heapq",
    "html.parser",
    "http.client",
    "inspect",
    "io",
    "json",
    "logging",
    "mailbox",
    "os.path",
    "pathlib",
    "pickle",
    "random",
    "re",
    "sched",
    "shutil",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "turtle",
    "typing",
    "unittest.mock",
    "urllib.parse",
    "uuid",
    "wave",
    "zipfile",
]


def write_texts(folder):
    """A folder of text as a user might bring it: what the interpreter says of its modules, a file each."""
    folder.mkdir()
    for name in MODULES:
        text = pydoc.plain(pydoc.render_doc(name))
        (folder / f"{name}.txt").write_text(text[:20_000])


def blocks(page):
    """The page's blocks of shell and Python with their languages, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def test_pages_opt_in():
    assert {"own_data.md", "verifiers.md"} <= {page.name for page in PAGES}
    assert all(blocks(page) for page in PAGES)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_works(page, tmp_path):
    write_texts(tmp_path / "texts")
    for _, code in blocks(page):
        if name := re.match(r"# (\w+\.py)\n", code):  # a file by name, not a program
            (tmp_path / name[1]).write_text(code)
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # What the page leaves running is ended with the shell.
    script = "".join(code if kind == "sh" else f"python - <<'END'\n{code}END\n" for kind, code in blocks(page))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": binaries, "GLM45_DOCS_TEST": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
