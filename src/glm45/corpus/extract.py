"""From bytes to text: what kind of file it is, its encoding, and the text inside, with code blocks kept.

Whatever cannot be read raises `Skip` with a reason; the caller counts it.
"""

import ast
import codecs
import io
import re
import tokenize
from pathlib import Path, PurePosixPath
from typing import IO

from glm45.corpus.sources import TOO_LARGE, UNREADABLE

CODE_LANGUAGES = {
    ".py": "python",
    ".pyi": "python",
    ".pyx": "cython",
    ".js": "javascript",
    ".mjs": "javascript",
    ".ts": "typescript",
    ".c": "c",
    ".h": "c",
    ".cc": "c++",
    ".cpp": "c++",
    ".hpp": "c++",
    ".cu": "cuda",
    ".rs": "rust",
    ".go": "go",
    ".java": "java",
    ".sh": "shell",
    ".sql": "sql",
    ".el": "lisp",
    ".lua": "lua",
    ".rb": "ruby",
    ".php": "php",
    ".pl": "perl",
    ".pm": "perl",
    ".cs": "c#",
    ".kt": "kotlin",
    ".swift": "swift",
    ".scala": "scala",
    ".hs": "haskell",
    ".r": "r",
    ".jl": "julia",
    ".css": "css",
    ".mm": "metamath",
}
PROSE_SUFFIXES = {".rst", ".md", ".markdown", ".txt", ".org", ".adoc", ".tex", ".texi", ".dict", ".text"}
WEB_SUFFIXES = {".html", ".htm", ".xhtml"}
PROSE_NAMES = {"readme", "changes", "changelog", "news", "history", "authors", "contributing", "install", "todo"}
MANUAL_PAGE = re.compile(r"\.[1-9][a-z]*$")
NUM_SNIFFED_BYTES = 8192
COLLECTIONS = (".dict", ".mm")  # files that hold thousands of separate entries
PIECE_CHARACTERS = 20_000
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}

_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=]")
_BLANK_LINES = re.compile(r"\n{4,}")
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class Skip(Exception):  # noqa: N818 - not an error: a counted reason not to read a file
    """Why a file gives no document."""


def open_lines(path: Path) -> IO[bytes]:
    """Open a file of lines, compressed or not. A file that is cut short raises OSError or EOFError before its end.

    Arrow's decompression notices; zstandard's reads less of it.
    """
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    from pyarrow import input_stream

    return io.BufferedReader(input_stream(path, compression=COMPRESSIONS[path.suffix]), 1 << 20)


def kind_of(path: str) -> tuple[str, str]:
    """Return `(kind, language)` of a path: ("code", "python"), ("prose", ""), ("web", "") or ("manual", "").

    Raises Skip for a file type that holds no text for us.
    """
    name = PurePosixPath(path)
    suffix = name.suffix.lower()
    if suffix in CODE_LANGUAGES:
        return "code", CODE_LANGUAGES[suffix]
    if suffix in WEB_SUFFIXES:
        return "web", ""
    if suffix in PROSE_SUFFIXES or (not suffix and name.name.lower() in PROSE_NAMES):
        return "prose", ""
    if MANUAL_PAGE.search(name.name) and "man" in path:
        return "manual", ""
    raise Skip("file type without text")


def decode(content: bytes, path: str) -> str:
    """Return the text of a file: UTF-8, UTF-16 with its mark, or what a Python file declares.

    Raises Skip for binary content, an empty file and bytes that are none of these: a guess would train on mojibake.
    """
    if content == UNREADABLE:
        raise Skip("unreadable file")
    if content == TOO_LARGE:
        raise Skip("file too large")
    if not content.strip():
        raise Skip("empty file")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in content[:NUM_SNIFFED_BYTES]:
        raise Skip("binary file")
    if path.endswith(".py") and any(_CODING.match(line) for line in content.split(b"\n", 2)[:2]):
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        except SyntaxError:
            raise Skip("unknown encoding declared") from None
    try:
        return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except (UnicodeDecodeError, LookupError):
        raise Skip("undecodable bytes") from None


