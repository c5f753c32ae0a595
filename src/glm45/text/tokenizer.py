"""Byte-level byte-pair tokenizer with GLM-4.5's special tokens.

Trains, loads and saves Hugging Face `tokenizer.json` files. Text and special tokens are kept apart: `encode` takes
plain text and never returns a special token, whatever the text spells; special tokens are placed by id, by the
renderer alone.
"""

import codecs
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers

from glm45.text.special_tokens import CONTROL_TOKENS, END_OF_TEXT, EOS_TOKENS, SPECIAL_TOKENS

PADDING_MULTIPLE = 256
"""Embedding rows are a multiple of this: 151,365 tokens become GLM-4.5's 151,552."""

# Contractions, words with one leading separator, single digits, runs of symbols, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A `tokenizer.json` with the GLM-4.5 special tokens.

    Raises ValueError where the file lacks one of the 36 special tokens, is not byte-level, or would turn plain text
    into a special token.
    """

    def __init__(self, serialized: str) -> None:
        self._serialized = serialized
        definition = json.loads(serialized)
        if not isinstance(definition, dict) or "model" not in definition:
            raise ValueError("not a tokenizer.json: it has no model")
        if '"ByteLevel"' not in json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")]):
            raise ValueError("the tokenizer is not byte-level: it has no ByteLevel pre-tokenizer or decoder")
        added = {token["content"]: token["id"] for token in definition.pop("added_tokens", [])}
        missing = [token for token in SPECIAL_TOKENS if token not in added]
        if missing:
            raise ValueError(f"the tokenizer lacks {len(missing)} of GLM-4.5's special tokens: {' '.join(missing)}")
        self._added_ids: dict[str, int] = added
        # The added tokens are left out of the encoder, so that no text can spell one.
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps({**definition, "added_tokens": []}))
        for token in SPECIAL_TOKENS:
            if added[token] in self.encode(token):
                raise ValueError(f"plain text {token!r} encodes to a special token: its vocabulary holds the token")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a `tokenizer.json`, or the one in a folder; any that has the GLM-4.5 special tokens will do."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"no tokenizer at {file}: name a tokenizer.json or a folder that holds one")
        try:
            return cls(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def train(cls, stream: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> "Tokenizer":
        """Train on a stream of texts; the same stream gives the same tokenizer.

        `vocab_size` counts everything: 256 bytes, merges and the 36 special tokens, which come last. Where the
        stream holds too few pairs of `min_frequency`, the vocabulary is smaller, with a warning.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size {vocab_size} is below {smallest}: 256 bytes and the special tokens")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=min_frequency,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        tokenizer.train_from_iterator(stream, trainer)
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(token, special=token in CONTROL_TOKENS, normalized=False)
                for token in SPECIAL_TOKENS
            ]
        )
        trained = cls(tokenizer.to_str(pretty=True))
        if trained.vocab_size < vocab_size:
            found = f"the stream gave {trained.vocab_size} tokens of {vocab_size}"
            warnings.warn(f"{found}: no more pairs occur {min_frequency} times", stacklevel=2)
        return trained

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` with the chat template, for transformers and engines."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._serialized, encoding="utf-8")
        config = json.dumps(self._hub_config(), indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: what spells a special token stays text.

        Raises ValueError for text that is not valid Unicode (a lone surrogate), which no UTF-8 can hold.
        """
        try:
            return self._encoder.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise _not_text(text, error) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of every text, on as many threads as `tokenizers` is given."""
        try:
            return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            for text in texts:
                self.encode(text)  # raises for the text at fault
            raise _not_text(texts, error) from None

    def decode(self, ids: Sequence[int], *, errors: str = "replace") -> str:
        """Return the text of ids, special tokens included.

        Ids may cut a character in two: `errors="replace"` shows what is left as U+FFFD, "strict" raises
        UnicodeDecodeError (a ValueError); `decode_bytes` is always exact.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of ids. Raises ValueError for an id that is not of this tokenizer.

        The rows that only pad the embedding stand for no text; a model may still sample one: it shows as U+FFFD.
        """
        table = self._token_bytes
        try:
            return b"".join([table[index] for index in ids])
        except (KeyError, TypeError):
            wrong = next(index for index in ids if index not in table)
            raise ValueError(f"token id {wrong!r} is not one of 0..{self.padded_vocab_size - 1}") from None

    def stream_decoder(self) -> "StreamDecoder":
        """Return a decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def special_id(self, token: str) -> int:
        """Return the id of a special token. Raises ValueError for anything else."""
        try:
            return self._added_ids[token]
        except KeyError:
            raise ValueError(f"{token!r} is not a special token of this tokenizer") from None

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Every added token by id."""
        return {index: token for token, index in self._added_ids.items()}

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn: `<|endoftext|>`, `<|user|>`, `<|observation|>`."""
        return tuple(self._added_ids[token] for token in EOS_TOKENS)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: one more than the largest id."""
        return max(*self._encoder.get_vocab(with_added_tokens=False).values(), *self._added_ids.values()) + 1

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 256: the number of embedding rows."""
        return -(-self.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `tokenizer.json` without its layout: equal where every id and rule is."""
        canonical = json.dumps(json.loads(self._serialized), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """The bytes of every id, in the table of the byte-level alphabet."""
        to_byte = {character: byte for byte, character in _byte_alphabet().items()}
        table = {index: "\ufffd".encode() for index in range(self.padded_vocab_size)}
        for token, index in self._encoder.get_vocab(with_added_tokens=False).items():
            known = all(character in to_byte for character in token)
            table[index] = bytes(to_byte[character] for character in token) if known else token.encode()
        table.update((index, token.encode()) for token, index in self._added_ids.items())
        return table

    def _hub_config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(index): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": token in CONTROL_TOKENS,
                }
                for index, token in sorted(self.special_tokens.items())
            },
            "additional_special_tokens": list(CONTROL_TOKENS),
            "bos_token": None,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": 131072,
            "chat_template": chat_template(),
        }


class StreamDecoder:
    """Turns ids that arrive in pieces into text, holding back characters that are not yet whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that these ids complete."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """Return what was held back: U+FFFD for a character that never became whole, or nothing."""
        return self._utf8.decode(b"", final=True)


def chat_template() -> str:
    """Return the Jinja chat template that `Tokenizer.save` exports."""
    return resources.files("glm45.text").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def _byte_alphabet() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 stands for itself; every other byte takes the next character from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def _not_text(text: object, error: Exception) -> ValueError:
    if isinstance(text, str):
        place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if place is not None:
            return ValueError(f"character {place} of the text is a lone surrogate ({text[place]!r}): not valid Unicode")
    return ValueError(f"cannot encode a {type(text).__name__}: {error}")
