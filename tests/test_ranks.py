"""tiktoken rank files: the same ids as tiktoken, and broken files."""

import random
import unicodedata

import pytest
from small_tokenizers import TEXTS, TRICKY, random_texts, ranks, write_ranks

from helpers import need
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs import ranks as rank_files
from mm1_mlx.inputs.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["cl100k_base", "arcade100k", "gpt2"])
def test_ranks_equal_tiktoken(name):
    tiktoken = need("tiktoken")
    theirs = tiktoken.Encoding(
        name="test",
        pat_str=rank_files.SPLITS[name],
        mergeable_ranks=ranks(),
        special_tokens={},
    )
    ours = rank_files.build(ranks(), name, {})
    for text in TRICKY + TEXTS + random_texts(1000):
        if name == "arcade100k":
            text = unicodedata.normalize("NFC", text)
        assert ours.encode(text).ids == theirs.encode(text, disallowed_special=())


def test_ranks_with_several_splits_of_a_token_equal_tiktoken():
    # Few letters and many ranks, in no order that training would give: nearly every
    # token has several splits, and some are never made of two others.
    tiktoken = need("tiktoken")
    rng = random.Random(1)
    for _ in range(20):
        table = {bytes([b]): b for b in range(256)}
        while len(table) < 330:
            parts = rng.choices([t for t in table if set(t) <= set(b"abc")], k=2)
            odd = bytes(rng.choices(b"abc", k=rng.randint(2, 5)))
            table.setdefault(rng.choice([b"".join(parts), odd]), len(table))
        theirs = tiktoken.Encoding(
            name="test",
            pat_str=rank_files.SPLITS["gpt2"],
            mergeable_ranks=table,
            special_tokens={},
        )
        ours = rank_files.build(table, "gpt2", {})
        for _ in range(100):
            text = "".join(rng.choices("abc", k=rng.randint(1, 20)))
            assert ours.encode(text).ids == theirs.encode(text), text


def test_arcade_marks(tmp_path):
    tokenizer = load_tokenizer(write_ranks(tmp_path, "arcade100k"))
    assert tokenizer.marks["<|endoftext|>"] == 100257
    assert tokenizer.marks["<|im_start|>"] == 100277
    assert tokenizer.marks["<|extra0|>"] == 100288
    assert tokenizer.vocab_size == 100289  # with 100256, which nothing uses
    assert tokenizer.eos_token_ids == (100257,) == (tokenizer.pad_token_id,)
    assert tokenizer.encode("<|endoftext|>") == [100257]


def test_marks_of_the_config(tmp_path):
    config = {"added_tokens_decoder": {"500": {"content": "<end>", "special": True}}}
    write_ranks(tmp_path, "mine", split="gpt2", eos_token="<end>", **config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.marks == {"<end>": 500} and tokenizer.eos_token_ids == (500,)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"@@@ 5", r"line 2: expected a token in base64"),
        (b"YQ==", r"line 2: expected a token in base64 and its rank"),
        (b"YQ== x", r"line 2: .*found b'YQ== x'"),
        (b"YQ== 5", r"has no token for the byte 0 \(254 of 256"),
    ],
)
def test_broken_rank_files(tmp_path, line, message):
    (tmp_path / "gpt2.tiktoken").write_bytes(b"YmM= 7\n" + line)
    if line == b"YQ== 5":
        (tmp_path / "gpt2.tiktoken").write_bytes(b"Yg== 7\n" + line)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_rank_file_errors(tmp_path):
    write_ranks(tmp_path, "mystery")
    with pytest.raises(CheckpointError, match="how this vocabulary splits text is not"):
        load_tokenizer(tmp_path)
    path = tmp_path / "gpt2.tiktoken"
    lines = (tmp_path / "mystery.tiktoken").read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines, lines[0].split()[0] + b"QUFBQUFBQQ== 0"]))
    with pytest.raises(CheckpointError, match=r"line \d+|the same rank"):
        rank_files.read_ranks(path)
    with pytest.raises(CheckpointError, match=r"<end>.*gives to another token"):
        rank_files.build(ranks(), "gpt2", {"<end>": 5})
    path.write_bytes(b"\n".join([*lines, b"enp6enp6eno= 0"]))
    with pytest.raises(CheckpointError, match="two tokens the same rank"):
        rank_files.read_ranks(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        rank_files.read_ranks(tmp_path / "none")