def extract(path: str, content: bytes, docstrings_only: bool = False) -> tuple[str, str, str]:
    """Return `(text, kind, language)` of a file; language is empty for natural languages, to be identified later.

    Raises Skip with the reason if there is no text to be had.
    """
    kind, language = kind_of(path)
    text = decode(content, path)
    if kind == "web":
        return html_text(text), "web", ""
    if kind == "manual":
        return manual_text(text), "prose", ""
    if docstrings_only and kind == "code":
        if language != "python":
            raise Skip("no docstrings in this language")
        return docstrings(text, path), "prose", ""
    return text, kind, language


def split_long(text: str, path: str) -> list[str]:
    """Return a dictionary or a database of proofs in pieces, parted at blank lines; anything else as it is."""
    if not path.endswith(COLLECTIONS):
        return [text]
    pieces, piece, size = [], [], 0
    for paragraph in re.split(r"\n(?=\s*\n)", text):
        piece.append(paragraph)
        size += len(paragraph)
        if size >= PIECE_CHARACTERS:
            pieces.append("\n".join(piece).strip("\n"))
            piece, size = [], 0
    return [part for part in [*pieces, "\n".join(piece).strip("\n")] if part]


def html_text(html: str) -> str:
    """Return the main content of a page with block structure kept and every `<pre>` as a fenced code block.

    Raises Skip for a page without main content.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(html)
    if tree.body is not None:
        for block in tree.body.query_selector_all("pre"):
            code = (block.text or "").strip("\n")
            block.text = f"```\n{code}\n```"
    text = extract_plain_text(
        tree, main_content=True, preserve_formatting=True, alt_texts=False, skip_elements=["a.headerlink"]
    )
    if not text.strip():
        raise Skip("page without main content")
    return _BLANK_LINES.sub("\n\n\n", text)


def docstrings(text: str, path: str) -> str:
    """Return the docstrings of a Python module as one readable page, each under its dotted name.

    Raises Skip for a module that does not parse or documents nothing.
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        raise Skip("Python file does not parse") from None
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = []

    def visit(node: ast.AST, dotted: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = ast.get_docstring(node)
            if documentation:
                parts.append(f"{dotted}\n{'=' * len(dotted)}\n\n{documentation}\n")
            for child in node.body:
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    visit(child, f"{dotted}.{child.name}")

    visit(module, name)
    if not parts:
        raise Skip("module without docstrings")
    return "\n".join(parts)


_ROFF_FONT = re.compile(r"\\f(?:\[[^]]*\]|\(..|.)")
_ROFF_CHARACTER = re.compile(r"\\(?:\((..)|\[([^]]*)\])")
_ROFF_NAMES = {
    "bu": "•",
    "em": "—",
    "en": "–",
    "aq": "'",
    "dq": '"',
    "lq": "“",
    "rq": "”",
    "cq": "’",
    "oq": "‘",
    "co": "©",
}


def manual_text(roff: str) -> str:
    """Return a manual page's prose: requests dropped, fonts and escapes resolved, headings on their own line."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".so ")):
            continue
        if line.startswith((".SH", ".SS", ".Sh", ".Ss")):
            lines.append("\n" + line[3:].strip().strip('"'))
        elif line.startswith((".B", ".I", ".R", ".Nm", ".Fl", ".Ar", ".Cm", ".Xr")):
            lines.append(" ".join(line.split()[1:]).replace('"', ""))
        elif line.startswith((".PP", ".P", ".LP", ".TP", ".IP", ".Pp", ".It", ".sp")):
            lines.append("")
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = _ROFF_FONT.sub("", "\n".join(lines))
    text = _ROFF_CHARACTER.sub(lambda match: _ROFF_NAMES.get(match[1] or match[2], ""), text)
    for escape, character in (("\\-", "-"), ("\\e", "\\"), ("\\&", ""), ("\\ ", " "), ("\\|", ""), ("\\~", " ")):
        text = text.replace(escape, character)
    if not text.strip():
        raise Skip("manual page without text")
    return _BLANK_LINES.sub("\n\n", text)
