import random

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from glm45.corpus.dedup import FastMinhashSignature, HideMadeDocuments, MinHash
from glm45.corpus.document import WORDS

VOCABULARY = [f"word{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(2000)]


def text(seed, length=300):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=length))


def edited(original, seed, edits):
    words = original.split()
    for _ in range(edits):
        words[random.Random(seed).randrange(len(words))] = "changed"
        seed += 1
    return " ".join(words)


@pytest.fixture
def signature(tmp_path):
    return FastMinhashSignature(str(tmp_path / "sig"), MinHash().to_datatrove(), language=WORDS)


def jaccard(a, b):
    def shingles(t):
        words = t.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_signatures_agree_as_often_as_the_texts_share_shingles(tmp_path):
    """The defining property of MinHash, against Jaccard similarities counted with sets."""
    config = MinHash(num_buckets=64).to_datatrove()
    many = FastMinhashSignature(str(tmp_path), config, language=WORDS)
    for edits in (0, 5, 20, 60):
        a, b = text(edits), edited(text(edits), 9, edits)
        first, second = (np.array(many.get_signature(many.get_shingles(t))) for t in (a, b))
        assert abs(np.mean(first == second) - jaccard(a, b)) < 0.08


def test_shingles_are_shared_exactly_where_datatroves_are(tmp_path, signature):
    """Same n-grams in common as the library's own signature, up to hash values."""
    theirs = MinhashDedupSignature(
        str(tmp_path), MinHash().to_datatrove().__class__(hash_config=HashConfig(hash_fc="sha1")), language=WORDS
    )
    texts = [
        text(1),
        edited(text(1), 4, 10),
        text(2),
        edited(text(2), 5, 40),
        "Äpfel, Birnen; Nüsse 12 und 3.5 kg Mehl!",
    ]
    for a in texts:
        for b in texts:
            ours = np.intersect1d(signature.get_shingles(a), signature.get_shingles(b)).size
            assert ours == np.intersect1d(theirs.get_shingles(a), theirs.get_shingles(b)).size


def test_numbers_case_and_punctuation_do_not_make_a_difference(signature):
    one = "Version 12 of the file was saved on day 3, and nobody saw it."
    two = "version 7 of the FILE was saved on day 30 and nobody saw it"
    assert np.array_equal(signature.get_shingles(one), signature.get_shingles(two))


def test_exact_and_near_duplicates_go_across_tasks_and_one_of_each_stays(deduplicated, make_document):
    tasks = [
        [make_document(text(1), path="a"), make_document(text(2), path="b"), make_document(text(3), path="c")],
        [],  # a task without documents
        [
            make_document(f"  {text(1)}\n", path="d"),
            make_document(edited(text(2), 1, 4), path="e"),
            make_document(text(4), path="f"),
        ],
    ]
    kept = [document.metadata["path"] for document in deduplicated(tasks)]
    assert len(kept) == 4
    assert len({"a", "d"} & set(kept)) == 1
    assert len({"b", "e"} & set(kept)) == 1
    assert {"c", "f"} <= set(kept)


def test_exercises_that_differ_in_their_numbers_stay(deduplicated, make_document):
    """MinHash does not see digits; without care one exercise of thousands would be left."""
    tasks = [
        [
            make_document(f"{i}+12=? write the digit and carry one to the left {i + 12}", kind="reasoning", path=str(i))
            for i in range(20)
        ]
    ]
    assert len(deduplicated(tasks)) == 20


def test_hidden_documents_keep_their_place(make_document):
    documents = [make_document("a"), make_document("b", kind="reasoning"), make_document("c")]
    assert [document.text for document in HideMadeDocuments().run(documents)] == ["a", "", "c"]
