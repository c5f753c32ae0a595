"""Text and special tokens stay apart, and nothing is lost on the way to ids and back."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.text.special_tokens import SPECIAL_TOKENS, TAG_TOKENS
from glm45.text.tokenizer import SPLIT_PATTERN, Tokenizer

STREAM = ["the cat sat on the mat\n", "def f(x):\n    return x + 12345\n", "猫坐在垫子上。"] * 40


def test_the_special_tokens_are_glm45s_in_its_order(tokenizer):
    """GLM-4.5's ids begin at 151329: offsets written by hand from its tokenizer_config."""
    offsets = {"<|endoftext|>": 0, "[gMASK]": 2, "<sop>": 4, "<|user|>": 7, "<|observation|>": 9, "<think>": 21}
    offsets |= {"</tool_call>": 24, "<arg_key>": 27, "</arg_value>": 30, "/nothink": 31, "<|video|>": 35}
    first = tokenizer.special_id("<|endoftext|>")
    assert {token: tokenizer.special_id(token) - first for token in offsets} == offsets
    assert len(SPECIAL_TOKENS) == 36
    assert tokenizer.vocab_size == first + 36


def test_text_never_becomes_a_special_token(tokenizer):
    special = set(tokenizer.special_tokens)
    for token in SPECIAL_TOKENS:
        for text in (token, f"a{token}b", f" {token}\n{token}", token * 3):
            assert not special & set(tokenizer.encode(text))
            assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_text_comes_back_exactly_or_is_refused(tokenizer, text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        with pytest.raises(ValueError, match=f"character {error.start} .*lone surrogate"):
            tokenizer.encode(text)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_is_named(tokenizer):
    with pytest.raises(ValueError, match="character 2 of the text is a lone surrogate"):
        tokenizer.encode("ab\ud800c")
    with pytest.raises(ValueError, match="character 1 of the text is a lone surrogate"):
        tokenizer.encode_batch(["fine", "a\udc80"])


def test_every_byte_has_a_token_and_comes_back(tokenizer):
    """Lone bytes cannot be text, but their ids decode to exactly them; `strict` refuses to make text of them."""
    by_bytes = {tokenizer.decode_bytes([index]): index for index in range(tokenizer.vocab_size)}
    for byte in range(256):
        assert bytes([byte]) in by_bytes
    halved = [by_bytes[b"\xe4"], by_bytes[b"\xb8"]]
    assert tokenizer.decode_bytes(halved) == b"\xe4\xb8"
    assert tokenizer.decode(halved) == "\ufffd"
    with pytest.raises(ValueError, match="utf-8"):
        tokenizer.decode(halved, errors="strict")


def test_a_stream_of_ids_decodes_as_the_whole(tokenizer):
    text = "naïve 上海 🎉 <think> " * 3
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.feed([index]) for index in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.finish() == text
    decoder.feed([tokenizer.encode("🎉")[0]])
    assert decoder.finish() == "\ufffd"


def test_digits_are_single_tokens(tokenizer):
    ids = tokenizer.encode("in 2026, 3.14159")
    assert [tokenizer.decode([index]) for index in ids if tokenizer.decode([index]).strip(" .,in")] == list(
        "2026314159"
    )


def test_training_is_deterministic_across_processes():
    """The same stream gives the same file in a process with other hash seeds and thread counts."""
    program = f"from glm45.text.tokenizer import Tokenizer\nprint(Tokenizer.train({STREAM!r}, 330).fingerprint)"
    prints = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "4"))
    }
    assert prints == {Tokenizer.train(STREAM, 330).fingerprint}


def test_sizes_are_reported():
    tokenizer = Tokenizer.train(STREAM, 320)
    assert tokenizer.vocab_size == 320
    assert tokenizer.padded_vocab_size == 512
    with pytest.warns(UserWarning, match="gave .* tokens of 5000"):
        small = Tokenizer.train(STREAM, 5000)
    assert small.vocab_size < 5000
    with pytest.raises(ValueError, match="vocab_size 100 is below 292"):
        Tokenizer.train(STREAM, 100)


def test_padding_rows_show_and_other_ids_are_refused(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"
    for wrong in (tokenizer.padded_vocab_size, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} is not one of 0"):
            tokenizer.decode([wrong])


@pytest.mark.slow
def test_saved_files_load_here_and_in_transformers(tokenizer, tmp_path):
    """transformers, reading our files, encodes text with tags to the same ids as the renderer places."""
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(peer) == tokenizer.vocab_size
    assert (peer.eos_token, peer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    text = "for x in 上海: 12"
    assert peer.encode(text) == tokenizer.encode(text)
    tagged = [tokenizer.special_id("<|user|>"), *tokenizer.encode("hi"), tokenizer.special_id("/nothink")]
    assert peer.encode("<|user|>hi/nothink") == tagged
    # Tags survive skip_special_tokens, as engines' output parsers need; roles do not.
    kept = peer.decode([tokenizer.special_id(token) for token in SPECIAL_TOKENS], skip_special_tokens=True)
    assert kept.replace(" ", "") == "".join(TAG_TOKENS)


def foreign(tokens):
    """A tokenizer.json of other making: byte-level, its own merges, special tokens scattered among others."""
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    foreign.train_from_iterator(STREAM, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    foreign.add_special_tokens(["<extra>", *tokens])
    return foreign


def test_a_foreign_tokenizer_loads_where_it_has_the_special_tokens(tmp_path):
    file = tmp_path / "tokenizer.json"
    foreign(SPECIAL_TOKENS).save(str(file))
    tokenizer = Tokenizer.load(file)
    text = "the cat <think> sat 猫"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_tokens[tokenizer.special_id("<think>")] == "<think>"


def test_a_foreign_tokenizer_without_them_is_told_which_are_missing(tmp_path):
    file = tmp_path / "tokenizer.json"
    foreign([token for token in SPECIAL_TOKENS if token not in ("<arg_key>", "/nothink")]).save(str(file))
    with pytest.raises(ValueError, match=r"lacks 2 of GLM-4.5's special tokens: <arg_key> /nothink"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_tokenizer_whose_text_can_spell_special_tokens_is_refused(tmp_path):
    definition = json.loads(foreign(SPECIAL_TOKENS).to_str())
    added = {token["content"]: token["id"] for token in definition["added_tokens"]}
    definition["model"]["vocab"]["<|user|>"] = added["<|user|>"]
    definition["model"]["ignore_merges"] = True
    definition["pre_tokenizer"]["use_regex"] = False
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"'<\|user\|>' encodes to a special token"):
        Tokenizer.load(file)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    wordlevel = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    wordlevel.add_special_tokens(list(SPECIAL_TOKENS))
    wordlevel.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not byte-level"):
        Tokenizer.load(tmp_path)
    for content, error in (("{", "is not JSON"), ("[]", "not a tokenizer.json")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=error):
            Tokenizer.load(tmp_path)


def test_a_batch_is_its_texts(tokenizer):
    texts = ["a b c", "", "上海 12"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_the_pattern_splits_words_digits_and_symbols():
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("I'll pay  $42\n\n x")]
    assert pieces == ["I", "'ll", " pay", " ", " $", "4", "2", "\n\n", " x"]
