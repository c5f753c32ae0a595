import pytest

from glm45.corpus.extract import Skip, decode, docstrings, extract, html_text, manual_text
from glm45.corpus.sources import UNREADABLE

PAGE = """<html><head><title>t</title></head><body><nav><a href=x>Home</a> <a href=y>Shop</a></nav>
<article><h1>Loops</h1><p>A loop repeats. It ends when its condition fails, which must happen once.</p>
<pre>for i in range(3):
    print(i)  # <span>kept</span>
</pre><p>That prints three numbers, one to a line, and then the program goes on.</p></article>
<footer>Copyright, Imprint, Privacy</footer></body></html>"""


def test_a_page_keeps_its_code_blocks_and_loses_its_navigation():
    text = html_text(PAGE)
    assert "```\nfor i in range(3):\n    print(i)  # kept\n```" in text
    assert "It ends when its condition fails" in text
    assert "Shop" not in text
    assert "Imprint" not in text


@pytest.mark.parametrize(
    "path, content, reason",
    [
        ("a.txt", b"", "empty file"),
        ("a.txt", b" \n", "empty file"),
        ("a.txt", b"text\x00\x01\x02", "binary file"),
        ("a.txt", b"caf\xe9 au lait", "undecodable bytes"),
        ("a.txt", UNREADABLE, "unreadable file"),
        ("a.py", b"# coding: klingon\nx = 1\n", "unknown encoding declared"),
        ("a.png", b"x", "file type without text"),
        ("a.html", b"<html><body></body></html>", "page without main content"),
    ],
)
def test_what_cannot_be_read_is_skipped_with_its_reason(path, content, reason):
    with pytest.raises(Skip, match=reason):
        extract(path, content)


def test_declared_and_marked_encodings_are_honoured():
    assert "café" in decode("# coding: latin-1\nx = 'café'\n".encode("latin-1"), "a.py")
    assert decode("grün".encode("utf-16"), "a.txt") == "grün"
    assert decode(b"\xef\xbb\xbfa\r\nb", "a.txt") == "a\nb"


def test_kind_and_language_follow_the_file_type():
    assert extract("a/b.py", b"x = 1\n")[1:] == ("code", "python")
    assert extract("a/b.md", b"# T\n")[1:] == ("prose", "")
    assert extract("a/README", b"Hello\n")[1:] == ("prose", "")


def test_docstrings_become_one_page_under_dotted_names():
    module = (
        '"""Top."""\nclass A:\n    """About A."""\n    def m(self):\n        """About m."""\n    def n(self): pass\n'
    )
    text = docstrings(module, "pkg/mod.py")
    assert text.index("pkg.mod\n") < text.index("pkg.mod.A\n") < text.index("pkg.mod.A.m\n")
    assert "About m." in text
    assert ".n" not in text
    with pytest.raises(Skip, match="does not parse"):
        docstrings("def (", "a.py")


def test_a_manual_page_becomes_prose():
    roff = '.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list files\n.SH "SEE ALSO"\n.BR dir (1)\n\\fBbold\\fR text\n'
    assert manual_text(roff).strip() == "NAME\nls - list files\n\nSEE ALSO\ndir (1)\nbold text"
