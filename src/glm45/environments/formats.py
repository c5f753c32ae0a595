"""Checks of form that hold for every domain: faults of format, repetition, mixing of languages.

The report penalises these pathologies in general RL (section 3.4, pathology RL) and drops such samples in rejection
sampling (section 3.1). Rates are shares between 0 and 1; thresholds belong to whoever uses them.
"""

import re
import unicodedata
from collections import Counter

from glm45.environments.protocol import Message

SCRIPTS = (
    "LATIN",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "CYRILLIC",
    "ARABIC",
    "GREEK",
    "HEBREW",
    "DEVANAGARI",
    "THAI",
)
ASCII_LETTER, NOT_ASCII = re.compile("[A-Za-z]"), re.compile(r"[^\x00-\x7f]")


def format_faults(response: Message, thinking: bool) -> list[str]:
    """Return what is wrong with the form of a response: the parser's faults, and a mode that was not asked for."""
    faults = list(response.get("faults") or [])
    reasoning = (response.get("reasoning_content") or "").strip()
    if thinking and not reasoning:
        faults.append("no reasoning where thinking was asked for")
    if not thinking and reasoning:
        faults.append("reasoning where a direct answer was asked for")
    if not (response.get("content") or "").strip() and not response.get("tool_calls"):
        faults.append("neither content nor a call")
    return faults


def repetition_rate(text: str, num_words: int = 4) -> float:
    """Return the share of `num_words`-grams that occurred before in the text; 0 where there are fewer than eight.

    Text without spaces is cut into characters instead, in grams of twelve.
    """
    words: list[str] = text.split()
    if len(words) < len(text) / 40:  # no spaces to speak of
        words, num_words = list(text), 12
    grams = [tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) >= 8 else 0.0


def language_mixing_rate(text: str, allowed: str = "") -> float:
    """Return the share of letters outside the main script of `allowed` (usually the prompt), or of the text itself.

    Greek counts where `allowed` is Greek and nowhere else, since formulas are full of it; kana and Han characters count
    as one script.
    """
    scripts, reference = _scripts(text), _scripts(allowed)
    main = max(reference, key=lambda script: reference[script], default="")
    if main != "GREEK":
        scripts.pop("GREEK", None)
    total = sum(scripts.values())
    if total == 0:
        return 0.0
    return 1.0 - scripts[main or max(scripts, key=lambda script: scripts[script])] / total


def _scripts(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    if num_latin := len(ASCII_LETTER.findall(text)):
        counts["LATIN"] = num_latin
    for character in NOT_ASCII.findall(text):
        if character.isalpha():
            script = unicodedata.name(character, "").split(" ")[0]
            script = "CJK" if script in ("HIRAGANA", "KATAKANA") else script
            counts[script if script in SCRIPTS else "OTHER"] += 1
    return counts
