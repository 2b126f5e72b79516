"""The vocabulary of a model without a tokenizer: ids, written as numbers."""

from pathlib import Path

from mm1_mlx.errors import PromptError


class NumberBackend:
    """Text is ids with spaces between, "1 306 4966"; a face like those in backends.py.

    size: how many ids the model knows. bos, eos, pad: its own, or None. No id is put
    in front by itself: whoever writes ids writes all of them.
    """

    kind = "token ids"
    adds_bos = False
    drops_first_space = True
    unk = None

    def __init__(
        self,
        size: int,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
    ):
        self.size, self.bos, self.eos, self.pad = size, bos, eos, pad
        self.marks: dict[str, int] = {}

    def add_marks(self, texts: list[str]) -> None:
        """There is no text that could be a mark."""

    def encode(self, text: str, place: str) -> list[int]:
        """The ids in a text; PromptError for anything else."""
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit()):
                raise PromptError(
                    f"This model has no tokenizer, so a prompt is token ids like '1 "
                    f"306 4966', but {word[:20]!r} was found. Put the tokenizer's "
                    f"files into the model's folder to ask in words."
                )
            ids.append(int(word))
        return ids

    def piece(self, i: int) -> bytes:
        """The number, behind a space."""
        return f" {i}".encode()

    def id_of(self, token: str) -> int | None:
        """The number that a text is, or None."""
        return int(token) if token.isascii() and token.isdigit() else None

    def save(self, folder: Path) -> None:
        """Nothing: the folder stays without a tokenizer."""
