"""Pages stand alone, escape what they are given, and draw in the page's own colours."""

import math
import re
import xml.dom.minidom

from glm45.page import INK, Page, bars, heat_map, histogram, lines


def drawings():
    return [
        lines({"a": ([1, 2, 3], [3, 1, 2]), "b": ([1, 2], [2, 2])}, "t", "x", "y", marks={"m": 2}, log=True),
        lines({"a": ([1, 2], [1, 2])}, "t", "x", "y", bands={"a": ([0, 1], [2, 3])}),
        bars({"one": 1, "two": 2}, "t", "x", intervals={"one": (0.5, 1.5)}),
        heat_map({"a": [1, math.nan], "b": [3, 4]}, "t", "x", extent=(0, 2)),
        histogram([1, 10, 100, 0], "t", "x", log_x=True),
    ]


def test_drawings_are_svg_in_the_pages_colour():
    for drawing in drawings():
        xml.dom.minidom.parseString(drawing)
        assert "currentColor" in drawing
        assert INK not in drawing
        assert "viewBox" in drawing


def test_equal_figures_give_equal_text():
    assert drawings() == drawings()


def test_what_a_page_is_given_is_escaped():
    page = Page("<title>", "a & b")
    page.section("<b>", "<i>")
    page.table(["<u>"], [["<script>alert(1)</script>"]])
    page.sample("x", "<img>", folded="</details>")
    page.columns(["<c>"], [{"text": "<d>"}])
    text = page.html()
    assert "<script>alert" not in text
    for raw in ("<u>", "<img>", "<i>", "<c>", "<d>"):
        assert raw not in text


def test_nothing_is_loaded_from_elsewhere():
    page = Page("t")
    page.plots(*drawings())
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.html())
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert "url(http" not in text
