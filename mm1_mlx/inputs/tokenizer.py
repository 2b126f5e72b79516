"""Text to token ids and back, whatever the files: Tokenizer, Detokenizer.

Importing this module loads neither the tokenizers nor the sentencepiece package; a
folder loads the one that its files need.
"""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.inputs.backends import (
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    JsonBackend,
    SentencePieceBackend,
)
from mm1_mlx.inputs.merges import MERGES_FILE
from mm1_mlx.inputs.prompts import GUARD, guard

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_OTHER_NAMED = ("sep_token", "cls_token", "mask_token", "image_token")


def _text(token: Any) -> str | None:
    """A token in a config: a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_json(path: Path) -> dict:
    """An object in a JSON file, or {} if there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object of keys and values.")
    return values


class Tokenizer:
    """Text to ids and back.

    vocab_size: one more than the highest id (a model's embedding can have more rows).
    marks: special text -> id. chat_template: Jinja text or a built-in name, or None.
    """

    def __init__(self, backend: Any, config: dict | None = None):
        self._backend = backend
        self._config = dict(config or {})
        named = {key: _text(self._config.get(key)) for key in _NAMED}
        more = [_text(self._config.get(key)) for key in _OTHER_NAMED]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self._config.get(key) or ()
            more += map(_text, value.values() if isinstance(value, dict) else value)
        added = self._config.get("added_tokens_decoder") or {}
        more += [_text(t) for t in added.values() if t.get("special")]
        backend.add_marks([t for t in [*named.values(), *more] if t])

        def named_id(key: str, own: int | None) -> int | None:
            text = named[key]
            return backend.id_of(text) if text is not None else own

        self.vocab_size: int = backend.size
        self.bos_token_id = named_id("bos_token", backend.bos)
        eos = named_id("eos_token", backend.eos)
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.pad_token_id = named_id("pad_token", backend.pad)
        self.unk_token_id = named_id("unk_token", backend.unk)
        self.chat_template = _chat_template(self._config)
        self.marks: dict[str, int] = dict(backend.marks)
        self._special = frozenset(self.marks.values())
        adds = self._config.get("add_bos_token")
        adds = backend.adds_bos if adds is None else bool(adds)
        self.adds_bos = adds and self.bos_token_id is not None
        self._pieces: dict[int, bytes] = {}

    def encode(
        self, text: str, *, add_special: bool = False, place: str = "start"
    ) -> list[int]:
        """The ids of a text; marks in it become their one id.

        A mark that prompts.guard has guarded is encoded as the plain characters it
        is made of. add_special: put the begin-of-text id in front, where the model
        wants one and the text does not have it yet. place: "start" of everything,
        "mark" (after a special mark or image) or "middle" (right after other text);
        vocabularies that put a space before a text need to know.
        """
        text = _valid(text)
        ids: list[int] = []
        for k, piece in enumerate(text.split(GUARD)):
            ids += self._backend.encode(piece, "middle" if k else place)
        if add_special and self.adds_bos and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)  # type: ignore[arg-type]
        return ids

    def place_after(self, text: str) -> str:
        """The `place` of what follows a text: "mark" or "middle".

        A user-defined symbol of sentencepiece is part of the text around it.
        """
        ends = [mark for mark in self.marks if text.endswith(mark)]
        native = getattr(self._backend, "native_marks", ())
        return "mark" if ends and not any(m in native for m in ends) else "middle"

    def encode_plain(self, text: str, *, add_special: bool = False) -> list[int]:
        """The ids of a text in which nothing is a mark."""
        return self.encode(guard(text, self.marks), add_special=add_special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; equal to what a Detokenizer gives for them in pieces."""
        detokenizer = Detokenizer(self, skip_special=skip_special)
        text = "".join([detokenizer.add(i) for i in ids])
        return text + detokenizer.finish()

    def detokenizer(self, *, skip_special: bool = True) -> "Detokenizer":
        """A new Detokenizer for one answer."""
        return Detokenizer(self, skip_special=skip_special)

    def piece(self, i: int, *, skip_special: bool = True) -> bytes:
        """The bytes that an id stands for; b"" for special and unknown ids."""
        if skip_special and i in self._special:
            return b""
        found = self._pieces.get(i)
        if found is None:
            found = self._pieces[i] = self._backend.piece(i) if i >= 0 else b""
        return found

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, or None if the vocabulary does not have it."""
        return self._backend.id_of(token)

    @property
    def reads_text(self) -> bool:
        """False for a model without a tokenizer, whose prompts are token ids."""
        return self._backend.kind != "token ids"

    @property
    def drops_first_space(self) -> bool:
        """Whether a text starts with a space that encode has put there."""
        return self._backend.drops_first_space

    def template_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as Jinja chat templates use them."""
        texts = {i: text for text, i in self.marks.items()}
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        ids = {
            "bos_token": self.bos_token_id,
            "eos_token": eos,
            "pad_token": self.pad_token_id,
            "unk_token": self.unk_token_id,
        }
        return {k: texts.get(i, "") for k, i in ids.items() if i is not None} | {
            k: text for k in _NAMED if (text := _text(self._config.get(k)))
        }

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into an existing folder.

        A tiktoken vocabulary is written as tokenizer.json, which loads faster.
        """
        folder = Path(folder)
        self._backend.save(folder)
        if not self.reads_text:
            return
        config = self.template_tokens() | self._config
        config.pop("chat_template", None)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / TOKENIZER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if self.chat_template is not None:
            path = folder / CHAT_TEMPLATE_FILE
            path.write_text(self.chat_template, encoding="utf-8")


def _valid(text: str) -> str:
    """The text, if it can be written as UTF-8 at all."""
    if not isinstance(text, str):
        raise PromptError(
            f"A prompt is of the type {type(text).__name__}, but text was expected."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The prompt has a broken character at position {error.start} (half of a "
            f"surrogate pair): it is not valid Unicode text."
        ) from error
    return text


class Detokenizer:
    """Ids to text, one at a time, giving text as soon as it is certain.

    Each id costs the same, however long the answer is: an id is a few bytes, and the
    bytes go through an incremental UTF-8 decoder, which keeps an unfinished character
    back. Bytes that are no UTF-8 become U+FFFD; an unfinished character at the end is
    left out. Ids beyond the vocabulary (rows that pad an embedding) give "".
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._piece, self._skip = tokenizer.piece, skip_special
        self._drops_space = tokenizer.drops_first_space
        self._start = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that this id makes certain; often "" inside a character."""
        data = self._piece(int(token_id), skip_special=self._skip)
        if self._start and data:
            self._start = False
            if self._drops_space and data.startswith(b" "):
                data = data[1:]
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left at the end: nothing, since half a character is no text.

        After it, the detokenizer can be used for another answer.
        """
        self._decoder.reset()
        self._start = True
        return ""


def _chat_template(config: dict) -> str | None:
    """The template of a config: text, or the one called default of a list."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _config_of(folder: Path) -> dict:
    """tokenizer_config.json with what the older files beside it say."""
    config = read_json(folder / TOKENIZER_CONFIG_FILE)
    for key, value in read_json(folder / SPECIAL_TOKENS_FILE).items():
        if config.get(key) is None:
            config[key] = value
    template = folder / CHAT_TEMPLATE_FILE
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    elif "chat_template" not in config:
        older = read_json(folder / "chat_template.json")
        if isinstance(older.get("chat_template"), str):
            config["chat_template"] = older["chat_template"]
    return config


def _added_tokens(folder: Path, config: dict) -> dict[str, int]:
    """Tokens beyond the model's; those of the older file are put into the config."""
    listed = dict(config.get("added_tokens_decoder") or {})
    for text, i in read_json(folder / ADDED_TOKENS_FILE).items():
        listed.setdefault(str(i), {"content": text, "special": True})
    if listed:
        config["added_tokens_decoder"] = listed
    return {text: int(i) for i, t in listed.items() if (text := _text(t))}


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a file that load_tokenizer would take."""
    folder = Path(folder)
    patterns = (TOKENIZER_FILE, "*.model", "*.tiktoken", MERGES_FILE)
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def number_tokenizer(
    size: int,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
) -> Tokenizer:
    """The tokenizer of a model that has none: text is ids, "1 306 4966"."""
    from mm1_mlx.inputs.numbers import NumberBackend

    return Tokenizer(NumberBackend(size, bos, eos, pad))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a model folder.

    Takes, in this order: tokenizer.json; a sentencepiece model (tokenizer.model or
    another *.model); a tiktoken rank file (*.tiktoken); vocab.json and merges.txt. The
    other files of the hub (tokenizer_config.json, special_tokens_map.json,
    added_tokens.json, chat_template.jinja) are read where they are. Raises
    CheckpointError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"The tokenizer folder {folder} does not exist.")
    config = _config_of(folder)
    if (path := folder / TOKENIZER_FILE).is_file():
        return Tokenizer(JsonBackend.read(path), config)
    models = sorted(folder.glob("*.model"), key=lambda p: p.name != SENTENCEPIECE_FILE)
    if models:
        backend = SentencePieceBackend.read(
            models[0],
            _added_tokens(folder, config),
            legacy=config.get("legacy") is not False,
        )
        return Tokenizer(backend, config)
    if ranks := sorted(folder.glob("*.tiktoken")):
        return _load_ranks(ranks[0], config)
    if (folder / MERGES_FILE).is_file():
        return _load_merges(folder, config)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{folder} has no tokenizer: expected {TOKENIZER_FILE}, {SENTENCEPIECE_FILE}, "
        f"a .tiktoken file or {MERGES_FILE}, found {found}."
    )


def _load_ranks(path: Path, config: dict) -> Tokenizer:
    from mm1_mlx.inputs import ranks

    name = ranks.split_name(path, config)
    marks = ranks.known_marks(name, config)
    built = ranks.build(ranks.read_ranks(path), name, marks)
    end = "<|endoftext|>"
    if end in marks:
        config = {"eos_token": end, "pad_token": end} | {
            k: v for k, v in config.items() if v is not None
        }
    return Tokenizer(JsonBackend(built), config)


def _load_merges(folder: Path, config: dict) -> Tokenizer:
    from mm1_mlx.inputs import merges

    listed = dict(config.get("added_tokens_decoder") or {})
    special = {_text(config.get(key)) for key in (*_NAMED, *_OTHER_NAMED)}
    special |= set(map(_text, config.get("additional_special_tokens") or ()))
    for text, i in read_json(folder / ADDED_TOKENS_FILE).items():
        token = {"content": text, "special": text in special, "normalized": False}
        listed.setdefault(str(i), token)
    config = config | {"added_tokens_decoder": listed}
    return Tokenizer(JsonBackend(merges.build(folder, config)), config)
