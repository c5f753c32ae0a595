"""Prompts that stand in training data are found, in data folders and in folders of text; others are not."""

import json

import numpy as np
import pytest

from glm45.corpus.decontaminate import Decontamination
from glm45.environments.protocol import Task, user
from glm45.evaluation.contamination import measure_contamination, training_documents

WORDS = "a train leaves the old station at nine with forty people and stops in two towns before it comes home again"


def task(name, text):
    return Task(task_id=name, verifier="mathematics", messages=[user(text)], answer="1")


def test_whole_partial_clean_and_short_prompts_are_told_apart():
    half = " ".join(WORDS.split()[:14]) + " which nobody has ever seen or written down anywhere in this world so far"
    clean = " ".join(reversed(WORDS.split()))
    tasks = [task("whole", WORDS.title() + "!"), task("half", half), task("clean", clean), task("short", "two towns")]
    finding = measure_contamination(tasks, iter(["Something else.", f"News: {WORDS}, and so on."]))
    assert finding.shared == {"whole": 1.0, "half": pytest.approx(2 / 16)}
    assert (finding.num_whole, finding.num_short, finding.num_documents) == (1, 1, 2)
    assert "2 of 3 prompts share an n-gram with 2 training documents, 1 stand there whole" in finding.describe()


def test_n_grams_of_one_prompt_in_different_documents_add_up():
    words = WORDS.split()
    parts = [" ".join(words[i : i + 13]) for i in range(len(words) - 12)]
    assert measure_contamination([task("t", WORDS)], iter(parts)).shared == {"t": 1.0}
    assert measure_contamination([task("t", WORDS)], iter(parts[:2])).shared == {"t": pytest.approx(2 / len(parts))}


def test_prompts_shorter_than_an_n_gram_are_looked_for_whole():
    short = " ".join(WORDS.split()[:9])
    assert measure_contamination([task("t", short)], iter([WORDS])).num_whole == 1
    assert measure_contamination([task("t", short)], iter([WORDS]), Decontamination(min_words=10)).num_short == 1


def test_data_folders_are_decoded_without_what_is_held_out(checkpoint, tmp_path):
    from glm45.data.folder import adopt
    from glm45.data.shards import ShardWriter
    from glm45.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint)
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "shards").mkdir()
    for name, texts in {"a.high-0": ["one fox", "two"], "a.high-1": ["three"], "a.heldout": ["secret"]}.items():
        with ShardWriter(tmp_path / "shards" / name, np.dtype("uint16")) as writer:
            for text in texts:
                writer.add(tokenizer.encode(text))
    adopt(tmp_path)
    assert list(training_documents(tmp_path)) == ["one fox", "two", "three"]


def test_folders_of_text_are_read_and_others_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "line"}) + "\n")
    assert sorted(training_documents(tmp_path)) == ["line", "plain"]
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not an object with a text"):
        list(training_documents(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a data folder nor"):
        list(training_documents(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no training document"):
        measure_contamination([task("t", WORDS)], iter([]))
