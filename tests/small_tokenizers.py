"""Small tokenizers of each kind, trained in a second, shared by several test files."""

import base64
import io
import json
import random
from functools import lru_cache
from pathlib import Path

TEXTS = [
    "How many red circles are there?",
    "There are 3 red circles and 12 blue squares.",
    "What colour is the star? It is yellow.",
    "Where is the triangle? It's at the top left.",
    "Describe the picture: a green square, a purple star.",
    "naïve café, 東京タワー, привет мир, 🙂👍🏽",
    "def f(x):\n    return x  # two\n\n\tdone",
    "I'll say we've DON'T they're HE'S  double  spaces",
] * 4

# Texts that a vocabulary has not seen, for round trips.
TRICKY = [
    "",
    " ",
    "a",
    "  leading and trailing  ",
    "red circles",
    "ünïcödé ＦＵＬＬ width",
    "東京🙂\u200d👍🏽 e\u0301",
    "x" * 100,
    "1234567890 3.14",
    "\n\n\n a\r\n\tb",
    "they'LL  I'M 'tis",
    "\u00a0nbsp\u3000wide",
    "\x00\x01\x7f",
]


ALPHABET = "ab  ceé\n\t'10東🙂\u0301.<>|/_sT"


def random_texts(count: int = 300) -> list[str]:
    """Short texts of letters that are hard for tokenizers; always the same."""
    rng = random.Random(0)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(1, 30))) for _ in range(count)]


@lru_cache
def sentencepiece_model(
    kind: str = "unigram", tiny: bool = True, size: int = 350
) -> bytes:
    """A model; `tiny` has mm1-tiny's ids and user-defined marks, else Llama's."""
    import sentencepiece

    file = io.BytesIO()
    settings = {
        "vocab_size": size,
        "hard_vocab_limit": False,
        "model_type": kind,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "minloglevel": 5,
    }
    if tiny:
        settings |= {
            "pad_id": 3,
            "user_defined_symbols": ["<image>", "<user>", "<assistant>"],
        }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, **settings
    )
    return file.getvalue()


def write_tiny(folder: Path, **config) -> Path:
    """A folder with a sentencepiece model as mm1-tiny ships it."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_llama(folder: Path, size: int = 350, **config) -> Path:
    """A folder with a Llama-like sentencepiece BPE model of `size` tokens."""
    model = sentencepiece_model("bpe", tiny=False, size=size)
    (folder / "tokenizer.model").write_bytes(model)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@lru_cache
def byte_level_json() -> str:
    """A tokenizer.json of the GPT-2 and Llama 3 kind, with a begin-of-text mark."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[
            "<s>",
            "</s>",
            "<pad>",
            "<image>",
            "<|im_start|>",
            "<|im_end|>",
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str()


def write_byte_level(folder: Path, **config) -> Path:
    (folder / "tokenizer.json").write_text(byte_level_json(), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@lru_cache
def ranks() -> dict[bytes, int]:
    """tiktoken ranks: all bytes, then the merges of the byte-level tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from mm1_mlx.inputs.ranks import SPLITS, byte_letters

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS["cl100k_base"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    back = {letter: b for b, letter in enumerate(byte_letters())}
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(back[c] for c in token): i for token, i in vocab}


def write_ranks(folder: Path, name: str = "cl100k_base", **config) -> Path:
    lines = [base64.b64encode(t) + b" %d" % i for t, i in ranks().items()]
    (folder / f"{name}.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_merges(folder: Path, **config) -> Path:
    """vocab.json, merges.txt and added tokens: what slow tokenizers write (Phi-2)."""
    model = json.loads(byte_level_json())["model"]
    marks = {"<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"}
    own = {token: i for token, i in model["vocab"].items() if token not in marks}
    order = sorted(own, key=own.__getitem__)
    vocab = {token: i for i, token in enumerate([*order, "<|endoftext|>"])}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {"  ": len(vocab), "\t\t": len(vocab) + 1, "<image>": len(vocab) + 2}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    end = "<|endoftext|>"
    config = {
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "additional_special_tokens": ["<image>"],
        "tokenizer_class": "CodeGenTokenizer",
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
