"""Gopher's filters, several times as fast: datatrove's are asked where counting does not show that a document passes.

Most documents pass, and that they do can be seen from few numbers: of distinct words, and of n-grams as integers. The
verdicts and reasons are datatrove's either way.
Shapes: W words, G n-grams of a text.
"""

from collections import Counter

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.text import PUNCTUATION

from glm45.corpus.document import WORDS


class GopherQuality(GopherQualityFilter):
    """Word and symbol counts; each distinct word is looked at once."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether `doc` is kept, with the reason if it is not."""
        return self._surely_passes(doc.text) or super().filter(doc)

    def _surely_passes(self, text: str) -> bool:
        words = Counter(WORDS.word_tokenize(text))
        lines = text.splitlines()
        visible = {word: count for word, count in words.items() if word.strip(PUNCTUATION)}
        num_words, num_visible = words.total(), sum(visible.values())
        if not self.min_doc_words <= num_visible <= self.max_doc_words or not num_visible:
            return False
        mean_length = sum(len(word) * count for word, count in visible.items()) / num_visible
        alphabetic = sum(count for word, count in visible.items() if any(map(str.isalpha, word)))
        return (
            (self.min_avg_word_length or 0) <= mean_length <= self.max_avg_word_length
            and max(text.count("#"), text.count("...") + text.count("…")) <= self.max_symbol_word_ratio * num_words
            and sum(line.lstrip()[:1] in ("•", "-") for line in lines) <= self.max_bullet_lines_ratio * len(lines)
            and sum(line.rstrip().endswith(("...", "…")) for line in lines)
            <= self.max_ellipsis_lines_ratio * len(lines)
            and alphabetic >= self.max_non_alpha_words_ratio * num_words
        )


class GopherRepetition(GopherRepetitionFilter):
    """Repeated lines as datatrove counts them; repeated n-grams only where bounds leave it open whether they pass."""

    def __init__(self, **limits: object) -> None:
        super().__init__(**limits, language=WORDS)
        self._lines = GopherRepetitionFilter(**(limits | {"top_n_grams": (), "dup_n_grams": ()}), language=WORDS)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether `doc` is kept, with the reason if it is not."""
        verdict = self._lines.filter(doc)
        return verdict if verdict is not True else self._surely_passes(doc.text) or super().filter(doc)

    def _surely_passes(self, text: str) -> bool:
        """Bound every share: of frequent n-grams by the longest among them, of repeated ones by those of 5 words.

        A longer n-gram that came before consists of 5-grams that came before.
        """
        words = WORDS.word_tokenize(text)
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        words_W = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
        lengths_W = np.fromiter(map(len, words), np.int64, len(words))
        ends = np.concatenate([[0], np.cumsum(lengths_W)])
        limits, shortest = dict(self.top_n_grams), min(n for n, _ in self.dup_n_grams)
        grams_G = words_W
        for n in range(2, shortest + 1):
            if len(words) < n:
                return True
            keys_G = grams_G[:-1] * len(numbers) + words_W[n - 1 :]
            _, first, grams_G, counts = np.unique(keys_G, return_index=True, return_inverse=True, return_counts=True)
            most = counts.max()
            longest = (ends[first + n] - ends[first])[counts == most].max() + n - 1
            if longest * most > limits.get(n, np.inf) * len(text):
                return False
        came_before_G = np.ones(len(grams_G), dtype=bool)
        came_before_G[first] = False
        covered_W = np.convolve(came_before_G, np.ones(shortest, dtype=bool))
        return bool(lengths_W[covered_W].sum() <= min(limit for _, limit in self.dup_n_grams) * len(text))
