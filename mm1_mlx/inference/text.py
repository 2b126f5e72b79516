"""From tokens to the text of an answer, as it becomes certain."""

from collections.abc import Collection, Sequence
from typing import Any


class StopText:
    """Ends a text before the first stop string in it, wherever the pieces are cut.

    What could be the beginning of a stop string is held back until the text goes on.
    The first one is the one that ends first, so that the result does not depend on how
    the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain now; nothing more once `found`."""
        if self.found:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [(text.find(stop), len(stop)) for stop in self._stops]
        hits = [(at + length, at) for at, length in places if at >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        kept = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class AnswerText:
    """One row's answer: tokens in, certain text out, and why it ended.

    token_ids: all tokens so far, the ending one too, though it has no text.
    finish_reason: None, then "stop" (end of text, or a stop string) or "length".
    """

    def __init__(
        self,
        detokenizer: Any,
        stops: Sequence[str],
        eos_token_ids: Collection[int],
        max_tokens: int,
    ):
        self._detokenizer = detokenizer
        self._stop = StopText(stops)
        self._eos = eos_token_ids
        self._max_tokens = max_tokens
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def add(self, token: int) -> str:
        """The text that this token made certain."""
        assert self.finish_reason is None, "the answer has ended"
        self.token_ids.append(token)
        text = ""
        if token in self._eos:
            self.finish_reason = "stop"
        else:
            text = self._stop.push(self._detokenizer.add(token))
            if len(self.token_ids) == self._max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stop.push(self._detokenizer.finish())
        if self._stop.found:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._stop.flush()
        return text
