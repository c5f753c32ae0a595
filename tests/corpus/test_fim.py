import random

from hypothesis import given
from hypothesis import strategies as st

from glm45.corpus.fim import TOKENS, FillInTheMiddle, FillInTheMiddleStep, cut, join


@given(st.text(), st.integers(), st.booleans())
def test_a_cut_file_can_be_put_together_again(text, seed, spm):
    """Nothing is lost or doubled, in either order."""
    if not any(token in text for token in TOKENS):
        assert join(cut(text, random.Random(seed), spm)) == text


def test_the_middle_comes_last_in_both_orders():
    psm, spm = (cut("abcdefgh", random.Random(3), order) for order in (False, True))
    assert psm.startswith("<|code_prefix|>")
    assert spm.startswith("<|code_suffix|>")
    assert psm.rpartition("<|code_middle|>")[2] == spm.rpartition("<|code_middle|>")[2]


def test_rate_and_order_are_what_the_configuration_says(make_document):
    documents = [make_document("value = 1\n" * 9, kind="code", path=str(i), bucket="high") for i in range(2000)]
    done = list(FillInTheMiddleStep(FillInTheMiddle(rate=0.5, spm_share=0.25), seed=1).run(documents))
    orders = [document.metadata.get("fim") for document in done]
    assert abs(orders.count(None) / 2000 - 0.5) < 0.04
    assert abs(orders.count("spm") / 2000 - 0.125) < 0.03
    assert all(document.metadata["special_tokens"] == TOKENS for document in done if "fim" in document.metadata)


def test_prose_held_out_files_and_files_that_spell_a_token_are_left_alone(make_document):
    documents = [
        make_document("some text", kind="prose"),
        make_document("x = 1", kind="code", bucket="heldout"),
        make_document("x = '<|code_middle|>'", kind="code", bucket="high"),
    ]
    texts = [document.text for document in documents]
    step = FillInTheMiddleStep(FillInTheMiddle(rate=1.0), seed=1)
    assert [document.text for document in step.run(documents)] == texts


def test_what_is_cut_does_not_depend_on_the_order_of_documents(make_document):
    def run(paths):
        documents = [make_document("value = 1\n" * 9, kind="code", path=path) for path in paths]
        return {document.id: document.text for document in FillInTheMiddleStep(FillInTheMiddle(), 5).run(documents)}

    assert run(["a", "b", "c"]) == run(["c", "a", "b"])
