import ast
import inspect
import io
import tarfile
from importlib import import_module

import pytest

from glm45.corpus.document import DropLog
from glm45.corpus.read import read_documents
from glm45.corpus.repositories import (
    Repositories,
    RepositoryContexts,
    changelog_entry,
    dependency_order,
    imported_names,
    pack_files,
    release_documents,
    unified_diff,
)
from glm45.corpus.sources import Source, Unit
from glm45.data.splits import is_held_out

FILES = {
    "pkg/app.py": "from pkg import views\nimport pkg.models\n",
    "pkg/views.py": "from .models import Model\nfrom . import helpers\n",
    "pkg/models.py": "import os\n",
    "pkg/helpers.py": "from .models import Model\n",
    "pkg/__init__.py": "",
    "pkg/page.js": "let x = 1;\n",
}


def test_files_come_after_what_they_import():
    order = dependency_order(FILES)
    assert sorted(order) == sorted(FILES)
    place = {path: order.index(path) for path in order}
    assert place["pkg/models.py"] < place["pkg/helpers.py"] < place["pkg/views.py"] < place["pkg/app.py"]


def test_a_circle_of_imports_is_opened_the_same_way_every_time():
    circle = {"p/a.py": "import p.b\n", "p/b.py": "import p.c\n", "p/c.py": "import p.a\n", "p/d.py": "import p.a\n"}
    order = dependency_order(circle)
    assert sorted(order) == sorted(circle)
    assert order == dependency_order(dict(reversed(circle.items())))
    assert order.index("p/d.py") > order.index("p/a.py")


def test_no_file_is_cut_or_lost_when_contexts_are_packed():
    sources = {f"f{i}.py": "x" * size for i, size in enumerate([40, 50, 500, 10, 10])}
    contexts = list(pack_files(list(sources), sources, 160))
    assert all(len(context) <= 160 for context in contexts if context.count("# File:") > 1)
    assert [line for context in contexts for line in context.split() if line.startswith("x")] == list(sources.values())


def test_contexts_follow_their_package_and_hold_what_was_passed_even_if_it_is_cut_later(make_document):
    documents = [
        make_document("A", kind="code", package="p", path="a.py"),
        make_document("B", kind="code", package="p", path="b.py", bucket="heldout"),
        make_document("C", kind="code", package="p", path="c.py"),
        make_document("D", kind="code", package="q", path="d.py"),
        make_document("E", kind="code", package="", path="0"),  # records of a file are no package
        make_document("F", kind="code", package="", path="1"),
    ]
    seen = []
    for document in RepositoryContexts(Repositories()).run(documents):
        seen.append((document.metadata["kind"], document.metadata["package"], document.text))
        document.text = "changed by a later step"
    context = next(text for kind, _, text in seen if kind == "repository")
    assert [(kind, package) for kind, package, _ in seen] == [
        *[("code", "p")] * 3,
        *[("repository", "p"), ("code", "q"), ("code", ""), ("code", "")],
    ]
    assert context == "# File: a.py\nA\n\n# File: c.py\nC\n\n"


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"p-1/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return str(path)


def test_consecutive_releases_become_a_changelog_entry_and_its_differences(tmp_path):
    log = "Version 1.1\n-----------\n\n- Greets politely. #12\n\nVersion 1.0\n-----------\n\n- First.\n"
    old = archive(tmp_path / "p-1.0.tar.gz", {"p.py": "print('hi')\n", "old.py": "x = 1\n"})
    new = archive(tmp_path / "p-1.1.tar.gz", {"p.py": "print('good day')\n", "CHANGES.rst": log})
    unit = Unit("s", "p", "1.1", "MIT", 1, (old, new))
    source = Source(name="s", reader="sdists")
    [document] = release_documents(source, unit, Repositories(), set(), DropLog(tmp_path / "drops"))
    assert document.text.startswith("Issue: p 1.1\n\nVersion 1.1\n-----------\n\n- Greets politely. #12\n\ndiff --git")
    assert "-print('hi')\n+print('good day')\n" in document.text
    assert "--- a/old.py\n+++ /dev/null" in document.text
    assert "First." not in document.text


def test_a_held_out_file_is_in_no_release_whatever_its_ending_was(tmp_path):
    files = {f"docs/page{number}": f"The secret of page {number}.\n" for number in range(40)}
    old = archive(tmp_path / "p-1.0.tar.gz", {f"{name}.rst": text for name, text in files.items()})
    new = archive(tmp_path / "p-1.1.tar.gz", {f"{name}.md": f"# {text}" for name, text in files.items()})
    unit, source = Unit("s", "p", "1.1", "MIT", 1, (old, new)), Source(name="s", reader="sdists")
    documents = list(read_documents(source, unit, DropLog(tmp_path / "drops"), Repositories(), held_out_fraction=0.3))
    pages = [document for document in documents if document.metadata["kind"] == "prose"]
    released = "".join(document.text for document in documents if document.metadata["kind"] == "repository")
    held_out = [page for page in pages if is_held_out(page.id, 0.3)]
    assert 0 < len(held_out) < len(pages) == 40
    for page in pages:
        assert (page.text.removeprefix("# ").strip() in released) == (page not in held_out)


def test_a_heading_must_name_exactly_the_version():
    files = {"CHANGES.md": "# 2.10\n\nten\n\n# 2.1\n\none\n"}
    assert changelog_entry(files, "2.1") == "# 2.1\n\none"
    assert changelog_entry(files, "3.0") == ""


def test_a_difference_without_final_newline_says_so():
    assert unified_diff("a\n", "a", "f").count("\\ No newline at end of file") == 1
    assert unified_diff("a\n", "a\n", "f") == ""


@pytest.mark.parametrize(
    "module", ["asyncio", "concurrent.futures", "email.message", "ssl", "tarfile", "xml.sax", "zipfile"]
)
def test_imports_are_found_without_parsing(module):
    """Against the parser, on the standard library's own files."""
    text = inspect.getsource(import_module(module))
    expected = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            expected |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            expected |= {base} | {f"{base}.{alias.name}" if node.module else base + alias.name for alias in node.names}
    assert imported_names(text) == expected


def test_imports_may_go_over_lines_and_bear_comments_and_other_names():
    text = "from .a import (  # why\n    b as c,\n    d,\n)\nimport e.f as g, \\\n    h\n"
    text += "    from .. import i\nx = 'import y'\n"
    assert imported_names(text) == {".a", ".a.b", ".a.d", "e.f", "h", "..", "..i"}


def test_a_giant_package_is_contexts_by_instalments(make_document, monkeypatch):
    monkeypatch.setattr("glm45.corpus.repositories.MAX_HELD_CHARACTERS", 25)
    documents = [make_document("x" * 10, kind="code", path=f"{i}.py") for i in range(7)]
    made = list(RepositoryContexts(Repositories()).run(documents))
    contexts = [document.text.count("# File:") for document in made if document.metadata["kind"] == "repository"]
    assert contexts == [3, 3]  # the last file alone is no context
    assert len({document.id for document in made}) == len(made)
