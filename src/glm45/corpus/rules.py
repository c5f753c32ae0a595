"""Rules that a document must pass before anything is learnt about it: language, Gopher and FineWeb rules, code rules.

Every threshold is a field of `Rules`. None of them is in the report, which says only that code is filtered by rules
and web text by quality.
"""

import re
from functools import cached_property
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from glm45.config import configuration
from glm45.corpus.document import FOUND_KINDS, UNSPACED, WORDS, DropLog, count_letters
from glm45.corpus.gopher import GopherQuality, GopherRepetition


@configuration
class Rules:
    """Thresholds of the rule filters; defaults are Gopher's and FineWeb's unless said otherwise. Not in the report."""

    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of prose that is kept; empty keeps all. Not in the report."""
    language_characters: int = 1000
    """Language is identified from this many characters from the middle of a document. Not in the report."""
    min_words: int = 50
    """Gopher's least number of words. Not in the report."""
    max_words: int = 100_000
    """Gopher's greatest number of words. Not in the report."""
    max_mean_word_length: int = 12
    """Gopher's 10, relaxed: technical text is full of dotted names. Not in the report."""
    max_symbol_word_ratio: float = 0.1
    """Hash signs or ellipses per word. Not in the report."""
    min_stop_words: int = 2
    """Gopher's least number of different English stop words, where the language is English. Not in the report."""
    min_alphabetic_words: float = 0.7
    """Share of words with a letter; Gopher's 0.8, relaxed for text with code blocks. Not in the report."""
    max_duplicate_lines: float = 0.45
    """Share of repeated lines; Gopher's 0.3, relaxed for reference pages with their recurring headings. Not in the
    report."""
    max_duplicate_line_characters: float = 0.3
    """Share of characters in repeated lines; Gopher's 0.2, relaxed likewise. Not in the report."""
    duplicate_ngram_scale: float = 2.0
    """Factor on Gopher's limits for repeated word n-grams (15 % of characters in repeated 5-grams down to 10 % in
    10-grams): reference pages repeat their parameters. Not in the report."""
    min_terminal_punctuation: float = 0.05
    """Share of lines that end in punctuation; FineWeb's 0.12, relaxed for hard-wrapped text. Not in the report."""
    max_short_lines: float = 0.75
    """Share of lines of at most 30 characters; FineWeb's 0.67, relaxed for code blocks. Not in the report."""
    max_line_repetition: float = 0.3
    """Share of characters in repeated lines, short ones too; FineWeb's 0.01 would drop most technical references. Not
    in the report."""
    max_lines_per_word: float = 0.4
    """FineWeb's list ratio, 0.3 there; relaxed for code blocks. Not in the report."""
    code_min_characters: int = 100
    """Shorter source files are dropped. Not in the report."""
    code_max_characters: int = 500_000
    """Longer source files are dropped: data in disguise. Not in the report."""
    code_max_mean_line: float = 100.0
    """Mean line length of source code. Not in the report."""
    code_max_line: int = 1000
    """Longest line of source code: minified files. Not in the report."""
    code_min_alphanumeric: float = 0.25
    """Share of letters and digits in source code. Not in the report."""
    code_max_digits: float = 0.3
    """Share of digits in source code: tables of numbers. Not in the report."""


GENERATED = re.compile(
    r"do not edit|(?:auto(?:matically)?[- ]?|machine[- ])generated|generated (?:by|from)|@generated", re.IGNORECASE
)
NUM_HEADER_CHARACTERS = 500
GOPHER_DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


class RuleFilter(BaseFilter):
    """Applies the rules of a document's kind; prose and web pages also get their `language`."""

    name = "📏 rules"

    def __init__(self, rules: Rules, log: DropLog) -> None:
        super().__init__(log)
        self.rules = rules

    @cached_property
    def _spaced(self) -> list[BaseFilter]:
        return self._prose_filters(min_mean_word_length=3)

    @cached_property
    def _unspaced(self) -> list[BaseFilter]:
        return self._prose_filters(min_mean_word_length=None)  # a word of Chinese is a character here

    def _prose_filters(self, min_mean_word_length: int | None) -> list[BaseFilter]:
        r = self.rules
        return [
            GopherQuality(
                min_avg_word_length=min_mean_word_length,
                min_doc_words=r.min_words,
                max_doc_words=r.max_words,
                max_avg_word_length=r.max_mean_word_length,
                max_symbol_word_ratio=r.max_symbol_word_ratio,
                max_non_alpha_words_ratio=r.min_alphabetic_words,
                min_stop_words=None,  # English only: applied by `_num_stop_words` where the language is English
                language=WORDS,
            ),
            FineWebQualityFilter(
                line_punct_thr=r.min_terminal_punctuation,
                short_line_thr=r.max_short_lines,
                char_duplicates_ratio=r.max_line_repetition,
                new_line_ratio=r.max_lines_per_word,
                language=WORDS,
            ),
            GopherRepetition(
                dup_line_frac=r.max_duplicate_lines,
                dup_n_grams=tuple((n, limit * r.duplicate_ngram_scale) for n, limit in GOPHER_DUPLICATE_NGRAMS),
                dup_line_char_frac=r.max_duplicate_line_characters,
            ),
        ]

    @cached_property
    def _identifier(self) -> Any:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether `doc` is kept, with the reason if it is not."""
        if doc.metadata["kind"] not in FOUND_KINDS:
            return True
        if doc.metadata["kind"] == "code":
            reason = code_problem(doc.text, self.rules)
            return (False, reason) if reason else True
        doc.metadata["language"] = self.language(doc.text)
        if self.rules.languages and doc.metadata["language"] not in self.rules.languages:
            return False, "other language"
        if doc.metadata["language"] == "en" and _num_stop_words(doc.text) < self.rules.min_stop_words:
            return False, "no stop words"
        for rule in self._unspaced if UNSPACED.search(doc.text) else self._spaced:
            result = rule.filter(doc)
            if isinstance(result, tuple) and not result[0]:
                return False, result[1].replace("_", " ")
        return True

    def language(self, text: str) -> str:
        """Return the ISO 639-1 code of the most likely language of `text`."""
        middle = max(0, (len(text) - self.rules.language_characters) // 2)
        return str(self._identifier.classify(text[middle : middle + self.rules.language_characters])[0])


def _num_stop_words(text: str) -> int:
    words = set(text[:20_000].split())
    return len(words & {"the", "be", "to", "of", "and", "that", "have", "with"})


def code_problem(text: str, rules: Rules) -> str | None:
    """Return why a source file is dropped, or None if it passes."""
    if len(text) < rules.code_min_characters:
        return "code too short"
    if len(text) > rules.code_max_characters:
        return "code too long"
    lines = text.splitlines()
    if max(map(len, lines)) > rules.code_max_line:
        return "code line too long"
    if len(text) / len(lines) > rules.code_max_mean_line:
        return "code mean line too long"
    if GENERATED.search(text[:NUM_HEADER_CHARACTERS]):
        return "code is generated"
    visible = sum(map(len, text.split()))
    digits = sum(map(text.count, "0123456789"))
    letters = count_letters(text)
    if digits > rules.code_max_digits * visible:
        return "code is mostly digits"
    if letters + digits < rules.code_min_alphanumeric * len(text):
        return "code is mostly symbols"
    return None
