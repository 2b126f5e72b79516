"""The two packages that can encode: tokenizers and sentencepiece, behind one face.

A backend has size, marks (special text -> id), bos, eos, pad, unk (ids or None),
adds_bos, drops_first_space, and the methods encode, piece, id_of and save.

encode knows three places, because vocabularies of the sentencepiece kind put a space
before a text: "start" of everything, after a "mark", and in the "middle" of a text,
where nothing may be put in front.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.ranks import byte_letters

SPACE = "\u2581"  # sentencepiece's visible space
SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A user-defined symbol like <user> in the bytes of a sentencepiece model: its length,
# text, score, and the type 4. The Python package has no question for it.
_SYMBOL = re.compile(rb"\x0a(.)(<[^<>\s]+>)(?:\x15.{4})?\x18\x04", re.DOTALL)
# NormalizerSpec.add_dummy_prefix = false, and remove_extra_whitespaces = false too, as
# protobuf bytes. Appended to a model they override its own values: of a repeated
# field the last one counts, and messages are merged. So no protobuf package is needed.
_NO_PREFIX = b"\x1a\x02\x18\x00"
_VERBATIM = b"\x1a\x04\x18\x00\x20\x00"


def _import(name: str, why: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"{why} needs one more package: pip install {name}"
        ) from error


class JsonBackend:
    """tokenizer.json, by the tokenizers package."""

    kind = "tokenizer.json"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._places: dict[str, Any] = {"start": tokenizer}
        added = tokenizer.get_added_tokens_decoder()
        self.size = max([tokenizer.get_vocab_size() - 1, *added]) + 1
        self._added = {i: token.content for i, token in added.items()}
        self.marks = {t.content: i for i, t in added.items() if t.special}
        self.bos = self.eos = self.pad = self.unk = None
        start = tokenizer.encode("").ids
        self.adds_bos = bool(start)
        if start:
            self.bos = start[0]
        self._spelling = self._find_spelling()
        self.drops_first_space = self._spelling != "bytes"
        self._bytes = {letter: b for b, letter in enumerate(byte_letters())}

    @classmethod
    def read(cls, path: Path) -> "JsonBackend":
        """From a tokenizer.json; CheckpointError if it is none."""
        tokenizers = _import("tokenizers", path.name)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # tokenizers raises a bare Exception for a file it cannot read
        except Exception as error:
            raise CheckpointError(
                f"{path} is not a tokenizer of the tokenizers package "
                f"({str(error)[:120]}). Download or save it again."
            ) from error
        # Settings of a training run that would cut or pad a prompt
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def _find_spelling(self) -> str:
        """How a piece spells bytes: "bytes" (GPT-2), "spaces" (Llama), or "other"."""
        decoder = self._tokenizer.decoder
        name = type(decoder).__name__
        if name == "ByteLevel":
            return "bytes"
        if name == "Metaspace":
            return "spaces"
        if name == "Sequence":
            state = json.loads(decoder.__getstate__())
            kinds = [part["type"] for part in state["decoders"]]
            if "ByteLevel" in kinds:
                return "bytes"
            if "ByteFallback" in kinds or "Metaspace" in kinds:
                return "spaces"
        return "other"

    def _at(self, place: str) -> Any:
        """The tokenizer for a place, made from the file's own when first needed."""
        if place not in self._places:
            state = json.loads(self._tokenizer.to_str())
            _strip_prefix(state, everywhere=place == "middle")
            made = type(self._tokenizer).from_str(json.dumps(state))
            self._places[place] = made
        return self._places[place]

    def encode(self, text: str, place: str) -> list[int]:
        """Ids of a text at a place; see Tokenizer.encode."""
        return self._at(place).encode(text, add_special_tokens=False).ids

    def piece(self, i: int) -> bytes:
        """The bytes of a token that is not a special mark."""
        if (added := self._added.get(i)) is not None:
            return added.encode()
        token = self._tokenizer.id_to_token(i)
        if token is None:
            return b""
        if self._spelling == "bytes":
            known = self._bytes
            return b"".join(
                bytes([known[c]]) if c in known else c.encode() for c in token
            )
        if self._spelling == "spaces":
            if match := _BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace(SPACE, " ").encode()
        return self._other_piece(i)

    def _other_piece(self, i: int) -> bytes:
        """A piece of a rare decoder (CLIP's, WordPiece), as it reads between others."""
        around = self._tokenizer.decode([i, i], skip_special_tokens=False)
        alone = self._tokenizer.decode([i], skip_special_tokens=False)
        return around[len(alone) :].encode()

    def id_of(self, token: str) -> int | None:
        """The id of a token, None where there is none."""
        return self._tokenizer.token_to_id(token)

    def add_marks(self, marks: Iterable[str]) -> None:
        """Treat tokens that the vocabulary has as special marks."""
        known = [m for m in marks if self.id_of(m) is not None and m not in self.marks]
        if known:
            self._tokenizer.add_special_tokens(known)
            self.marks |= {mark: self.id_of(mark) for mark in known}
            self._added |= {i: mark for mark, i in self.marks.items()}

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        self._tokenizer.save(str(folder / TOKENIZER_FILE))


