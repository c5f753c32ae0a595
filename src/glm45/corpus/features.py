"""What a quality scorer sees of a document: its words, and how it is built, told as words.

fastText knows words only. Statistics that make a good page recognisable in any language (how lines end, how much
repeats, how much is punctuation) are therefore binned and added as tokens such as `__ends_3`.
"""

import re
from collections.abc import Callable

from glm45.corpus.document import count_letters

NUM_CHARACTERS = 6000  # a scorer reads this much from the start of a document
NUM_WORDS = 600
NUM_BINS = 8

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]{2,}")
_CODE_TOKEN = re.compile(r"[A-Za-z_]{2,}|[{}()\[\];:=#@]")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the a an of to and in is it that this for with as be are on by you can not or from which will if when how why "
        "because so we one use used their there than then into also but",
    )
)
_EXPLAINING = re.compile(
    r"\b(?:because|therefore|for example|for instance|means|suppose|consider|let us|note that|in other words|that is"
    r"|how to|you can|we can|first|next|finally|however|instead)\b",
    re.IGNORECASE,
)


def prose_line(text: str) -> str:
    """Return the fastText input line of a text in a natural language."""
    head = text[:NUM_CHARACTERS]
    words = _WORD.findall(head.lower())[:NUM_WORDS]
    return " ".join(words + _tokens(head, _PROSE_SHARES))


def code_line(text: str) -> str:
    """Return the fastText input line of a source file."""
    head = text[:NUM_CHARACTERS]
    words = _CODE_TOKEN.findall(head)[:NUM_WORDS]
    return " ".join(words + _tokens(text[: 4 * NUM_CHARACTERS], _CODE_SHARES))


def _tokens(text: str, shares: dict[str, Callable[[str, list[str]], float]]) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    tokens = []
    for name, share in shares.items():
        level = int(min(max(share(text, lines), 0.0), 1.0) * NUM_BINS)
        tokens += [f"__{name}_{level}"] * 3  # three times, to be heard among hundreds of words
    return tokens


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _line_share(lines: list[str], test: Callable[[str], bool]) -> float:
    return _ratio(sum(map(test, lines)), len(lines))


def _distinct_words(text: str, lines: list[str]) -> float:
    words = _WORD.findall(text.lower())[:NUM_WORDS]
    return _ratio(len(set(words)), len(words))


def _stop_words(text: str, lines: list[str]) -> float:
    words = text.lower().split()
    return 2 * _ratio(sum(word in _STOP_WORDS for word in words), len(words))


def _letters(text: str, lines: list[str]) -> float:
    return _ratio(count_letters(text), len(text))


_PROSE_SHARES: dict[str, Callable[[str, list[str]], float]] = {
    "ends": lambda text, lines: 1.5 * _line_share(lines, lambda line: line.rstrip()[-1] in ".!?:。！？：\"'"),
    "bullets": lambda text, lines: 2 * _line_share(lines, lambda line: line.lstrip()[0] in "*-•+|#"),
    "length": lambda text, lines: _ratio(len(text), len(lines)) / 120,
    "short": lambda text, lines: _line_share(lines, lambda line: len(line) < 25),
    "stop": _stop_words,
    "distinct": _distinct_words,
    "letters": lambda text, lines: (_letters(text, lines) - 0.5) * 2.5,
    "digits": lambda text, lines: 8 * _ratio(sum(map(text.count, "0123456789")), len(text)),
    "explains": lambda text, lines: 40 * _ratio(len(_EXPLAINING.findall(text)), len(text.split())),
    "repeats": lambda text, lines: 2 * (1 - _ratio(len(set(lines)), len(lines))),
    "size": lambda text, lines: len(text) / NUM_CHARACTERS,
}


def _documented(text: str, lines: list[str]) -> float:
    definitions = len(re.findall(r"^\s*(?:async )?(?:def|class|func|function|fn|public|static)\b", text, re.MULTILINE))
    documented = len(re.findall(r'(?:"""|\'\'\'|/\*\*|///)', text)) / 2
    return _ratio(documented, definitions)


_COMMENTS = ("#", "//", "*", "/*")
_IMPORTS = ("import ", "from ", "#include", "use ")
_DEFINITIONS = ("def ", "class ", "async def ", "function ")

_CODE_SHARES: dict[str, Callable[[str, list[str]], float]] = {
    "documented": _documented,
    "comments": lambda text, lines: 4 * _line_share(lines, lambda line: line.lstrip().startswith(_COMMENTS)),
    "length": lambda text, lines: _ratio(len(text), len(lines)) / 80,
    "digits": lambda text, lines: 5 * _ratio(sum(map(text.count, "0123456789")), len(text)),
    "letters": lambda text, lines: (_letters(text, lines) - 0.3) * 2,
    "imports": lambda text, lines: 2 * _line_share(lines, lambda line: line.startswith(_IMPORTS)),
    "definitions": lambda text, lines: 4 * _line_share(lines, lambda line: line.lstrip().startswith(_DEFINITIONS)),
    "asserts": lambda text, lines: 4 * _line_share(lines, lambda line: "assert" in line),
    "literals": lambda text, lines: 1.5 * _line_share(lines, lambda line: line.lstrip()[0] in "\"'({[0123456789-"),
    "repeats": lambda text, lines: 2 * (1 - _ratio(len(set(lines)), len(lines))),
    "size": lambda text, lines: len(text) / (4 * NUM_CHARACTERS),
}
