"""Text of a growing token sequence, and stop strings that may straddle tokens."""

from typing import Protocol


class Decoder(Protocol):
    """What the engine needs of a tokenizer to make text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        ...


class Detokenizer:
    """Turns tokens into text one by one and looks for stop strings.

    A byte-level token may hold part of a character, so text is decoded from a window that starts a few tokens back,
    and a character that is not complete yet is held back.
    """

    def __init__(self, decoder: Decoder, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        """Everything decoded so far, cut before a stop string once one is found."""
        self.stopped_by: str | None = None
        self._decoder = decoder
        self._stop = stop
        self._ids: list[int] = []
        self._window_start = 0
        self._window_end = 0
        self._num_emitted = 0

    def append(self, token_id: int, look_for_stop: bool = True) -> bool:
        """Add a token; return whether a stop string is complete."""
        self._ids.append(token_id)
        old = self._decoder.decode(self._ids[self._window_start : self._window_end])
        new = self._decoder.decode(self._ids[self._window_start :])
        if new.endswith("\ufffd") and len(self._ids) - self._window_end < 8:
            return False  # a character in the making: at most a few bytes away
        self._window_start, self._window_end = self._window_end, len(self._ids)
        return self._extend(new[len(old) :], look_for_stop)

    def finish(self) -> None:
        """Add what was held back: the sample is over."""
        old = self._decoder.decode(self._ids[self._window_start : self._window_end])
        rest = self._decoder.decode(self._ids[self._window_start :])[len(old) :]
        self._window_end = len(self._ids)
        if rest and self.stopped_by is None:
            self._extend(rest, look_for_stop=False)

    def take(self, final: bool = False) -> str:
        """Return the text not yet taken; a tail that may become a stop string waits unless `final`."""
        end = len(self.text) if final else len(self.text) - self._held_back()
        piece = self.text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        return piece

    def _extend(self, piece: str, look_for_stop: bool) -> bool:
        longest = max((len(stop) for stop in self._stop), default=0)
        searched = max(0, len(self.text) - longest + 1)
        self.text += piece
        if not look_for_stop:
            return False
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, searched)) >= 0]
        if not found:
            return False
        at, self.stopped_by = min(found)
        self.text = self.text[:at]
        return True

    def _held_back(self) -> int:
        """Length of the longest tail that some stop string starts with."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for size in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0
