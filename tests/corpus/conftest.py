import pytest
from datatrove.data import Document


@pytest.fixture
def make_document():
    """Builds a document with the metadata that the pipeline's steps rely on."""

    def make(text, kind="prose", language="en", package="p", path="a.rst", **metadata):
        about = {"source": "s", "kind": kind, "language": language, "license": "l", "package": package, "version": "1"}
        return Document(text, f"s/{package}/{path}", metadata=about | {"path": path, "has_code": False} | metadata)

    return make
