"""GPT-2's two files, vocab.json and merges.txt -> a BPE of the tokenizers package.

What the slow tokenizers of transformers write (MoE-LLaVA's Phi-2 has nothing else). How
text is split before the merges is not in the files: tokenizer_class tells.
"""

import json
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.ranks import NORMALISED, SPLITS

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

# tokenizer_class without "Fast" -> a key of SPLITS.
_CLASSES = {
    "GPT2Tokenizer": "gpt2",
    "CodeGenTokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen",
}


def build(folder: Path, config: dict) -> Any:
    """A tokenizers.Tokenizer of a folder. config: its tokenizer_config.json.

    Marks that added_tokens_decoder lists keep their ids and their flags.
    """
    name = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name not in _CLASSES:
        raise CheckpointError(
            f"{folder / MERGES_FILE}: how a {name} splits text is not known, only "
            f"{', '.join(_CLASSES)}. Save it as tokenizer.json (its fast class in "
            f"transformers does)."
        )
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    listed = (config.get("added_tokens_decoder") or {}).items()
    added = sorted((int(i), token) for i, token in listed)
    # tokenizers numbers added tokens itself, unless the vocabulary already has them.
    vocab = _vocab(folder) | {token["content"]: i for i, token in added}
    tokenizer = Tokenizer(_model(models.BPE, vocab, folder))
    split = _CLASSES[name]
    if split in NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    if split == "gpt2":
        prefix = bool(config.get("add_prefix_space"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        parts = [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    for _, token in added:
        known = {key: bool(token[key]) for key in flags if key in token}
        tokenizer.add_tokens([AddedToken(token["content"], **known)])
    return tokenizer


def _vocab(folder: Path) -> dict[str, int]:
    path = folder / VOCAB_FILE
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise CheckpointError(f"{path} must hold an object of tokens and their ids.")
    return vocab


def _model(kind: Any, vocab: dict[str, int], folder: Path) -> Any:
    path = folder / MERGES_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise CheckpointError(
                f"{path}, line {number}: expected two tokens of {VOCAB_FILE} that "
                f"become a third, but found {line[:40]!r}. Download both files again."
            )
        merges.append(pair)
    return kind(vocab=vocab, merges=merges)
