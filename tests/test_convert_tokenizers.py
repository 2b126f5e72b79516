"""Tokenizers through a conversion: the ids are those of the original libraries."""

import base64
import json
import shutil

import numpy as np
import pytest
from small_tokenizers import (
    TEXTS,
    TRICKY,
    random_texts,
    ranks,
    sentencepiece_model,
    write_byte_level,
    write_llama,
    write_merges,
    write_ranks,
)

from convert.conversion import convert
from helpers import FIXTURES, need
from mm1_mlx import load
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.tokenizer import load_tokenizer

CORPUS = TEXTS + TRICKY + random_texts()


def folder_with(write, source: str, out, **config):
    """A fixture's checkpoint with a tokenizer, converted; model and processor."""
    foreign = out / "foreign"
    shutil.copytree(FIXTURES / source, foreign)
    write(foreign, **config)
    tower = FIXTURES / "llava15/tower" if "llava15" in source else None
    convert(foreign, out / "ours", dtype="float32", tower=tower)
    return load(out / "ours")


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special=True)


def test_sentencepiece(tmp_path):
    import sentencepiece

    _, processor = folder_with(write_llama, "decoder_vicuna/bin", tmp_path)
    proto = sentencepiece_model("bpe", tiny=False)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in CORPUS:
        assert ids_of(processor, text) == [theirs.bos_id(), *theirs.encode(text)], text


def test_tokenizer_json(tmp_path):
    tokenizers = need("tokenizers")
    _, processor = folder_with(write_byte_level, "decoder_qwen2", tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "foreign/tokenizer.json"))
    for text in CORPUS:
        assert ids_of(processor, text) == theirs.encode(text).ids, text


def test_tiktoken_ranks(tmp_path):
    tiktoken = need("tiktoken")
    from mm1_mlx.inputs.ranks import SPLITS

    _, processor = folder_with(write_ranks, "decoder_qwen2", tmp_path)
    theirs = tiktoken.Encoding(
        "own", pat_str=SPLITS["cl100k_base"], mergeable_ranks=ranks(), special_tokens={}
    )
    for text in CORPUS:
        assert ids_of(processor, text) == theirs.encode_ordinary(text), text
    file = (tmp_path / "foreign" / "cl100k_base.tiktoken").read_bytes()
    assert base64.b64decode(file.split()[0]) in ranks()


def test_vocabulary_and_merges(tmp_path):
    """The two files of GPT-2, which are all that MoE-LLaVA's Phi-2 has."""
    transformers = need("transformers")
    _, processor = folder_with(write_merges, "decoder_phi2", tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "foreign")
    for text in CORPUS:
        ids = ids_of(processor, text)
        assert ids == theirs.encode(text), text
        assert processor.tokenizer.decode(ids) == text.replace("<image>", "")
    assert {"<|endoftext|>", "<image>"} <= processor.tokenizer.marks.keys()
    assert "  " not in processor.tokenizer.marks  # a token, but text


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("merges.txt", "#version: 0.2\nĠ zz\n", r"merges\.txt, line 2: expected two"),
        ("merges.txt", "a b c", r"line 1: expected two tokens"),
        ("vocab.json", "[1]", r"must hold an object of tokens"),
        ("vocab.json", "{", r"vocab\.json cannot be read"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BertTokenizer"}',
            r"how a BertTokenizer splits text is not known",
        ),
    ],
)
def test_broken_vocabulary_or_merges(file, text, message, tmp_path):
    write_merges(tmp_path)
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_llava_reads_the_text_around_an_image_in_pieces(tmp_path):
    """As LLaVA's tokenizer_image_token does: each piece alone, one begin of text."""
    import sentencepiece

    model, processor = folder_with(write_llama, "llava15/original", tmp_path)
    proto = sentencepiece_model("bpe", tiny=False)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    slot, count = model.config.image_token_id, model.config.tokens_per_image
    most = model.config.text_config.vocab_size  # the fixture's is a small one
    known = [text for text in CORPUS if max(theirs.encode(text), default=0) < most]
    assert len(known) > 50
    picture = np.zeros((40, 40, 3), np.uint8)
    for before, after in zip(known, known[::-1], strict=True):
        inputs = processor(f"{before}<image>{after}", [picture], use_template=False)
        pieces = [theirs.encode(piece) for piece in (before, after)]
        wanted = [theirs.bos_id(), *pieces[0], *[slot] * count, *pieces[1]]
        assert inputs.input_ids[0].tolist() == wanted, (before, after)


def test_the_files_of_the_tokenizer_stay_the_hubs(tmp_path):
    folder_with(write_byte_level, "decoder_qwen2", tmp_path, chat_template="{{ 1 }}")
    kept = json.loads((tmp_path / "ours/tokenizer.json").read_text())
    assert kept == json.loads((tmp_path / "foreign/tokenizer.json").read_text())
    template = tmp_path / "ours" / "chat_template.jinja"
    assert template.read_text().strip() == "{{ 1 }}"