def _strip_prefix(state: Any, *, everywhere: bool) -> None:
    """Change a tokenizer.json so that no space is put in front.

    After a mark (everywhere=False) only the space that belongs to the very first text
    goes; in the middle of a text all go.
    """
    if isinstance(state, list):
        for item in state:
            _strip_prefix(item, everywhere=everywhere)
        return
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        if key in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers"):
            _strip_prefix(value, everywhere=everywhere)
    if state.get("prepend_scheme") == "first" or (
        everywhere and "prepend_scheme" in state
    ):
        state["prepend_scheme"] = "never"
        if "add_prefix_space" in state:
            state["add_prefix_space"] = False
    if everywhere and state.get("type") == "ByteLevel":
        state["add_prefix_space"] = False
    if everywhere and state.get("type") == "Prepend":
        state["prepend"] = ""


class SentencePieceBackend:
    """A sentencepiece .model, and the tokens that a config adds to it.

    added: text -> id of tokens beyond the model's. legacy: every text after a mark is
    encoded alone, with a space put in front, as LLaVA and Vicuna were trained;
    otherwise only the first one is.
    """

    kind = "sentencepiece"

    def __init__(
        self,
        proto: bytes,
        added: dict[str, int] | None = None,
        *,
        legacy: bool = True,
        name: str = SENTENCEPIECE_FILE,
    ):
        self._package = _import("sentencepiece", name)
        self._proto = proto
        self._model = model = self._load(proto, name)
        self._places = {"start": model} | ({"mark": model} if legacy else {})
        self._count = model.vocab_size()
        self.bos, self.eos, self.pad, self.unk = (
            i if i >= 0 else None
            for i in (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id())
        )
        self.adds_bos = self.bos is not None
        self.drops_first_space = model.normalize("a").startswith(SPACE)
        self._added = {i: t for t, i in (added or {}).items() if i >= self._count}
        self.size = max([self._count - 1, *self._added]) + 1
        symbols = [
            m[2].decode() for m in _SYMBOL.finditer(proto) if m[1][0] == len(m[2])
        ]
        self.native_marks = {
            t for t in symbols if model.id_to_piece(model.piece_to_id(t)) == t
        }
        controls = [i for i in range(self._count) if model.is_control(i)]
        unknown = [] if self.unk is None else [self.unk]
        self.marks: dict[str, int] = {}
        self.add_marks(model.id_to_piece(i) for i in controls + unknown)
        self.add_marks(self.native_marks)

    def _load(self, proto: bytes, name: str) -> Any:
        try:
            return self._package.SentencePieceProcessor(model_proto=proto)
        except Exception as error:
            raise CheckpointError(
                f"{name} is not a sentencepiece model ({str(error)[-80:].strip()}). "
                f"Download it again; a file of about 130 bytes is a Git LFS pointer."
            ) from error

    @classmethod
    def read(
        cls, path: Path, added: dict[str, int], *, legacy: bool
    ) -> "SentencePieceBackend":
        """From a tokenizer.model; CheckpointError if it is none."""
        try:
            proto = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}."
            ) from error
        if not proto:
            raise CheckpointError(f"{path} is empty (0 bytes). Download it again.")
        return cls(proto, added, legacy=legacy, name=path.name)

    def _at(self, place: str) -> Any:
        if place not in self._places:
            extra = _NO_PREFIX if place == "mark" else _VERBATIM
            self._places[place] = self._load(self._proto + extra, SENTENCEPIECE_FILE)
        return self._places[place]

    def add_marks(self, marks: Iterable[str]) -> None:
        """Treat tokens that the vocabulary has as special marks."""
        self.marks |= {m: i for m in marks if (i := self.id_of(m)) is not None}
        # The model finds its user-defined symbols itself; all others are cut out.
        cut = {*self.marks, *self._added.values()} - self.native_marks
        pattern = "|".join(map(re.escape, sorted(cut, key=len, reverse=True)))
        self._cut = re.compile(f"({pattern})") if cut else None

    def encode(self, text: str, place: str) -> list[int]:
        """Ids of a text at a place; see Tokenizer.encode."""
        pieces = [text] if self._cut is None else self._cut.split(text)
        ids: list[int] = []
        for k, piece in enumerate(pieces):
            if k % 2:
                ids.append(self.id_of(piece))  # type: ignore[arg-type]
                place = "mark"
            elif piece:
                ids += self._at(place).encode(piece)
        return ids

    def piece(self, i: int) -> bytes:
        """The bytes of a token."""
        if (added := self._added.get(i)) is not None:
            return added.encode()
        if not 0 <= i < self._count:
            return b""
        token = self._model.id_to_piece(i)
        if self._model.is_byte(i):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def id_of(self, token: str) -> int | None:
        """The id of a token, None where there is none."""
        for i, text in self._added.items():
            if text == token:
                return i
        i = self._model.piece_to_id(token)
        return i if self._model.id_to_piece(i) == token else None

    def save(self, folder: Path) -> None:
        """Write tokenizer.model."""
        (folder / SENTENCEPIECE_FILE).write_bytes(self._proto)
