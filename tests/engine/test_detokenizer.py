"""Text comes out whole whatever the token boundaries, and stop strings are found across them."""

from hypothesis import given
from hypothesis import strategies as st

from glm45.engine.detokenizer import Detokenizer


class Bytes:
    """One token a byte: the hardest case for characters and stop strings."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_streamed_text_is_the_text(text):
    detokenizer = Detokenizer(Bytes())
    pieces = []
    for byte in text.encode():
        detokenizer.append(byte)
        pieces.append(detokenizer.take())
    detokenizer.finish()
    pieces.append(detokenizer.take(final=True))
    assert "".join(pieces) == detokenizer.text == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_is_cut_at_the_first_stop_string_and_never_shows_part_of_one(text, stops):
    detokenizer, shown, stopped = Detokenizer(Bytes(), tuple(stops)), "", False
    for position, byte in enumerate(text.encode()):
        stopped = detokenizer.append(byte)
        shown += detokenizer.take(final=stopped)
        if stopped:
            assert any(text[: position + 1].endswith(stop) for stop in stops)
            break
    # Reading character by character, the stop string that ends first wins; the text is cut where it begins.
    ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if ends:
        end = min(ends)[0]
        begins = min(end - len(stop) for stop in stops if text[:end].endswith(stop))
        assert detokenizer.text == text[:begins]
    detokenizer.finish()
    shown += detokenizer.take(final=True)
    assert shown == detokenizer.text


def test_an_incomplete_character_at_the_end_is_shown_as_such():
    detokenizer = Detokenizer(Bytes())
    for byte in "a€".encode()[:-1]:
        detokenizer.append(byte)
    assert detokenizer.take() == "a"
    detokenizer.finish()
    assert detokenizer.take(final=True) == "\ufffd"
