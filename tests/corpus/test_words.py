"""The fast encoder gives what the tokenizer gives, for every text."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45.corpus import words
from glm45.corpus.words import WordEncoder
from glm45.text.special_tokens import SPECIAL_TOKENS
from glm45.text.tokenizer import SPLIT_PATTERN, Tokenizer

CORPUS = [
    "def f(x):\n    return x + 12\n" * 3,
    "It's the cat's pyjamas, they'll SAY it's 1984!\r\n\r\n  ok",
    "猫が好きです。" * 3,
    "x𝔸𝔸x 𝔸b𝔸b " * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(CORPUS * 5, 350).save(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return WordEncoder(folder, np.dtype(np.uint16))


def encode(encoder, text):
    return np.frombuffer(encoder.encode([text])[0], np.uint16).tolist()


ALPHABET = "ab Z'sStTlLĿſéß猫をＡ²½Ⅷ٣\u00a0\u2028\u3000\u200b\x1c\x85\t\n\r\f\v 019.,_-#<|>😀𝔸\U000e0041"


@given(st.text(alphabet=ALPHABET) | st.text())
def test_every_text_is_encoded_as_by_the_tokenizer(encoder, text):
    assert encode(encoder, text) == encoder.tokenizer.encode(text)


@pytest.mark.slow
def test_every_character_between_others_is_encoded_as_by_the_tokenizer(encoder):
    """Beside a letter, a digit, a symbol, a space and a line end; of long runs of one category, the first and last."""
    kinds = [unicodedata.category(chr(code)) for code in range(0x10000)]
    edges = {code + side for code in range(1, 0x10000) if kinds[code] != kinds[code - 1] for side in (-1, 0)}
    characters = [chr(code) for code in sorted(edges | set(range(0x2000))) if kinds[code] != "Cs"]
    text = "".join(f"a{c}b {c} 1{c}2.{c}{c},\n{c}\n'{c}" for c in characters)
    assert text.isascii() is False
    assert encode(encoder, text) == encoder.tokenizer.encode(text)


def test_letters_beyond_the_basic_plane_belong_to_words(encoder):
    """Merges span them: a splitter that took them for symbols would give other ids."""
    assert encode(encoder, "x𝔸𝔸x 𝔸b") == encoder.tokenizer.encode("x𝔸𝔸x 𝔸b")


@pytest.mark.parametrize("text", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(encoder, text):
    assert not set(encode(encoder, f"a {text} b")) & set(encoder.tokenizer.special_tokens)


def test_a_lone_surrogate_is_refused(encoder):
    with pytest.raises(ValueError, match="lone surrogate"):
        encoder.encode(["fine", "not \ud800 fine"])


def test_another_way_of_splitting_goes_through_the_tokenizer(folder, tmp_path):
    """GLM-4.5's own pattern takes up to three digits at once; an unknown pattern is not translated but still right."""
    for pattern in (SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), r"\p{Lu}|."):
        definition = json.loads((folder / "tokenizer.json").read_text())
        definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
        encoder = WordEncoder(tmp_path, np.dtype(np.uint16))
        for text in [*CORPUS, "call 18005550199 NOW\n"]:
            assert encode(encoder, text) == encoder.tokenizer.encode(text)


def test_a_long_text_is_encoded_in_portions(encoder, monkeypatch):
    monkeypatch.setattr(words, "LONG", 10)
    monkeypatch.setattr(words, "WORDS_AT_ONCE", 3)
    for text in CORPUS:
        assert encode(encoder, text * 20) == encoder.tokenizer.encode(text * 20)


def test_forgetting_words_changes_nothing(folder, monkeypatch):
    """Also where a long text makes the encoder forget the words of a short one in the same call."""
    monkeypatch.setattr(words, "MAX_WORDS", 5)
    monkeypatch.setattr(words, "LONG", 60)
    monkeypatch.setattr(words, "WORDS_AT_ONCE", 3)
    encoder = WordEncoder(folder, np.dtype(np.uint16))
    texts = [*CORPUS, "short", "cat", *CORPUS]
    ids = [np.frombuffer(data, np.uint16).tolist() for data in encoder.encode(texts)]
    assert ids == [encoder.tokenizer.encode(text) for text in texts]
