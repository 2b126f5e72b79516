"""tiktoken rank files -> a byte-level BPE of the tokenizers package.

A rank file has one token a line: its bytes in base64 and its rank, which is its id.
It holds no merges. tiktoken joins, again and again, the neighbouring pair whose joined
bytes have the lowest rank. The tokenizers package wants a list of merges instead.

So every split of a token into two others is listed, in the order of the tokens' ranks.
That is exact. When a token forms inside a text, nothing has crossed its borders, so
inside them everything was joined as if the token stood alone: the last two parts are
always the same. The other splits in the list never stand side by side.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError

# How text is split before the merges. By the stem of the file name; a folder may name
# another of these as "split" in its tokenizer_config.json.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_GPT2_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt2": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ),
    "cl100k_base": (_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _GPT2_END),
    # Single digits: StableLM 2's and Qwen's vocabularies
    "arcade100k": _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _GPT2_END,
    "qwen": _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _GPT2_END,
}
NORMALISED = ("arcade100k", "qwen")  # NFC first

# Marks that a vocabulary has beside its ranks when its config does not list them.
# arcade100k: id 100256 stays empty.
_ARCADE_MARKS = (
    "<|endoftext|> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <gh_stars> "
    "<filename> <issue_start> <issue_comment> <issue_closed> <jupyter_start> "
    "<jupyter_text> <jupyter_code> <jupyter_output> <empty_output> <commit_before> "
    "<commit_msg> <commit_after> <reponame> <|endofprompt|> <|im_start|> <|im_end|> "
    "<|pause|> <|reg0|> <|reg1|> <|reg2|> <|reg3|> <|reg4|> <|reg5|> <|reg6|> <|reg7|> "
    "<|extra0|>"
)
_MARKS = {
    "arcade100k": (100257, _ARCADE_MARKS.split()),
    "cl100k_base": (
        100257,
        ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
    ),
    "qwen": (151643, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "gpt2": (50256, ["<|endoftext|>"]),
}
_MORE_MARKS = {"cl100k_base": {"<|endofprompt|>": 100276}}


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token bytes -> rank. Raises CheckpointError with the line that is wrong."""
    path = Path(path)
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}, line {number}: expected a token in base64 and its rank, but "
                f"found {line[:40]!r}. Download the file again."
            ) from error
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path} has no token for the byte {missing[0]} ({len(missing)} of 256 "
            f"bytes are missing). Download the file again."
        )
    if len(set(ranks.values())) != len(ranks):
        raise CheckpointError(f"{path} gives two tokens the same rank.")
    return ranks


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 stands for itself, the rest for letters from U+0100 on.
    """
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, others = [""] * 256, 0
    for byte in range(256):
        if byte in own:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + others)
            others += 1
    return letters


def split_name(path: Path, config: dict) -> str:
    """Which split the file uses: named by the config, or by the file name."""
    name = config.get("split", path.stem)
    if name not in SPLITS:
        raise CheckpointError(
            f"{path.name}: how this vocabulary splits text is not known. Rename the "
            f"file to, or set 'split' in tokenizer_config.json to, one of "
            f"{', '.join(sorted(SPLITS))}."
        )
    return name


def known_marks(name: str, config: dict) -> dict[str, int]:
    """Special marks and their ids: the config's, else those known by the name."""
    listed = config.get("added_tokens_decoder") or {}
    if listed:
        return {token["content"]: int(i) for i, token in listed.items()}
    first, marks = _MARKS[name]
    known = {mark: first + i for i, mark in enumerate(marks)}
    return known | _MORE_MARKS.get(name, {})


def build(ranks: dict[bytes, int], name: str, marks: dict[str, int]) -> Any:
    """A tokenizers.Tokenizer with tiktoken's results; ids are the ranks.

    name: a key of SPLITS. marks: special text -> id; ids between stay unused.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    letters = byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    taken = {rank for token, rank in vocab.items() if token not in marks}
    for mark, i in marks.items():
        if i in taken:
            raise CheckpointError(
                f"The mark {mark!r} has the id {i}, which the rank file gives to "
                f"another token."
            )
    # tokenizers numbers added tokens itself, unless the vocabulary already has them.
    vocab |= marks
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    if name in NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(mark, special=True, normalized=False) for mark in marks]
    tokenizer.add_special_tokens(added)
    return tokenizer
