"""Data folders: shards that others made are taken in after a look at every token."""

import json

import numpy as np
import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

from glm45.data.folder import DataFolder, adopt, update_manifest
from glm45.data.loader import Loader
from glm45.text.tokenizer import Tokenizer


@pytest.fixture
def foreign(tmp_path):
    """Shards by datatrove, one dataset in two parts, beside a tokenizer."""
    Tokenizer.train(["some text"], 292).save(tmp_path / "tokenizer")
    (tmp_path / "shards").mkdir()
    for name, base in (("web.high-00000", 0), ("web.high-00001", 100), ("code_text_document", 200)):
        file = MegatronTokenizedFile(str(tmp_path / "shards"), name)
        for number in range(10):
            file.write([base + number] * (5 + number))
        file.close()
    return tmp_path


def test_foreign_shards_are_adopted_and_read(foreign):
    entries = adopt(foreign)
    assert {name: (entry["documents"], entry["tokens"]) for name, entry in entries["datasets"].items()} == {
        "code_text_document": (10, 95),
        "web.high": (20, 190),
    }
    loader = Loader(foreign, {"web.high": 1}, 19)
    read = np.bincount(loader.rows(0, 10).tokens_BT.flatten(), minlength=110)
    assert read[:10].tolist() == read[100:110].tolist() == list(range(5, 15))


def test_a_part_that_is_damaged_later_is_refused(foreign):
    adopt(foreign)
    path = foreign / "shards" / "web.high-00001.bin"
    path.write_bytes(bytes([7]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"web\.high-00001\.bin is damaged"):
        DataFolder.open(foreign)


def test_tokens_of_another_tokenizer_are_refused(foreign):
    file = MegatronTokenizedFile(str(foreign / "shards"), "other.high")
    file.write([1, 292, 3])
    file.close()
    with pytest.raises(ValueError, match="holds token 292, the tokenizer has 292"):
        adopt(foreign)
    assert not (foreign / "manifest.json").exists()


def test_a_folder_without_shards_is_refused(foreign):
    for path in (foreign / "shards").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no \.bin/\.idx pairs"):
        adopt(foreign)


def test_an_unfinished_build_is_refused(tmp_path):
    update_manifest(tmp_path, {"sources": {}})
    with pytest.raises(ValueError, match="lists no datasets"):
        DataFolder.open(tmp_path)


def test_updating_a_manifest_keeps_what_others_wrote(tmp_path):
    update_manifest(tmp_path, {"sources": {"a": 1}, "seconds": 3})
    update_manifest(tmp_path, {"seconds": 4})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"sources": {"a": 1}, "seconds": 4}
